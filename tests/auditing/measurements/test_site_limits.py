"""Finer sites at the limits: planted and identical models, little memory, bfloat16, streamed references, refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align_audit.auditing.session.readout import Readout
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, SiteError
from align_audit.models.reference import resolve_reference
from align_audit.models.weights.fingerprint import fingerprint
from tests.auditing.measurements.hooked_sites import SITES, audit, config, logp, run
from tests.auditing.test_bad_input import unexplained
from tests.helpers.audits import audited
from tests.helpers.tiny import DEVICE, perturbed, random_pairs
from tests.models.test_families import build

pytestmark = pytest.mark.device


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
        assert record.reasons[f"sites.{number}.peak"] == "every mean sufficiency of a unit is 0: no unit stands out"
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
    (unit,) = record.sites[4].sufficiency
    assert (record.sites[4].peak == 0) == (unit.mean * record.margins.shift.mean > 0.0)


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
        (
            {"site": "block", "layer": (1,)},
            r"unknown option 'sites.0.layer' .did you mean 'layers'\?.; the options there are site, layers",
        ),
    ],
)
def test_nonsense_is_refused_by_the_configuration(site: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        AuditConfig.from_dict({"sites": [site]})


def test_a_configuration_survives_yaml(tmp_path: Any) -> None:
    settings = config({"site": "head", "layers": (0, 3), "heads": (1,)}, {"site": "block", "width": 2})
    settings.to_yaml(tmp_path / "audit.yaml")
    assert AuditConfig.from_yaml(tmp_path / "audit.yaml") == settings
