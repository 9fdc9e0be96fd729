"""Margins of a model and of weights put into it, and their gradients, by plain forwards: nothing here is the audit's.

Nothing changes the model: other weights are lent to a call (``torch.func.functional_call``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from align_audit.lab.planting.parts import Projection, weights_of
from align_audit.models.anatomy import unwrap
from align_audit.probes.pairs import ProbePair

_TOKENS = 4096
"""Padded tokens in one forward, at most (one pair, at least)."""


@dataclass(frozen=True)
class Rows:
    """R right-padded sequences of T tokens, chosen and rejected ones.

    Attributes:
        ids, valid, completion: [R, T]; False is padding, and prompt or padding.
        pair: [R] which pair each belongs to.
        sign: [R] +1 chosen, −1 rejected.
    """

    ids: Tensor
    valid: Tensor
    completion: Tensor
    pair: Tensor
    sign: Tensor

    def model_inputs(self) -> dict[str, Any]:
        """What a causal LM is called with. The padding stands behind every token, so none sees it and it is not masked: a
        short window masked as well would leave padding with nothing to attend to, which is NaN."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "use_cache": False}

    def margins(self, logits: Tensor, count: int) -> Tensor:
        """m of this batch's pairs, nats, float64 [count], from logits [R, T, V]; 0 for pairs of other batches."""
        wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
        logp = wide.log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0].double()
        signed = self.sign * (logp * self.completion[:, 1:]).sum(1)
        return torch.zeros(count, dtype=torch.float64, device=logits.device).index_add(0, self.pair, signed)


def padded_rows(pairs: Iterable[ProbePair], device: torch.device | str = "cpu", tokens: int = _TOKENS) -> list[Rows]:
    """Both sequences of every pair, in batches of about ``tokens`` padded tokens; a pair is never split."""
    probes = list(pairs)
    order = sorted(
        range(len(probes)), key=lambda place: max(len(probes[place].chosen_ids), len(probes[place].rejected_ids))
    )
    groups: list[list[int]] = []
    for place in order:
        longest = max(len(probes[place].chosen_ids), len(probes[place].rejected_ids))
        if groups and 2 * (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    batches = []
    for group in groups:
        sides = [
            (ids, start, place, sign)
            for sign in (1.0, -1.0)
            for place in group
            for ids, start in [
                (probes[place].chosen_ids, probes[place].chosen_start)
                if sign > 0
                else (probes[place].rejected_ids, probes[place].rejected_start)
            ]
        ]
        longest = max(len(ids) for ids, *_ in sides)
        where = torch.arange(longest)
        lengths = torch.tensor([len(ids) for ids, *_ in sides])
        starts = torch.tensor([start for _, start, _, _ in sides])
        valid = where < lengths[:, None]
        rows = Rows(
            ids=torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids, *_ in sides]),
            valid=valid,
            completion=valid & (where >= starts[:, None]),
            pair=torch.tensor([place for _, _, place, _ in sides]),
            sign=torch.tensor([sign for *_, sign in sides], dtype=torch.float64),
        )
        batches.append(Rows(**{name: getattr(rows, name).to(device) for name in Rows.__dataclass_fields__}))
    return batches


def logits_of(model: nn.Module, rows: Rows, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Next-token logits [R, T, V] of the model, with ``weights`` in place of its own of those names."""
    inputs = rows.model_inputs()
    logits: Tensor = functional_call(unwrap(model), dict(weights or {}), args=(), kwargs=inputs).logits
    return logits


@torch.no_grad()
def margins(model: nn.Module, pairs: Iterable[ProbePair], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """m = log p(chosen) − log p(rejected) of each pair, nats, float64 [N]; ``weights`` as in :func:`logits_of`."""
    probes = list(pairs)
    _check_mode(model)
    total = torch.zeros(len(probes), dtype=torch.float64, device=_device(model))
    for rows in padded_rows(probes, _device(model)):
        total += rows.margins(logits_of(model, rows, weights), len(probes))
    return total


def margin_gradient(model: nn.Module, pairs: Iterable[ProbePair]) -> dict[str, Tensor]:
    """∂ (mean margin) / ∂ each parameter, by its name; no ``.grad`` is written. Parameters without a part in it are 0."""
    probes = list(pairs)
    _check_mode(model)
    weights = {name: weight.clone().requires_grad_() for name, weight in weights_of(model).items()}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for rows in padded_rows(probes, _device(model)):
        with torch.enable_grad():
            mean = rows.margins(logits_of(model, rows, weights), len(probes)).sum() / len(probes)
        gradients = torch.autograd.grad(mean, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


@dataclass(frozen=True)
class ProjectionRows:
    """What a projection reads at n tokens and what the mean margin gains there; float64.

    Attributes:
        inputs: [n, in].
        gradients: [n, out] ∂ (mean margin) / ∂ output.
        first: [n] the first token of its sequence.
        completion: [n] a completion token.
    """

    inputs: Tensor
    gradients: Tensor
    first: Tensor
    completion: Tensor

    @property
    def weight_gradient(self) -> Tensor:
        """G = ∂ (mean margin) / ∂ weight, [out, in]."""
        return self.gradients.T @ self.inputs


def projection_rows(model: nn.Module, pairs: Iterable[ProbePair], projection: Projection) -> ProjectionRows:
    """One forward and backward over all tokens of both sequences of every pair, padding left out."""
    probes = list(pairs)
    _check_mode(model)
    pieces: list[tuple[Tensor, ...]] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: Any, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append((args[0].detach(), leaf))
        return leaf

    frozen = {name: weight.clone() for name, weight in weights_of(model).items()}
    for rows in padded_rows(probes, _device(model)):
        handle = projection.module.register_forward_hook(watch)
        try:
            with torch.enable_grad():
                mean = rows.margins(logits_of(model, rows, frozen), len(probes)).sum() / len(probes)
        finally:
            handle.remove()
        inputs, leaf = seen.pop()
        (gradient,) = torch.autograd.grad(mean, leaf)
        first = torch.zeros_like(rows.valid)
        first[:, 0] = True
        pieces.append(
            (
                inputs[rows.valid].double(),
                gradient[rows.valid].double(),
                first[rows.valid],
                rows.completion[rows.valid],
            )
        )
    return ProjectionRows(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def _device(model: nn.Module) -> torch.device:
    plain: Any = unwrap(model)
    device: torch.device = plain.get_input_embeddings().weight.device
    return device


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in train mode, where its margins may be random; call .eval() first"
        )
