"""Patching of finer sites against plain full forwards with ordinary hooks, one sequence at a time (METHODS §1, §7)."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.probes.pairs import ProbePair, ProbeSet
from tests.auditing.measurements.hooked_sites import SITES, audit, config, logp, run
from tests.helpers.tiny import DEVICE, VOCABULARY, perturbed, random_pairs
from tests.models.test_families import build

pytestmark = pytest.mark.device


# -- the oracle: shares nothing with align_audit ----------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Where a family keeps what its attention and MLP add to the stream, and its attention's output projection."""

    layers: str
    attention: str
    mlp: str
    projection: str
    heads: int = 4


WHERE = {
    "llama": Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj"),
    "gemma2": Parts(
        "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj"
    ),
    "gpt2": Parts("transformer.h", "attn", "mlp", "attn.c_proj"),
    "gpt_neox": Parts("gpt_neox.layers", "attention", "mlp", "attention.dense"),  # both read the same stream
    "mamba": Parts("backbone.layers", "", "", "", 0),
}  # fmt: skip


Unit = tuple[int, int, int | None]


def where_patched(ids: Any, start: int, positions: str) -> torch.Tensor:
    place = torch.arange(len(ids), device=DEVICE)
    return {"all": place >= 0, "prompt": place < start, "completion": place >= start}.get(positions, place == start - 1)


@functools.cache
def own_logp(model: nn.Module, ids: Any, start: int) -> float:
    return logp(run(model, ids, {}), ids, start)


@functools.cache
def tensor_at(model: nn.Module, parts: Parts, site: str, unit: Unit, ids: Any) -> torch.Tensor:
    """What stands at a site in the model's own run, [1, T, d]; a head's part from the projection's own weights."""
    layer = model.get_submodule(parts.layers)[unit[0]]
    seen: list[torch.Tensor] = []
    if site == "head":
        projection = layer.get_submodule(parts.projection)
        # GPT-2 keeps its matrices the other way round.
        matrix = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
        width = matrix.shape[1] // parts.heads
        own = slice(unit[2] * width, (unit[2] + 1) * width)
        run(model, ids, {projection: lambda args, _: seen.append(args[0][..., own] @ matrix[:, own].T)})
    else:
        module = layer.get_submodule(parts.attention if site == "attention_output" else parts.mlp)
        run(model, ids, {module: lambda _, output: seen.append(output.clone())})
    return seen[0].detach()


@functools.cache
def block_on(donor: nn.Module, receiver: nn.Module, parts: Parts, unit: Unit, ids: Any) -> torch.Tensor:
    """The donor's layers from ``unit[0]`` to ``unit[1]`` on the receiver's own stream below them."""
    entering: list[torch.Tensor] = []
    at = receiver.get_submodule(parts.layers)[unit[0]]
    handle = at.register_forward_pre_hook(lambda _, args: entering.append(args[0].clone()))
    run(receiver, ids, {})
    handle.remove()
    layers, left = donor.get_submodule(parts.layers), []
    handle = layers[unit[0]].register_forward_pre_hook(lambda _, args: (entering[0], *args[1:]))
    run(donor, ids, {layers[unit[1]]: lambda _, output: left.append(output.clone())})
    handle.remove()
    return left[0]


def effect(
    donor: nn.Module,
    receiver: nn.Module,
    parts: Parts,
    site: str,
    unit: Unit,
    pair: Any,
    positions: str,
    share: float = 1,
) -> float:
    """m(receiver with the donor's site) − m(receiver); ``share``: how far towards the donor's the site is moved."""
    margin = 0.0
    for sign, ids, start in ((1, pair.chosen_ids, pair.chosen_start), (-1, pair.rejected_ids, pair.rejected_start)):
        mask = where_patched(ids, start, positions)[None, :, None]
        if site == "block":
            module = receiver.get_submodule(parts.layers)[unit[1]]
            given = block_on(donor, receiver, parts, unit, ids)

            def swap(_: Any, own: torch.Tensor, given: Any = given, mask: Any = mask) -> torch.Tensor:
                return torch.where(mask, own + share * (given - own) if share != 1 else given, own)
        else:
            path = {"attention_output": parts.attention, "mlp_output": parts.mlp, "head": parts.projection}[site]
            module = receiver.get_submodule(parts.layers)[unit[0]].get_submodule(path)
            moved = share * (tensor_at(donor, parts, site, unit, ids) - tensor_at(receiver, parts, site, unit, ids))

            def swap(_: Any, own: torch.Tensor, moved: Any = moved, mask: Any = mask) -> torch.Tensor:
                return own + torch.where(mask, moved, 0.0)

        margin += sign * (
            logp(run(receiver, ids, {module: swap}), ids, start) - logp(run(receiver, ids, {}), ids, start)
        )
    return margin


def effects(policy: nn.Module, reference: nn.Module, parts: Parts, curve: Any, pairs: Any) -> dict[str, np.ndarray]:
    asked = [(unit.layer, unit.last_layer, unit.head) for unit in curve.units]
    return {
        name: np.array([
            [effect(donor, receiver, parts, curve.site, unit, pair, curve.positions) for unit in asked] for pair in pairs
        ])
        for name, donor, receiver in (("sufficiency", policy, reference), ("necessity", reference, policy))
    }  # fmt: skip


def equal_pairs(count: int, length: int = 8, seed: int = 5) -> ProbeSet:
    """Both sequences of every pair are equally long: the shapes are those of one sequence alone."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(3, VOCABULARY, size=(count, 3, length)).tolist()
    pairs = tuple(
        ProbePair(index, tuple(prompt + chosen), tuple(prompt + rejected), length, length)
        for index, (prompt, chosen, rejected) in enumerate(drawn)
    )
    return ProbeSet(pairs, "random tokens", {}, 64, "keep_start", None)


@pytest.mark.parametrize("name", [name for name in WHERE if name != "mamba"])
def test_every_site_both_ways_is_what_a_hooked_forward_gives(name: str) -> None:
    """At mixed lengths (padding: METHODS §7's 1e-7 of the summed |log p|), and with windows of two layers."""
    reference = build(name)
    policy, probes, parts = perturbed(reference), random_pairs(2, seed=2, longest=8), WHERE[name]
    some = {"head": {"layers": (0, 2), "heads": (0, 3)}}  # each number takes the oracle four full forwards
    settings = config(*({"site": site, **some.get(site, {})} for site in SITES), {"site": "block", "width": 2})
    record, arrays = audit(policy, reference, probes, settings)
    pair = {key: arrays[f"per_pair.{key}"] for key in ("reference_chosen_logp", "reference_rejected_logp")}
    atol = 1e-7 * float(np.abs(list(pair.values())).sum(0).max())
    assert [curve.site for curve in record.sites] == [*SITES, "block"]
    for number, curve in enumerate(record.sites):
        expected = [(layer, layer + curve.width - 1, None) for layer in range(4 - curve.width)]
        if curve.site == "head":
            expected = [(layer, layer, head) for layer in (0, 2) for head in (0, 3)]
        assert [(unit.layer, unit.last_layer, unit.head) for unit in curve.units] == expected
        wanted = effects(policy, reference, parts, curve, probes.pairs)
        for direction, values in wanted.items():
            found = arrays[f"per_pair.sites.{number}.{direction}"]
            assert np.abs(values).max() > 1e3 * atol
            np.testing.assert_allclose(found, values, atol=atol, rtol=0, err_msg=f"{curve.site} {direction}")
            means = [estimate.mean for estimate in getattr(curve, direction)]
            np.testing.assert_allclose(means, values.mean(axis=0), atol=atol)
        along = np.sign(record.margins.shift.mean) * wanted["sufficiency"].mean(axis=0)
        assert curve.peak == (int(np.argmax(along)) if along.max() > 0 else None)
        assert (curve.estimator, curve.pairs, curve.exact_pairs, curve.correlation) == ("exact", 2, 2, None)


def test_in_equal_shapes_the_numbers_agree_to_1e_9() -> None:
    reference = build("llama")
    policy, probes = perturbed(reference), equal_pairs(1)
    settings = config(*({"site": site, "layers": (1,)} for site in SITES), batch_tokens=1, share_prompts=False)
    record, arrays = audit(policy, reference, probes, settings)
    for number, curve in enumerate(record.sites):
        for direction, values in effects(policy, reference, WHERE["llama"], curve, probes.pairs).items():
            np.testing.assert_allclose(arrays[f"per_pair.sites.{number}.{direction}"], values, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", ["prompt", "completion", "last_prompt_token"])
def test_patched_positions(positions: str) -> None:
    reference = build("llama")
    policy, probes = perturbed(reference), random_pairs(2, seed=4, longest=8)
    settings = config(*({"site": site, "layers": (1,), "positions": positions} for site in SITES))
    record, arrays = audit(policy, reference, probes, settings)
    for number, curve in enumerate(record.sites):
        assert curve.positions == positions
        for direction, values in effects(policy, reference, WHERE["llama"], curve, probes.pairs).items():
            found = arrays[f"per_pair.sites.{number}.{direction}"]
            np.testing.assert_allclose(found, values, atol=2e-6, rtol=0, err_msg=curve.site)
            assert np.abs(values).max() > 1e-4


def test_a_window_of_one_layer_at_all_positions_is_the_block_transplant() -> None:
    reference = build("llama")
    _, arrays = audit(perturbed(reference), reference, random_pairs(7), config({"site": "block"}))
    assert np.array_equal(arrays["per_pair.sites.0.sufficiency"], arrays["per_pair.transplant"][:, 1:-1])


def test_the_peak_is_in_the_direction_of_the_shift() -> None:
    """As ``peak_layer`` is: of two models, whichever is the policy, and of equal ones there is none."""
    one = build("llama")
    other = perturbed(one)
    peaks = set()
    for policy, reference in ((one, other), (other, one)):
        record, _ = audit(policy, reference, random_pairs(7), config({"site": "block"}))
        (curve,) = record.sites
        sign = np.sign(record.margins.shift.mean)
        along = [sign * effect.mean for effect in curve.sufficiency]
        assert max(along) > 0.0
        assert curve.peak == int(np.argmax(along))
        peaks.add(sign)
    assert peaks == {-1.0, 1.0}
    record, _ = audit(one, build("llama"), random_pairs(7), config({"site": "block"}))
    assert record.sites[0].peak is None
    assert record.reasons["sites.0.peak"] == "every mean sufficiency of a unit is 0: no unit stands out"


def test_lora_with_its_adapters_off() -> None:
    """Policy and reference are one module; a head's part holds the adapter inside its projection."""
    base = build("llama")
    options = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(base), options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    merged = copy.deepcopy(model).merge_and_unload()
    probes = random_pairs(2, seed=6, longest=8)
    sites = [{"site": site, "layers": (1,)} for site in SITES]
    settings = config(*sites, *({**site, "estimator": "attribution"} for site in sites))
    record, arrays = audit(model, None, probes, settings)
    for number, curve in enumerate(record.sites[:4]):
        for direction, values in effects(merged, base, WHERE["llama"], curve, probes.pairs).items():
            np.testing.assert_allclose(arrays[f"per_pair.sites.{number}.{direction}"], values, atol=2e-6, rtol=0)
    _, theirs = audit(merged, base, probes, settings)
    for name, values in theirs.items():
        if "attribution" in name:
            np.testing.assert_allclose(arrays[name], values, atol=1e-9, err_msg=name)
    assert model.active_adapters == ["default"]


# -- attribution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step", "atol"), [("gpt2", 1e-4, 1e-6), ("gpt_neox", 1e-4, 1e-6), ("gemma2", 1e-2, 2e-3)]
)
def test_attribution_is_the_derivative_of_the_effect(name: str, step: float, atol: float) -> None:
    """By central differences; Gemma's norms compute in float32, whose rounding a smaller step would magnify."""
    reference = build(name)
    policy, probes, parts = perturbed(reference), random_pairs(1, seed=2, longest=8), WHERE[name]
    settings = config(
        *({"site": site, "layers": (1,), "estimator": "attribution"} for site in SITES),
        {"site": "head", "layers": (2,), "heads": (3,), "positions": "completion", "estimator": "attribution"},
        {"site": "block", "layers": (0,), "width": 2, "positions": "prompt", "estimator": "attribution"},
    )
    record, arrays = audit(policy, reference, probes, settings)
    for number, curve in enumerate(record.sites):
        for direction, donor, receiver in (("sufficiency", policy, reference), ("necessity", reference, policy)):
            found = arrays[f"per_pair.sites.{number}.{direction}_attribution"]
            for column, unit in enumerate((u.layer, u.last_layer, u.head) for u in curve.units):
                for row, pair in enumerate(probes.pairs):
                    up, down = (
                        effect(donor, receiver, parts, curve.site, unit, pair, curve.positions, share)
                        for share in (step, -step)
                    )
                    slope = (up - down) / (2 * step)
                    assert found[row, column] == pytest.approx(slope, rel=1e-3, abs=atol), (curve.site, direction)


def test_the_parts_of_the_heads_sum_to_the_attention() -> None:
    """To first order; the projection of a Llama has no bias."""
    reference = build("llama")
    settings = config(
        {"site": "attention_output", "estimator": "attribution"}, {"site": "head", "estimator": "attribution"}
    )
    _, arrays = audit(perturbed(reference), reference, random_pairs(4), settings)
    for direction in ("sufficiency", "necessity"):
        whole, heads = (arrays[f"per_pair.sites.{number}.{direction}_attribution"] for number in (0, 1))
        np.testing.assert_allclose(heads.reshape(4, 3, 4).sum(-1), whole, atol=1e-9)


def test_estimators() -> None:
    """Attribution on all pairs, exact effects on some drawn by hash, the same ones as patching's and nested in them."""
    reference = build("llama")
    policy, probes = perturbed(reference, scale=0.02), random_pairs(12)
    settings = config(
        {"site": "mlp_output"},
        {"site": "mlp_output", "estimator": "attribution", "pairs": 4},
        {"site": "mlp_output", "estimator": "control_variate", "pairs": 8},
        {"site": "mlp_output", "pairs": 5},
        patching={"exact_pairs": 10, "noise_draws": 0, "reverse": False},
    )
    record, arrays = audit(policy, reference, probes, settings)
    whole = arrays["per_pair.sites.0.sufficiency"]
    assert np.array_equal(np.isnan(whole), np.isnan(arrays["per_pair.effect"][:, 1:]))
    for number, count in enumerate((10, 4, 8, 5)):
        values = arrays[f"per_pair.sites.{number}.sufficiency"]
        patched = np.isfinite(values).all(axis=1)
        assert patched.sum() == count
        np.testing.assert_allclose(values[patched], whole[patched], atol=1e-6)
    alone, combined = record.sites[1:3]
    cheap = arrays["per_pair.sites.1.sufficiency_attribution"]
    assert np.isfinite(cheap).all()
    np.testing.assert_allclose([e.mean for e in alone.sufficiency], cheap.mean(axis=0))
    chosen = np.isfinite(arrays["per_pair.sites.2.sufficiency"]).all(axis=1)
    for layer in range(3):
        exact, proxy = arrays["per_pair.sites.2.sufficiency"][chosen, layer], cheap[chosen, layer]
        assert combined.correlation[layer] == pytest.approx(np.corrcoef(exact, proxy)[0, 1])
        assert combined.correlation[layer] > 0.9
        # The effects of all pairs are known here: what the combined estimate is an estimate of.
        assert combined.sufficiency[layer].low <= np.nanmean(whole[:, layer]) <= combined.sufficiency[layer].high
    assert [(c.pairs, c.exact_pairs) for c in record.sites] == [(10, 10), (12, 4), (12, 8), (5, 5)]
    assert len(combined.necessity_correlation) == 3
