"""Null models: their weights and activations moved, and no preference was learned."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from align_audit.lab.planting.parts import layer_parts, weights_of
from align_audit.lab.planting.reading import margin_gradient, margins, padded_rows
from align_audit.lab.planting.steps import add_update, noise_update, relative_updates
from align_audit.lab.planting.training import train_dpo
from align_audit.lab.planting.truth import Planted, Truth
from align_audit.models.anatomy import unwrap
from align_audit.probes.pairs import ProbePair

Kind = Literal["weight_noise", "orthogonal_noise", "shuffled_labels", "language_modelling"]


def plant_nothing(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    kind: Kind,
    size: float = 0.01,
    seed: int = 0,
    *,
    steps: int = 8,
    learning_rate: float = 1e-4,
    tokenizer: Any = None,
    rows: Sequence[dict[str, Any]] | None = None,
) -> Planted:
    """A policy that learned no preference.

    ``weight_noise``: every layer moves at random by ``size`` of its norm. ``orthogonal_noise``: the same, projected
    orthogonal to each layer's gradient of the mean margin, so that activations shift and to first order the mean margin
    does not. ``shuffled_labels``: DPO (``train_dpo`` in all layers) on ``rows`` whose chosen and rejected are swapped at
    random, exactly half of them. ``language_modelling``: next-token training on both completions of each pair.

    Args:
        base: a causal LM in eval mode; it is not changed.
        pairs: planting pairs: the margin's gradient, or the texts.
        size: of the noise, as a share of each layer's norm.
        steps, learning_rate: of the kinds that train, by AdamW.
        tokenizer, rows: for ``shuffled_labels``.

    Returns:
        ``truth.units`` is empty; ``truth.numbers`` has the mean margin ``shift`` on the planting pairs, nats, and the least
        and largest relative norm of a layer's update.

    Raises:
        ValueError: an unknown kind, or ``shuffled_labels`` without rows and tokenizer.
    """
    probes = list(pairs)
    if kind in ("weight_noise", "orthogonal_noise"):
        gradient = margin_gradient(base, probes) if kind == "orthogonal_noise" else None
        policy = _noisy(base, size, seed, gradient)
        description = f"{kind}: every layer moved by {size:.2%} of its norm"
    elif kind == "shuffled_labels":
        if rows is None or tokenizer is None:
            raise ValueError("shuffled_labels trains with TRL: expected rows and their tokenizer, found neither or one")
        every = list(range(len(layer_parts(base))))
        policy = train_dpo(
            base, tokenizer, swap_half(rows, seed), every, steps=steps, learning_rate=learning_rate, seed=seed
        ).policy
        description = f"{steps} steps of DPO on pairs with half of the labels swapped at random"
    elif kind == "language_modelling":
        policy = _continue_pretraining(base, probes, steps, learning_rate, seed)
        description = f"{steps} steps of next-token training on both completions"
    else:
        raise ValueError(f"expected one of {', '.join(get_args(Kind))}; found {kind!r}")
    shares = relative_updates(layer_parts(base), weights_of(policy), weights_of(base))
    shift = float((margins(policy, probes) - margins(base, probes)).mean())
    numbers = {"shift": shift, "least_share": min(shares), "largest_share": max(shares)}
    return Planted(policy, Truth(description, (), (), numbers))


def swap_half(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows with chosen and rejected swapped in ⌊n/2⌋ of them, drawn at random: nothing is preferred on average."""
    swapped = set(random.Random(seed).sample(range(len(rows)), len(rows) // 2))
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if place in swapped else dict(row)
        for place, row in enumerate(rows)
    ]


def _noisy(base: nn.Module, size: float, seed: int, gradient: Mapping[str, Tensor] | None) -> nn.Module:
    """A policy of which every layer moved at random by ``size`` of its norm, orthogonal to the layer's ``gradient`` if any."""
    policy = copy.deepcopy(base)
    weights, base_weights = weights_of(policy), weights_of(base)
    for number, part in enumerate(layer_parts(base)):
        add_update(weights, part, noise_update(part, base_weights, size, (seed, number), gradient))
    return policy


def _continue_pretraining(
    base: nn.Module, pairs: list[ProbePair], steps: int, learning_rate: float, seed: int, batch: int = 8
) -> nn.Module:
    policy = copy.deepcopy(base)
    device = next(base.parameters()).device
    trained = {name for part in layer_parts(base) for name, _ in part.slices}
    parameters = [parameter for name, parameter in unwrap(policy).named_parameters() if name in trained]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    draw = random.Random(seed)
    for _ in range(steps):
        texts = draw.sample(pairs, min(batch, len(pairs)))
        (rows,) = padded_rows(texts, device, tokens=2**62)
        with torch.enable_grad():
            logits = unwrap(policy)(**rows.model_inputs()).logits
            logp = logits[:, :-1].log_softmax(-1).gather(-1, rows.ids[:, 1:, None])[..., 0]
            loss = -logp[rows.completion[:, 1:]].mean()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return policy
