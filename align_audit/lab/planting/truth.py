"""What is true of a planted policy, measured without the audit: what its parts do to the margin when put back.

*Necessity* of a part: the mean margin the policy loses when the part's weights (only) are the base's again.
*Sufficiency*: the mean margin the base gains when the part's weights (only) are the policy's. Nats, over all pairs given;
both are plain forwards of whole models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align_audit.lab.planting.parts import Part, anatomy_of, layer_parts, weights_of
from align_audit.lab.planting.reading import logits_of, margins, padded_rows
from align_audit.models.anatomy import unwrap
from align_audit.probes.pairs import ProbePair


@dataclass(frozen=True)
class Truth:
    """What was planted.

    Attributes:
        description: in words.
        units: the parts that carry the preference; none where nothing was learned.
        layers: the layers they are in, ascending.
        numbers: measured while planting, by name; ``shift`` is the mean margin shift of the planted part alone on the
            planting pairs, in nats.
    """

    description: str
    units: tuple[Part, ...]
    layers: tuple[int, ...]
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Planted:
    """A policy and its truth; the base it was made of is as it was."""

    policy: nn.Module
    truth: Truth


@dataclass(frozen=True)
class Restored:
    """What parts do to the mean margin, nats (see the module)."""

    necessity: float
    sufficiency: float


@dataclass(frozen=True)
class MeasuredTruth:
    """What restoring does, on given pairs.

    Attributes:
        shift: mean margin of the policy minus that of the base, nats.
        planted: restoring all of S at once.
        layers: restoring each decoder layer, L of them.
    """

    shift: float
    planted: Restored
    layers: list[Restored]
    planted_layers: tuple[int, ...]

    @property
    def effect_ratio(self) -> float:
        """|necessity of S| over the largest |necessity| of any layer outside; infinite where those do nothing."""
        outside = [
            abs(restored.necessity) for layer, restored in enumerate(self.layers) if layer not in self.planted_layers
        ]
        largest = max(outside, default=0.0)
        return abs(self.planted.necessity) / largest if largest > 0 else float("inf")


def mixed(onto: nn.Module, source: nn.Module, units: Sequence[Part]) -> dict[str, Tensor]:
    """The weights of ``onto`` that differ when ``units`` are taken from ``source``; neither model is changed."""
    onto_weights, source_weights = weights_of(onto), weights_of(source)
    lent: dict[str, Tensor] = {}
    for unit in units:
        for name, index in unit.slices:
            weight = lent.setdefault(name, onto_weights[name].clone())
            weight[index] = source_weights[name][index]
    return lent


def restored(policy: nn.Module, base: nn.Module, units: Sequence[Part], probes: Iterable[ProbePair]) -> Restored:
    """Necessity and sufficiency of ``units`` together."""
    pairs = list(probes)
    return _restored(
        policy, base, units, pairs, float(margins(policy, pairs).mean()), float(margins(base, pairs).mean())
    )


def measure_truth(
    planted: Planted, base: nn.Module, probes: Iterable[ProbePair], *, sufficiency: bool = True
) -> MeasuredTruth:
    """Necessity and sufficiency of the planted parts and of every decoder layer: 2L + 4 forwards of all pairs at most.

    ``sufficiency=False`` leaves it NaN, for half the time.
    """
    pairs = list(probes)
    policy, truth = planted.policy, planted.truth
    new, old = float(margins(policy, pairs).mean()), float(margins(base, pairs).mean())
    parts = layer_parts(base)
    layers = [_restored(policy, base, [part], pairs, new, old, sufficiency) for part in parts]
    if not truth.units:
        together = Restored(0.0, 0.0)
    elif len(truth.units) == 1 and truth.units[0] in parts:
        together = layers[truth.units[0].layer]
    else:
        together = _restored(policy, base, truth.units, pairs, new, old, sufficiency)
    return MeasuredTruth(new - old, together, layers, truth.layers)


def _restored(
    policy: nn.Module,
    base: nn.Module,
    units: Sequence[Part],
    pairs: list[ProbePair],
    new: float,
    old: float,
    sufficiency: bool = True,
) -> Restored:
    without = float(margins(policy, pairs, mixed(policy, base, units)).mean())
    alone = float(margins(base, pairs, mixed(base, policy, units)).mean()) if sufficiency else math.nan
    return Restored(necessity=new - without, sufficiency=alone - old)


@torch.no_grad()
def patched_shift(
    policy: nn.Module,
    base: nn.Module,
    layer: int,
    probes: Iterable[ProbePair],
    positions: Literal["all", "prompt", "completion"] = "all",
) -> float:
    """Mean margin change, nats, of the base when h_layer is the policy's at those positions: a hook swaps the tensor."""
    pairs = list(probes)
    anatomy = anatomy_of(base)
    source, target = anatomy.modules(unwrap(policy))[layer], anatomy.modules(unwrap(base))[layer]
    total = 0.0
    for rows in padded_rows(pairs, next(base.parameters()).device):
        where = rows.valid
        if positions != "all":
            where = where & (rows.completion if positions == "completion" else ~rows.completion)
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append(anatomy.stream(output))

        def swap(module: Any, args: Any, output: Any, kept: list[Tensor] = kept, where: Tensor = where) -> Any:
            return anatomy.wrap(output, torch.where(where[..., None], kept[0], anatomy.stream(output)))

        old = rows.margins(logits_of(base, rows), len(pairs))
        for model, module, hook in ((policy, source, keep), (base, target, swap)):
            handle = module.register_forward_hook(hook)
            try:
                new = rows.margins(logits_of(model, rows), len(pairs))
            finally:
                handle.remove()
        total += float((new - old).sum())
    return total / len(pairs)
