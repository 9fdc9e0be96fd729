"""Singular values of every layer's token rows, shared by the processes and made where the model is (METHODS §5)."""

from __future__ import annotations

import logging

import torch

from align_audit.auditing.session.accumulators import Rows
from align_audit.auditing.session.walk import Session
from align_audit.measures.spectrum import (
    Contraction,
    below_rounding_floor,
    contraction,
    numerical_rank,
    singular_values,
)
from align_audit.models.precision import product_unit
from align_audit.models.replay import Replay

logger = logging.getLogger(__name__)


def fitted_layers(
    session: Session, rows: Rows, replay: Replay, window: tuple[float, float]
) -> list[tuple[Contraction, int]]:
    """Of each layer how fast its singular values decay, and how many of them lie below the floor of rounding.

    Args:
        rows: [rows, L, d] of all processes.
        window: ``spinal.window``.
    """
    ranks, layers = session.models.ranks, session.num_layers
    order = torch.from_numpy(rows.order())
    share: dict[int, tuple[Contraction, int]] = {}
    for begun in range(0, layers, ranks.size):
        # Every process has its layer before any begins: else each would wait for the one before it.
        pooled = rows.layer(range(begun, min(begun + ranks.size, layers)))
        if pooled is not None:
            # In the order of the keys, so that batches cannot matter.
            share[begun + ranks.rank] = fitted(session, pooled[order], replay, window)
        del pooled
    everywhere = {layer: each for said in ranks.gather(share) for layer, each in said.items()}
    return [everywhere[layer] for layer in range(layers)]


def fitted(
    session: Session, pooled: torch.Tensor, replay: Replay, window: tuple[float, float]
) -> tuple[Contraction, int]:
    """Of one layer's rows [rows, d]; where the model is, or in the host's memory where that fails."""
    if pooled.device != replay.device:
        try:
            return _fitted_there(session, pooled.to(replay.device), replay, window)
        except RuntimeError as error:
            # Not only out of memory: libraries of linear algebra, when they find no room, say so in many words.
            logger.info("align_audit: singular values are made in the host's memory (%s)", error)
        # Out of the handler, so that the failed call's tensors are free.
        session.free_memory()
    return _fitted_there(session, pooled, replay, window)


def _fitted_there(
    session: Session, pooled: torch.Tensor, replay: Replay, window: tuple[float, float]
) -> tuple[Contraction, int]:
    # Of what the model computes in; norms of many compute in float32 also where the rest is float64.
    epsilon = max(product_unit(replay.compute_dtype, replay.device.type), float(torch.finfo(torch.float32).eps))
    wide = (pooled.cpu() if pooled.device.type == "mps" else pooled).double()
    spectrum = singular_values(wide)
    rank = numerical_rank(wide, epsilon, spectrum)
    session.meter.sample()
    fit = contraction(spectrum, len(wide), wide.shape[1], rank, window)
    return fit, int(below_rounding_floor(spectrum, epsilon))
