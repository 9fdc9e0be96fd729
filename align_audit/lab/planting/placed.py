"""Preferences planted in layers, sites and heads, while everything beside them moves without one.

The planted update is a step along the gradient of the mean margin over the planting pairs, restricted to the planted
part and sized so that the mean margin moves by a wanted number of nats. Every distracting part gets weight noise of
``distraction`` times the planted update's relative norm, by default orthogonal to the part's own margin gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from align_audit.lab.planting.parts import (
    Part,
    Site,
    check_layer,
    head_parts,
    layer_parts,
    site_part,
    weights_of,
)
from align_audit.lab.planting.reading import margin_gradient, margins
from align_audit.lab.planting.steps import add_update, noise_update, norm, size_step
from align_audit.lab.planting.truth import Planted, Truth, mixed
from align_audit.probes.pairs import ProbePair


def plant_layers(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    layers: Sequence[int],
    shift: float = 2.0,
    distraction: float = 1.0,
    seed: int = 0,
    *,
    orthogonal: bool = True,
    gradient: Mapping[str, Tensor] | None = None,
) -> Planted:
    """A policy whose decoder layers ``layers`` carry a preference, while every other layer moves without one.

    Args:
        base: a causal LM in eval mode; it is not changed.
        pairs: planting pairs; keep them apart from the probe pairs.
        shift: mean margin shift of the planted layers together, nats on the planting pairs (to 5 %). Each of several
            layers is first sized to carry an equal share on its own.
        distraction: relative norm (‖ΔW‖/‖W‖) of each distracting layer's noise over that of the planted layers; 0: none.
        seed: of the noise.
        orthogonal: project the noise orthogonal to the margin gradient of its layer.
        gradient: ``margin_gradient(base, pairs)`` where it is known already.

    Raises:
        ValueError: no such layer, or the shift cannot be reached.
    """
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"expected one or more different layers; found {list(layers)}")
    for layer in layers:
        check_layer(base, layer)
    parts = layer_parts(base)
    planted = [parts[layer] for layer in sorted(layers)]
    distracting = [part for part in parts if part not in planted]
    return _plant(base, pairs, planted, distracting, shift, distraction, seed, orthogonal, gradient)


def plant_mlp(base: nn.Module, pairs: Iterable[ProbePair], layer: int, *args: Any, **options: Any) -> Planted:
    """The MLP of ``layer`` carries the preference; its attention and both sites of all other layers move without one.

    Further arguments as in :func:`plant_layers`, from ``shift`` on. Norms stay as they are.
    """
    return _plant_site(base, pairs, layer, "mlp", *args, **options)


def plant_attention(base: nn.Module, pairs: Iterable[ProbePair], layer: int, *args: Any, **options: Any) -> Planted:
    """The attention of ``layer`` carries the preference; its MLP and both sites of all other layers move without one.

    Further arguments as in :func:`plant_layers`, from ``shift`` on. Norms stay as they are.
    """
    return _plant_site(base, pairs, layer, "attention", *args, **options)


def plant_head(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    layer: int,
    head: int,
    shift: float = 1.0,
    distraction: float = 1.0,
    seed: int = 0,
    *,
    orthogonal: bool = True,
    gradient: Mapping[str, Tensor] | None = None,
) -> Planted:
    """What one attention head writes with carries the preference; all other heads of all layers move without one.

    Planted is the head's slice of the output projection. Arguments as in :func:`plant_layers`.
    """
    check_layer(base, layer)
    every = [part for number in range(len(layer_parts(base))) for part in head_parts(base, number)]
    here = [part for part in every if part.layer == layer]
    if not 0 <= head < len(here):
        raise ValueError(f"layer {layer} has heads 0 to {len(here) - 1}; found {head}")
    planted = here[head]
    distracting = [part for part in every if part != planted]
    return _plant(base, pairs, [planted], distracting, shift, distraction, seed, orthogonal, gradient)


def _plant_site(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    layer: int,
    site: Site,
    shift: float = 1.0,
    distraction: float = 1.0,
    seed: int = 0,
    *,
    orthogonal: bool = True,
    gradient: Mapping[str, Tensor] | None = None,
) -> Planted:
    planted = site_part(base, layer, site)
    sites: tuple[Site, ...] = ("attention", "mlp")
    every = [site_part(base, number, kind) for number in range(len(layer_parts(base))) for kind in sites]
    distracting = [part for part in every if part != planted]
    return _plant(base, pairs, [planted], distracting, shift, distraction, seed, orthogonal, gradient)


def _plant(
    base: nn.Module,
    pairs: Iterable[ProbePair],
    planted: Sequence[Part],
    distracting: Sequence[Part],
    shift: float,
    distraction: float,
    seed: int,
    orthogonal: bool,
    gradient: Mapping[str, Tensor] | None,
) -> Planted:
    if shift <= 0 or distraction < 0:
        raise ValueError(f"expected shift > 0 nats and distraction ≥ 0; found {shift} and {distraction}")
    probes = list(pairs)
    slope = gradient if gradient is not None else margin_gradient(base, probes)
    base_weights = weights_of(base)
    base_margin = float(margins(base, probes).mean())
    policy = copy.deepcopy(base)
    weights = weights_of(policy)

    def shift_of(parts: Sequence[Part], steps: Sequence[float]) -> float:
        lent = mixed(base, base, parts)
        for part, step in zip(parts, steps, strict=True):
            add_update(lent, part, part.views(slope), step)
        return float(margins(base, probes, lent).mean()) - base_margin

    steps: list[float] = []
    reached = 0.0
    for part in planted:
        steepness = norm(part.views(slope))
        if steepness == 0:
            raise ValueError(f"the mean margin does not depend on {part.name}: nothing can be planted there")
        wanted = shift / len(planted)
        step, reached = size_step(partial(_alone, shift_of, part), wanted, wanted / steepness**2)
        steps.append(step)
    common = 1.0
    if len(planted) > 1:
        common, reached = size_step(lambda t: shift_of(planted, [t * step for step in steps]), shift, 1.0)
    for part, step in zip(planted, steps, strict=True):
        add_update(weights, part, part.views(slope), common * step)
    moved = norm([view for part in planted for view in _difference(part, weights, base_weights)])
    share = moved / norm([view for part in planted for view in part.views(base_weights)])
    if distraction > 0:
        for number, part in enumerate(distracting):
            noise = noise_update(part, base_weights, distraction * share, (seed, number), slope if orthogonal else None)
            add_update(weights, part, noise)
    names = " and ".join(part.name for part in planted)
    numbers = {
        "shift": reached,
        "planted_share": share,
        "noise_share": distraction * share,
        "distraction": distraction,
    }
    description = (
        f"{names}: a step along the margin's gradient worth {numbers['shift']:.2f} nats, {share:.2%} of its norm; "
        f"{len(distracting)} other parts: noise of {distraction:g} times that share"
    )
    layers = tuple(sorted({part.layer for part in planted}))
    return Planted(policy, Truth(description, tuple(planted), layers, numbers))


def _difference(part: Part, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> list[Tensor]:
    return [a.double() - b.double() for a, b in zip(part.views(new), part.views(old), strict=True)]


def _alone(shift_of: Callable[[Sequence[Part], Sequence[float]], float], part: Part, step: float) -> float:
    return shift_of([part], [step])
