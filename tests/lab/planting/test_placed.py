"""Planted layers, sites and heads: only they carry a margin shift, everything beside them moves as much as it should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.lab.planting import (
    Planted,
    margin_gradient,
    margins,
    measure_truth,
    plant_attention,
    plant_head,
    plant_layers,
    plant_mlp,
    restored,
)
from align_audit.lab.planting.parts import layer_parts
from align_audit.lab.planting.steps import size_step
from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle


def changed(policy: Any, base: Any) -> dict[str, torch.Tensor]:
    """Update of every parameter that moved."""
    old = dict(base.named_parameters())
    moved = {name: (new - old[name]).detach() for name, new in policy.named_parameters()}
    return {name: update for name, update in moved.items() if update.any()}


def relative_norm(names: Callable[[str], bool], policy: Any, base: Any) -> float:
    old = {name: value.detach() for name, value in base.named_parameters() if names(name)}
    update = changed(policy, base)
    return float(
        np.sqrt(sum(float(update[name].square().sum()) for name in old if name in update))
        / np.sqrt(sum(float(value.square().sum()) for value in old.values()))
    )


def mean_shift(policy: Any, base: Any, pairs: ProbeSet) -> float:
    """By single forwards."""
    return float((oracle.margins(policy, pairs.pairs)[0] - oracle.margins(base, pairs.pairs)[0]).mean())


def test_without_distraction_only_the_layer_moves_and_by_what_was_wanted(base: Any, planting: ProbeSet) -> None:
    planted = plant_layers(base, planting, [3], shift=1.5, distraction=0)
    assert {name.split(".")[2] for name in changed(planted.policy, base)} == {"3"}
    shift = mean_shift(planted.policy, base, planting)
    assert shift == pytest.approx(1.5, rel=0.05)
    assert planted.truth.numbers["shift"] == pytest.approx(shift, abs=1e-5)
    assert planted.truth.layers == (3,)
    assert [unit.name for unit in planted.truth.units] == ["layer 3"]


def test_two_layers_share_the_shift(base: Any, planting: ProbeSet) -> None:
    planted = plant_layers(base, planting, [4, 1], shift=2.0, distraction=0)
    assert {name.split(".")[2] for name in changed(planted.policy, base)} == {"1", "4"}
    assert mean_shift(planted.policy, base, planting) == pytest.approx(2.0, rel=0.05)
    for layer in (1, 4):
        alone = copy.deepcopy(base)
        alone.model.layers[layer].load_state_dict(planted.policy.model.layers[layer].state_dict())
        assert mean_shift(alone, base, planting) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("distraction", [1.0, 4.0])
def test_every_other_layer_moves_as_much_and_prefers_nothing(base: Any, planting: ProbeSet, distraction: float) -> None:
    planted = plant_layers(base, planting, [2], shift=1.0, distraction=distraction, seed=5)
    shares = [
        relative_norm(lambda name, layer=layer: name.startswith(f"model.layers.{layer}."), planted.policy, base)
        for layer in range(6)
    ]
    assert planted.truth.numbers["planted_share"] == pytest.approx(shares[2], rel=1e-9)
    np.testing.assert_allclose([s for layer, s in enumerate(shares) if layer != 2], distraction * shares[2], rtol=1e-9)
    gradient, update = margin_gradient(base, planting), changed(planted.policy, base)
    for layer in range(6):
        names = [name for name in update if name.startswith(f"model.layers.{layer}.")]
        along = sum(float((update[name] * gradient[name]).sum()) for name in names)
        size = sum(float(update[name].square().sum()) for name in names) ** 0.5
        steepness = sum(float(gradient[name].square().sum()) for name in names) ** 0.5
        cosine = along / (size * steepness)
        assert cosine == pytest.approx(1.0 if layer == 2 else 0.0, abs=1e-9)
    outside = {name for name in update if not name.startswith("model.layers.")}
    assert not outside


def test_noise_as_it_falls_is_not_quite_orthogonal(base: Any, planting: ProbeSet) -> None:
    planted = plant_layers(base, planting, [2], shift=1.0, distraction=1.0, orthogonal=False)
    gradient, update = margin_gradient(base, planting), changed(planted.policy, base)
    names = [name for name in update if name.startswith("model.layers.4.")]
    assert abs(sum(float((update[name] * gradient[name]).sum()) for name in names)) > 1e-6


def test_the_truth_is_what_swapping_modules_gives(base: Any, planting: ProbeSet, probes: ProbeSet) -> None:
    planted = plant_layers(base, planting, [1], shift=1.5, distraction=6.0)
    policy: Any = planted.policy
    truth = measure_truth(planted, base, probes)
    assert truth.shift == pytest.approx(mean_shift(policy, base, probes), abs=1e-5)
    for layer in range(6):
        without, alone = copy.deepcopy(policy), copy.deepcopy(base)
        without.model.layers[layer].load_state_dict(base.model.layers[layer].state_dict())
        alone.model.layers[layer].load_state_dict(policy.model.layers[layer].state_dict())
        found = truth.layers[layer]
        assert found.necessity == pytest.approx(mean_shift(policy, without, probes), abs=1e-5)
        assert found.sufficiency == pytest.approx(mean_shift(alone, base, probes), abs=1e-5)
    others = [abs(one.necessity) for layer, one in enumerate(truth.layers) if layer != 1]
    assert truth.planted == truth.layers[1]
    assert truth.effect_ratio == pytest.approx(abs(truth.layers[1].necessity) / max(others))
    every = restored(policy, base, layer_parts(base), probes)
    assert every.necessity == every.sufficiency == pytest.approx(truth.shift, abs=1e-9)


Plant = Callable[..., Planted]


@pytest.mark.parametrize(
    ("plant", "place", "mine"),
    [
        (plant_mlp, (3,), "model.layers.3.mlp."),
        (plant_attention, (3,), "model.layers.3.self_attn."),
        (plant_head, (3, 4), "model.layers.3.self_attn.o_proj."),
    ],
)
def test_sites_and_heads(base: Any, planting: ProbeSet, plant: Plant, place: tuple[int, ...], mine: str) -> None:
    planted = plant(base, planting, *place, shift=0.5, distraction=2.0, seed=1)
    (unit,) = planted.truth.units
    update = changed(planted.policy, base)
    if plant is plant_head:
        assert {name.split(".", 3)[3] for name in update} == {"self_attn.o_proj.weight"}
        size = 96 // 6
        shares = {
            (layer, head): float(
                update[name][:, head * size : (head + 1) * size].norm()
                / base.get_parameter(name).detach()[:, head * size : (head + 1) * size].norm()
            )
            for layer in range(6)
            for name in [f"model.layers.{layer}.self_attn.o_proj.weight"]
            for head in range(6)
        }
        own = shares.pop((3, 4))
        assert len(shares) == 35
    else:
        assert not [name for name in update if "norm" in name], "norms belong to neither site"
        sites = [f"model.layers.{layer}.{site}." for layer in range(6) for site in ("self_attn", "mlp")]
        found = {site: relative_norm(lambda n, s=site: n.startswith(s), planted.policy, base) for site in sites}
        own = found.pop(mine)
        shares = found
    np.testing.assert_allclose(list(shares.values()), 2.0 * own, rtol=1e-9)
    assert all(name.startswith(mine) for name, _ in unit.slices)
    alone = restored(planted.policy, base, [unit], planting)
    assert alone.sufficiency == pytest.approx(0.5, rel=0.05)
    assert alone.necessity == pytest.approx(0.5, rel=0.2)


def test_the_seed_says_it_all(base: Any, planting: ProbeSet) -> None:
    state = torch.get_rng_state()
    gradient = margin_gradient(base, planting)
    one, same, other = (
        plant_layers(base, planting, [2], 1.0, 2.0, seed, gradient=gradient).policy.state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("model.layers.2."))


def test_what_cannot_be_planted_is_refused(base: Any, planting: ProbeSet) -> None:
    with pytest.raises(ValueError, match="layer from 0 to 5; found 6"):
        plant_layers(base, planting, [6])
    with pytest.raises(ValueError, match="different layers; found \\[2, 2\\]"):
        plant_layers(base, planting, [2, 2])
    with pytest.raises(ValueError, match="layer 2 has heads 0 to 5; found 6"):
        plant_head(base, planting, 2, 6)
    with pytest.raises(ValueError, match="shift > 0"):
        plant_layers(base, planting, [2], shift=-1.0)


def test_steps_are_sized_or_refused() -> None:
    step, found = size_step(lambda t: t - 0.1 * t**2, wanted=2.0, first=1.0, tolerance=0.01)
    assert found == pytest.approx(2.0, rel=0.01)
    assert step - 0.1 * step**2 == found
    with pytest.raises(ValueError, match="no step along this direction shifts the mean margin by 3 nats"):
        size_step(lambda t: t - 0.1 * t**2, wanted=3.0, first=1.0)


def test_margins_of_the_policy_are_its_own(base: Any, planting: ProbeSet, probes: ProbeSet) -> None:
    policy = plant_layers(base, planting, [5], 1.0, 0.0).policy
    expected, *_ = oracle.margins(policy, probes.pairs)
    np.testing.assert_allclose(margins(policy, probes).numpy(), expected, rtol=0, atol=1e-5)
