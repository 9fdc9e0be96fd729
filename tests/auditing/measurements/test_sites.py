"""Patching of finer sites against plain full forwards with ordinary hooks, one sequence at a time (METHODS §1, §7)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.auditing.session.readout import Readout
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, SiteError
from align_audit.models.reference import resolve_reference
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.probes.pairs import ProbePair, ProbeSet
from tests.auditing.test_bad_input import unexplained
from tests.helpers.audits import audited
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
SITES = ("attention_output", "mlp_output", "head", "block")
Unit = tuple[int, int, int | None]


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def run(model: nn.Module, ids: Any, hooks: dict[nn.Module, Callable[[Any, torch.Tensor], Any]]) -> torch.Tensor:
    """Logits [T, V] of one sequence; a hook sees a module's input and output and may give another output."""
    handles = []
    for module, act in hooks.items():

        def hook(_: nn.Module, args: Any, output: Any, act: Any = act) -> Any:
            other = act(args, first(output))
            if other is None:
                return None
            return (other, *output[1:]) if isinstance(output, tuple) else other

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids], device=DEVICE), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def logp(logits: torch.Tensor, ids: Any, start: int) -> float:
    rows = logits[start - 1 : len(ids) - 1].double().log_softmax(-1)
    return float(rows[torch.arange(len(rows)), torch.tensor(ids[start:])].sum())


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


# -- audits -----------------------------------------------------------------------------------------------------------


def config(*sites: dict[str, Any], **changes: Any) -> AuditConfig:
    return AuditConfig.from_dict({
        "batch_tokens": 120, "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "seed": 3,
        "localization": {"enabled": False}, "statistics": {"bootstrap_resamples": 100},
        "patching": {"noise_draws": 0, "reverse": False}, "sites": sites, **changes,
    })  # fmt: skip


def audit(policy: Any, reference: Any, probes: Any, settings: AuditConfig) -> Any:
    return audited(policy, reference, probes, settings)


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
        assert curve.peak == int(np.argmax(wanted["sufficiency"].mean(axis=0)))
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


# -- planted, identical, inert ----------------------------------------------------------------------------------------


def test_a_head_that_alone_was_changed_is_the_peak() -> None:
    reference, probes = build("llama"), random_pairs(8)
    layer, head = 1, 2

    def planted(sign: int) -> nn.Module:
        policy = perturbed(reference, scale=0.002)
        columns = slice(8 * head, 8 * head + 8)
        with torch.no_grad():
            weight = policy.model.layers[layer].self_attn.o_proj.weight
            noise = torch.randn(
                weight[:, columns].shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype
            )
            weight[:, columns] += sign * 0.3 * weight.std() * noise.to(DEVICE)
        return policy

    def shift(policy: nn.Module) -> float:
        margins = [
            logp(run(model, pair.chosen_ids, {}), pair.chosen_ids, pair.chosen_start)
            - logp(run(model, pair.rejected_ids, {}), pair.rejected_ids, pair.rejected_start)
            for model in (policy, reference) for pair in probes.pairs
        ]  # fmt: skip
        return sum(margins[:8]) - sum(margins[8:])

    policy = max((planted(1), planted(-1)), key=shift)
    settings = config({"site": "head"}, {"site": "head", "estimator": "attribution", "pairs": 8})
    record, arrays = audit(policy, reference, probes, settings)
    for number, curve in enumerate(record.sites):
        unit = curve.units[curve.peak]
        assert (unit.layer, unit.head) == (layer, head)
        size = np.abs(arrays[f"per_pair.sites.{number}.sufficiency"]).mean(axis=0)
        # The heads of the layer above carry on what reaches them in the policy's own run; no other does.
        above = [column for column, other in enumerate(curve.units) if other.layer > layer]
        assert size[curve.peak] > 1.5 * size[above].max()
        assert size[curve.peak] > 20 * np.delete(size, [curve.peak, *above]).max()
    assert curve.sufficiency[curve.peak].mean > 0 > curve.necessity[curve.peak].mean
    assert curve.correlation[curve.peak] > 0.9


def test_identical_models_give_exactly_nothing_and_nothing_is_left_behind() -> None:
    reference = build("gpt2")
    policy, probes = copy.deepcopy(reference), random_pairs(8)
    before = fingerprint(policy)
    estimators = ("exact", "attribution")
    settings = config(*({"site": site, "estimator": estimator} for site in SITES for estimator in estimators))
    record, arrays = audit(policy, reference, probes, settings)
    for name, values in arrays.items():
        if ".sites." in name:
            assert not values.any(), name
    for number, curve in enumerate(record.sites):
        assert curve.peak is None
        assert record.reasons[f"sites.{number}.peak"] == "every unit has the same mean sufficiency"
        assert all(estimate.low == estimate.high == 0.0 for estimate in curve.sufficiency)
    assert record.reasons["sites.1.correlation.0"].startswith("proxy not used")
    for model in (policy, reference):
        assert fingerprint(model) == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_not_known_has_a_reason() -> None:
    """One pair: no interval, no test, no correlation."""
    reference = build("llama")
    settings = config(*({"site": site, "estimator": "attribution"} for site in SITES), {"site": "block", "width": 3})
    record, _ = audit(perturbed(reference), reference, random_pairs(1), settings)
    assert [path for path in unexplained(record) if path.startswith("sites")] == []
    assert np.isnan(record.sites[0].correlation).all()
    assert record.sites[0].sufficiency[0].reason is not None
    assert (record.sites[4].peak, len(record.sites[4].units)) == (0, 1)


def test_in_bfloat16_under_autocast_identical_models_still_give_exactly_nothing() -> None:
    reference = build("llama").float()
    half = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    settings = config(*({"site": site} for site in SITES))
    policy = resolve_reference(copy.deepcopy(reference), reference)
    _, arrays = audited(copy.deepcopy(reference), policy, random_pairs(3), settings, autocast=half)
    assert not any(values.any() for name, values in arrays.items() if ".sites." in name)


def test_running_out_of_memory_halves_the_batch_and_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = build("llama")
    policy, probes = perturbed(reference), random_pairs(6)
    sites = [{"site": site, "layers": (1,), "estimator": "attribution", "pairs": 6} for site in SITES]
    _, free = audit(policy, reference, probes, config(*sites, batch_tokens=10**4))
    whole, calls = Readout.each_margin, []

    def scarce(self: Readout, replay: Any, walked: Any, batch: Any) -> Any:
        for number, item in enumerate(whole(self, replay, walked, batch)):
            # In the middle of a batch's streams, after some effects have been stored.
            if batch.num_pairs > 2 and number == 2 and len(calls) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield item
        calls.append(batch.num_pairs)

    monkeypatch.setattr(Readout, "each_margin", scarce)
    _, tight = audit(policy, reference, probes, config(*sites, batch_tokens=10**4))
    assert max(calls) > 2 >= calls[-1]
    for name, values in free.items():
        if ".sites." in name:
            np.testing.assert_allclose(tight[name], values, atol=2e-6, err_msg=name)


def test_little_working_memory_walks_in_groups_and_changes_no_number() -> None:
    reference = build("llama")
    policy, probes = perturbed(reference), random_pairs(4)
    sites = [{"site": site} for site in SITES]
    _, much = audit(policy, reference, probes, config(*sites))

    class Small(Session):
        def max_streams(self, stream: torch.Tensor) -> int:
            return 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align_audit.auditing.audit.Session", Small)
        _, little = audit(policy, reference, probes, config(*sites))
    for name, values in much.items():
        np.testing.assert_allclose(little[name], values, rtol=0, atol=1e-11, err_msg=name)


def test_a_streamed_reference_gives_the_same_numbers(tmp_path: Any) -> None:
    reference = build("llama").float()
    reference.save_pretrained(tmp_path)
    policy, probes = perturbed(reference), random_pairs(4)
    settings = config(*({"site": site, "layers": (0, 2), "estimator": "attribution", "pairs": 4} for site in SITES))
    record, streamed = audit(policy, str(tmp_path), probes, settings)
    assert record.reference_check.source.startswith("streamed from")
    _, whole = audit(policy, reference, probes, settings)
    for name, values in whole.items():
        np.testing.assert_array_equal(streamed[name], values, err_msg=name)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("llama", {"site": "mlp_output", "layers": (1, 7)}, r"sites.0.layers names \[7\]; the model has layers 0 to 2"),
        ("llama", {"site": "head", "layers": (1,), "heads": (0, 4)}, "layer 1 has heads 0 to 3; no head 4"),
        (
            "llama",
            {"site": "block", "width": 2, "layers": (0, 2)},
            r"windows of 2 layers that start at \[2\] end past the last layer; the model has layers 0 to 2, so windows "
            "start at 0 to 1",
        ),
        ("llama", {"site": "block", "width": 4}, "windows of 4 layers; the model has layers 0 to 2"),
        ("mamba", {"site": "head"}, "layers 0, 1, 2 have block; no head: its mixer is MambaMixer"),
        (
            "lfm2",
            {"site": "attention_output", "layers": (0, 1)},
            "layer 0 has block, mlp_output; no attention_output: ",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(name: str, site: dict[str, Any], words: str) -> None:
    model = build(name)
    with pytest.raises(SiteError, match=words):
        audit(perturbed(model), model, random_pairs(2), config(site))


def test_where_some_layers_have_the_site_the_record_says_which_have_not() -> None:
    model = build("lfm2")
    record, _ = audit(perturbed(model), model, random_pairs(2), config({"site": "head"}))
    assert {unit.layer for unit in record.sites[0].units} == {1}
    assert record.reasons["sites.0.units"] == (
        "layers 0, 2 have block, mlp_output; no head: its mixer is Lfm2ShortConv"
    )


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"site": "mlp_output", "heads": (1,)}, "heads are for site"),
        ({"site": "head", "width": 2}, "a window of layers"),
        ({"site": "head", "layers": (-1,)}, "indices from 0"),
        ({"site": "head", "layers": ()}, "indices from 0"),
        ({"site": "head", "heads": (1, 1)}, "each once"),
        ({"site": "resid"}, "attention_output"),
        ({"site": "block", "estimator": "control_variate", "pairs": 4}, "at least 8 patched pairs"),
        ({"site": "block", "layer": (1,)}, "unknown option 'sites.0.layer'; the options there are site, layers"),
    ],
)
def test_nonsense_is_refused_by_the_configuration(site: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        AuditConfig.from_dict({"sites": [site]})


def test_a_configuration_survives_yaml(tmp_path: Any) -> None:
    settings = config({"site": "head", "layers": (0, 3), "heads": (1,)}, {"site": "block", "width": 2})
    settings.to_yaml(tmp_path / "audit.yaml")
    assert AuditConfig.from_yaml(tmp_path / "audit.yaml") == settings
