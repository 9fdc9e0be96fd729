"""Preferences planted so that they act through prompt positions only, or through completion positions only.

A layer's down projection is changed by a matrix that its inputs at the other positions do not see. Above that layer the
change spreads to all positions through attention; at the layer's own output it stands where it was planted, which plain
patching at those positions shows (:func:`align_audit.lab.planting.truth.patched_shift`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from align_audit.lab.planting.parts import Projection, check_layer, layer_parts, output_projection, weights_of
from align_audit.lab.planting.reading import margins, projection_rows
from align_audit.lab.planting.steps import size_step, whitening
from align_audit.lab.planting.truth import Planted, Truth
from align_audit.probes.pairs import ProbePair

_FIRING = 1e-3
"""Weight of the prompt tokens in the second moments that keep a key small: what reads at prompt tokens hardly counts."""
_RIDGE = 1e-4
"""Of these moments (see ``whitening``). Small, since what keeps completion streams still is what they span little of."""
_RANK = 1e-9
"""Singular values of the prompt tokens' inputs below this share of the largest count as none (float64 rounding)."""


def plant_prompt_only(base: nn.Module, pairs: Iterable[ProbePair], layer: int, shift: float = 2.0) -> Planted:
    """A policy that differs from ``base``, after ``layer``, such that the margin moves through prompt positions only.

    ΔW_down = u kᵀ, where G = G_p + G_c is the mean margin's gradient through prompt and completion tokens. k is the leading
    right singular vector of G_p C^{−1/2}, times C^{−1/2}, with C the second moments of what W_down reads (completion tokens
    in full, prompt tokens at a thousandth: k fires on prompt tokens and little elsewhere). u is G_p k, made orthogonal to
    G_c k. Completion streams do move a little (``truth.numbers["leak"]``: root mean square of kᵀx at completion tokens over
    that at prompt tokens); the margin, to first order, does not through them, which
    :func:`align_audit.lab.planting.truth.patched_shift` shows.

    Layers about half way up suit best. Below, k leaks; above, the prompt can act through its last token only.

    Args:
        base: a causal LM in eval mode; it is not changed.
        pairs: planting pairs; those of a few prompts (:func:`few_prompts`) suit best.
        shift: mean margin shift, nats on the planting pairs.

    Raises:
        ValueError: no such layer, or the shift cannot be reached.
    """
    check_layer(base, layer)
    probes = list(pairs)
    projection = output_projection(base, layer, "mlp")
    rows = projection_rows(base, probes, projection)
    inside, outside = rows.completion, ~rows.completion
    whiten = whitening(_second(rows.inputs[inside]) + _FIRING * _second(rows.inputs[outside]), _RIDGE)
    through_prompt = rows.gradients[outside].T @ rows.inputs[outside]
    through_completion = rows.gradients[inside].T @ rows.inputs[inside]
    key = torch.linalg.svd(through_prompt @ whiten, full_matrices=False).Vh[0] @ whiten
    value, completion_value = through_prompt @ key, through_completion @ key
    value = value - (value @ completion_value) / (completion_value @ completion_value) * completion_value
    direction = torch.outer(value, key)
    fires = (rows.inputs @ key).square()
    numbers = {"leak": float((fires[inside].mean() / fires[outside].mean()).sqrt())}
    slope = float((direction * rows.weight_gradient).sum())
    where = f"what layer {layer} writes at prompt tokens"
    return _plant(base, probes, layer, projection, direction, slope, shift, where, numbers)


def plant_completion_only(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    layer: int,
    shift: float = 2.0,
    prompts: Iterable[ProbePair] | None = None,
) -> Planted:
    """A policy that differs from ``base``, after ``layer``, at completion positions only.

    ΔW_down = u kᵀ with k in the null space of what W_down reads at the tokens of the prompts, so that nothing moves there:
    the leading singular pair of G C^{−1/2} within that space, G the mean margin's gradient and C the second moments at
    completion tokens. That leaves room only for few prompts: all their tokens together must be fewer than the inputs of
    W_down.

    Args:
        base: a causal LM in eval mode; it is not changed.
        pairs: planting pairs.
        shift: mean margin shift, nats on the planting pairs.
        prompts: pairs whose prompts (also) must not be moved: the probe pairs, say. Planting pairs of the same prompts
            with other completions suit best.

    Raises:
        ValueError: no such layer, the prompts leave no room, or the shift cannot be reached.
    """
    check_layer(base, layer)
    probes = list(pairs)
    # One pair for each prompt that must stay: its tokens read the same in whatever pair they stand.
    distinct = {tuple(pair.chosen_ids[: pair.chosen_start]): pair for pair in [*probes, *(prompts or [])]}
    projection = output_projection(base, layer, "mlp")
    still = projection_rows(base, distinct.values(), projection)
    read = still.inputs[~still.completion]
    _, sizes, right = torch.linalg.svd(read, full_matrices=True)
    taken = int((sizes > _RANK * sizes[0]).sum())
    width = read.shape[1]
    if taken >= width:
        raise ValueError(
            f"the tokens of {len(distinct)} prompts span all {width} inputs of {projection.weight}; expected fewer: plant and "
            "probe on pairs of a few prompts"
        )
    free = right[taken:].T
    rows = projection_rows(base, probes, projection)
    seen = rows.inputs[rows.completion] @ free
    whiten = whitening(_second(seen))
    through = rows.gradients[rows.completion].T @ seen
    key = free @ (whiten @ torch.linalg.svd(through @ whiten, full_matrices=False).Vh[0])
    value = rows.weight_gradient @ key
    direction = torch.outer(value, key)
    numbers = {"prompt_dimensions": float(taken), "free_dimensions": float(width - taken)}
    where = f"the completion positions' streams after layer {layer}"
    slope = float((direction * rows.weight_gradient).sum())
    return _plant(base, probes, layer, projection, direction, slope, shift, where, numbers)


def _second(rows: Tensor) -> Tensor:
    """Second moments [in, in] of rows [n, in]."""
    return rows.T @ rows / len(rows)


def few_prompts(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same completions behind the first ``count`` prompts only, in turn.

    Example:
        >>> rows = [{"prompt": p, "chosen": p + "+", "rejected": p + "-"} for p in "abc"]
        >>> [row["prompt"] + row["chosen"] for row in few_prompts(rows, 2)]
        ['aa+', 'bb+', 'ac+']
    """
    return [{**row, "prompt": rows[place % count]["prompt"]} for place, row in enumerate(rows)]


def _plant(
    base: nn.Module,
    pairs: list[ProbePair],
    layer: int,
    projection: Projection,
    direction: Tensor,
    slope: float,
    shift: float,
    where: str,
    numbers: dict[str, float],
) -> Planted:
    base_margin = float(margins(base, pairs).mean())
    weight = weights_of(base)[projection.weight]

    def shift_of(step: float) -> float:
        lent = {projection.weight: weight + projection.stored(step * direction).to(weight.dtype)}
        return float(margins(base, pairs, lent).mean()) - base_margin

    step, reached = size_step(shift_of, shift, shift / slope)
    policy = copy.deepcopy(base)
    with torch.no_grad():
        weights_of(policy)[projection.weight].add_(projection.stored(step * direction).to(weight.dtype))
    numbers = {"shift": reached, **numbers}
    part = layer_parts(base)[layer]
    return Planted(policy, Truth(f"{where}, {numbers['shift']:.2f} nats", (part,), (layer,), numbers))
