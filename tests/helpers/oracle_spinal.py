"""The oracle of SPINAL (METHODS 5); see :mod:`tests.helpers.oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tests.helpers.oracle import (
    Floats,
    PairLike,
    decoder_layers,
    forward,
    lens_logits,
    prediction_positions,
    sides,
    spectral_positions,
    token_log_probs,
)


def spectral_rows(model: nn.Module, pairs: Sequence[PairLike]) -> list[Floats]:
    """H_l for every layer: the rows h_l at the prediction positions, common prefixes once -> L arrays [rows, d]."""
    depth = len(decoder_layers(model))
    rows: list[list[Floats]] = [[] for _ in range(depth)]
    for pair, places in zip(pairs, spectral_positions(pairs), strict=True):
        for (ids, _), positions in zip(sides(pair), places, strict=True):
            run = forward(model, ids)
            for layer in range(depth):
                for position in positions:
                    rows[layer].append(run.h(layer)[position].double().cpu().numpy())
    return [np.stack(layer_rows) for layer_rows in rows]


def tail_slope(singular_values: Floats, n: int) -> tuple[float, float, float]:
    """(alpha, R^2, standard error) of -d log sigma_k / d log k over ranks ceil(n/10) … floor(9n/10), 1-based.

    All three are NaN when the window has fewer than 16 singular values.
    """
    low, high = -(-n // 10), 9 * n // 10  # ceil and floor, in exact integers
    if high - low + 1 < 16:
        return float("nan"), float("nan"), float("nan")
    ranks = np.arange(low, high + 1)
    x, y = np.log(ranks), np.log(singular_values[ranks - 1])
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    residual, total = ((y - slope * x) ** 2).sum(), (y * y).sum()
    r2 = 1 - residual / total if total > 0 else float("nan")
    error = np.sqrt(residual / (len(ranks) - 2) / (x * x).sum())
    return float(-slope), float(r2), float(error)


ROUNDING_UNITS = 10
"""By how many units in the last place an entry of a stream is wrong, at most."""


def numerical_rank(rows: Floats, eps: float) -> int:
    """Singular values above what errors of ``ROUNDING_UNITS`` · eps of every entry make, columns scaled to one size."""
    size = np.sqrt((rows**2).mean(axis=0))
    scaled = rows[:, size > 0] / size[size > 0]
    noise = ROUNDING_UNITS * eps * np.linalg.norm(scaled) / np.sqrt(min(rows.shape))
    return int((np.linalg.svd(scaled, compute_uv=False) > noise).sum())


def spectra(model: nn.Module, pairs: Sequence[PairLike]) -> tuple[Floats, Floats, list[Floats]]:
    """(contraction [L], R^2 [L], all singular values of each H_l, descending)."""
    eps = torch.finfo(next(model.parameters()).dtype).eps
    alphas, r2s, values = [], [], []
    for rows in spectral_rows(model, pairs):
        singular_values = np.linalg.svd(rows, compute_uv=False).astype(np.float64)
        alpha, r2, _ = tail_slope(singular_values, min(*rows.shape, numerical_rank(rows, eps)))
        alphas.append(alpha)
        r2s.append(r2)
        values.append(singular_values)
    return np.array(alphas), np.array(r2s), values


def transport(model: nn.Module, pairs: Sequence[PairLike]) -> Floats:
    """Mean Fisher-Rao distance between the logit lens distributions of layers l and l+1, same rows -> [L-1]."""
    depth = len(decoder_layers(model))
    distances: list[list[float]] = [[] for _ in range(depth - 1)]
    for pair, places in zip(pairs, spectral_positions(pairs), strict=True):
        for (ids, _), positions in zip(sides(pair), places, strict=True):
            run = forward(model, ids)
            roots = []  # sqrt of the lens distribution [T, V], layer by layer
            for layer in range(depth):
                logits = lens_logits(model, ids, run.h(layer)).double().cpu()
                roots.append(logits.softmax(dim=-1).sqrt().numpy())
            for layer in range(depth - 1):
                for position in positions:
                    chord = np.linalg.norm(roots[layer][position] - roots[layer + 1][position])
                    distances[layer].append(4 * np.arcsin(chord / 2))
    return np.array([np.mean(values) for values in distances])


def terminal_block(depth: int) -> list[int]:
    """The last max(ceil(L/3), min(4, L)) layers."""
    size = max(-(-depth // 3), min(4, depth))
    return list(range(depth - size, depth))


def delta_align(
    contraction_policy: Floats,
    contraction_reference: Floats,
    transport_policy: Floats,
    transport_reference: Floats,
    block: Sequence[int] | None = None,
) -> float:
    """Mean over S of the change of contraction minus mean over S, l < L-1, of the change of transport."""
    depth = len(contraction_policy)
    block = terminal_block(depth) if block is None else block
    below_top = [layer for layer in block if layer < depth - 1]
    if not below_top:
        return float("nan")
    contraction_change = np.mean([contraction_policy[layer] - contraction_reference[layer] for layer in block])
    transport_change = np.mean([transport_policy[layer] - transport_reference[layer] for layer in below_top])
    return float(contraction_change - transport_change)


def coherence(
    contraction_policy: Floats,
    transport_policy: Floats,
    contraction_reference: Floats,
    transport_reference: Floats,
    block: Sequence[int] | None = None,
) -> float:
    """1 / (1 + mean norm of the second differences of the policy's path over S, l < L-1), in the reference's scale.

    The scale of each coordinate: its population standard deviation over all of the reference's layers (L contractions,
    L-1 transports). NaN below three points, or when a scale is 0.
    """
    depth = len(contraction_policy)
    block = terminal_block(depth) if block is None else block
    layers = [layer for layer in block if layer < depth - 1]
    scales = np.std(contraction_reference), np.std(transport_reference)
    if len(layers) < 3 or 0 in scales:
        return float("nan")
    path = [(contraction_policy[layer] / scales[0], transport_policy[layer] / scales[1]) for layer in layers]
    norms = []
    for before, here, after in zip(path, path[1:], path[2:], strict=False):
        norms.append(np.hypot(after[0] - 2 * here[0] + before[0], after[1] - 2 * here[1] + before[1]))
    return float(1 / (1 + np.mean(norms)))


def gradient_norms(policy: nn.Module, pairs: Sequence[PairLike]) -> Floats:
    """g_il = Frobenius norm of dm_i / dh_l over all positions of both sequences -> [N, L]. No ``.grad`` is touched."""
    depth = len(decoder_layers(policy))
    squares = np.zeros((len(pairs), depth))
    for i, pair in enumerate(pairs):
        for ids, start in sides(pair):  # each sequence has its own streams; the rejected one's sign squares away
            if not prediction_positions(ids, start):
                continue
            run = forward(policy, ids, grad=True)
            logp = token_log_probs(run.logits, ids, start).sum()
            gradients = torch.autograd.grad(logp, run.streams[1:])
            for layer, gradient in enumerate(gradients):
                squares[i, layer] += gradient.double().square().sum().item()
    return np.sqrt(squares)


def gradient_concentration(policy: nn.Module, pairs: Sequence[PairLike], block: Sequence[int] | None = None) -> Floats:
    """Share of the gradient norm that lies in the terminal block, per pair -> [N]; its mean is the measure."""
    norms = gradient_norms(policy, pairs)
    block = terminal_block(norms.shape[1]) if block is None else block
    with np.errstate(invalid="ignore"):
        share: Floats = norms[:, list(block)].sum(axis=1) / norms.sum(axis=1)
    return share
