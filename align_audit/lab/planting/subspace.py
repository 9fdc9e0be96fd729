"""A preference planted in a subspace of known rank of what one layer writes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align_audit.lab.planting.parts import (
    Projection,
    anatomy_of,
    check_layer,
    layer_parts,
    output_projection,
    weights_of,
)
from align_audit.lab.planting.reading import ProjectionRows, margins, padded_rows, projection_rows
from align_audit.lab.planting.steps import size_step, whitening
from align_audit.lab.planting.truth import Planted, Truth
from align_audit.models.anatomy import unwrap
from align_audit.probes.pairs import ProbePair


def plant_subspace(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    layer: int,
    rank: int,
    shift: float = 2.0,
    share_tolerance: float = 0.05,
) -> Planted:
    """A policy that differs from ``base`` by a change of rank ``rank`` of what the MLP of ``layer`` adds to the stream.

    ΔW_down = Σ_j c_j u_j a_jᵀ with u_j the leading left singular vectors of G C^{−1/2} and a_j = C^{−1} Gᵀ u_j, scaled to unit
    variance of a_j·x, where G is the gradient of the mean margin and C the second moments of what W_down reads. So
    h_ℓ(π) − h_ℓ(ρ) = Σ_j c_j (a_j·x) u_j, whose terms are uncorrelated over tokens. c_j is such that each direction moves
    the mean margin by ``shift / rank`` on its own (measured, to ``share_tolerance``).

    Args:
        base: a causal LM in eval mode; it is not changed.
        pairs: planting pairs.
        shift: nats, of all directions together if they acted separately; ``truth.numbers["shift"]`` is what they do.

    Returns:
        The policy; ``truth.numbers`` also has ``shift_alone_j`` for each direction and ``rank``.

    Raises:
        ValueError: the layer normalizes what its MLP writes (Gemma 2), so that no change of weights stays in a subspace.
    """
    check_layer(base, layer)
    probes = list(pairs)
    projection = output_projection(base, layer, "mlp")
    rows = projection_rows(base, probes, projection)
    outputs, inputs = rows.gradients.shape[1], rows.inputs.shape[1]
    if not 1 <= rank <= min(outputs, inputs):
        raise ValueError(f"expected a rank from 1 to {min(outputs, inputs)}; found {rank}")
    _check_linear(base, probes, layer, projection)
    base_margin = float(margins(base, probes).mean())
    weight = weights_of(base)[projection.weight]
    directions = _directions(rows, rank)

    def shift_of(change: Tensor) -> float:
        lent = {projection.weight: weight + projection.stored(change).to(weight.dtype)}
        return float(margins(base, probes, lent).mean()) - base_margin

    def shift_along(direction: Tensor, size: float) -> float:
        return shift_of(size * direction)

    total = torch.zeros(outputs, inputs, dtype=torch.float64, device=weight.device)
    numbers: dict[str, float] = {"rank": float(rank)}
    for number, (direction, slope) in enumerate(directions):
        wanted = shift / rank
        size, alone = size_step(partial(shift_along, direction), wanted, wanted / slope, share_tolerance)
        total += size * direction
        numbers[f"shift_alone_{number}"] = alone
        numbers[f"size_{number}"] = size
    policy = copy.deepcopy(base)
    with torch.no_grad():
        weights_of(policy)[projection.weight].add_(projection.stored(total).to(weight.dtype))
    numbers["shift"] = shift_of(total)
    description = f"{rank} directions of what layer {layer} writes, {shift / rank:.2f} nats each alone"
    return Planted(policy, Truth(description, (layer_parts(base)[layer],), (layer,), numbers))


def _directions(rows: ProjectionRows, rank: int) -> list[tuple[Tensor, float]]:
    """``rank`` matrices u_j a_jᵀ [out, in], and the first-order margin change of each, the largest first."""
    whiten = whitening(rows.inputs.T @ rows.inputs / len(rows.inputs))
    left, sizes, right = torch.linalg.svd(rows.weight_gradient @ whiten, full_matrices=False)
    return [(torch.outer(left[:, j], right[j] @ whiten), float(sizes[j])) for j in range(rank)]


@torch.no_grad()
def _check_linear(base: nn.Module, pairs: list[ProbePair], layer: int, projection: Projection) -> None:
    """What the projection writes must reach the stream as it is: a change of its output is seen there, unscaled."""
    anatomy = anatomy_of(base)
    module = anatomy.modules(unwrap(base))[layer]
    added: list[Tensor] = []
    streams: list[Tensor] = []
    generator = np.random.default_rng(0)

    def keep(module: Any, args: Any, output: Any) -> None:
        streams.append(anatomy.stream(output).double())

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        draw = torch.from_numpy(generator.standard_normal(tuple(output.shape))).to(output)
        added.append(draw * output.std())
        return output + added[0]

    rows = padded_rows(pairs[:1], next(base.parameters()).device)[0]
    handles = [module.register_forward_hook(keep)]
    try:
        unwrap(base)(**rows.model_inputs())
        handles.append(projection.module.register_forward_hook(disturb))
        unwrap(base)(**rows.model_inputs())
    finally:
        for handle in handles:
            handle.remove()
    moved = streams[1] - streams[0]
    error = float((moved - added[0].double())[rows.valid].abs().max() / added[0].abs().max())
    if error > 1e-3:
        raise ValueError(
            f"what {projection.weight} writes is changed on its way into the residual stream (by {error:.0%}; a norm after "
            "the MLP?), so no change of it stays in a subspace. Expected an architecture that adds it as it is."
        )
