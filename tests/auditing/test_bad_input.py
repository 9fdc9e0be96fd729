"""Bad input gets a clear error before training starts; what cannot be known is NaN with its reason, never a crash."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModel, BertForMaskedLM, T5ForConditionalGeneration

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRecord, ProbeSet, audit
from align_audit.alerts.detectors import judge
from align_audit.errors import AlignAuditError, AnatomyError, ConfigurationError, ProbeError, ReferenceUnavailableError
from align_audit.probes.pairs import ProbePair
from align_audit.writers.scalars import not_known, scalars
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, build
from tests.helpers.tiny import perturbed, random_pairs, tiny_model
from tests.monitoring.test_reference_modes import begin


def whole(**changes: Any) -> AuditConfig:
    """Every measure on, as by default, with fewer resamples."""
    values: dict[str, Any] = {
        "statistics": {"bootstrap_resamples": 100},
        "localization": {"selection_resamples": 5, "permutations": 3},
        "low_rank": {"ranks": [1, 4], "layers": [1]},
        "generations": QUICK_GENERATIONS,
    }
    return AuditConfig.from_dict({**values, **changes})


def unknown_numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of all NaN in a record; of an estimate, the estimate."""
    if isinstance(value, dict):
        if {"mean", "low", "high", "reason"} <= value.keys():
            if any(math.isnan(value[name]) for name in ("mean", "low", "high")):
                yield path, value
            return
        for name, part in value.items():
            yield from unknown_numbers(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from unknown_numbers(part, f"{path}.{index}")
    elif isinstance(value, float) and math.isnan(value):
        yield path, value


def unexplained(record: AuditRecord) -> list[str]:
    """NaN without a reason of its own, or of the nearest part that has one. (Alerts carry theirs in words.)"""
    found = []
    for path, value in unknown_numbers(record.model_dump(exclude={"alerts", "provenance"})):
        parts = path.replace("contraction_r2", "contraction").replace("contraction_stderr", "contraction").split(".")
        near = [record.reasons.get(".".join(parts[:end])) for end in range(len(parts), 0, -1)]
        if not (isinstance(value, dict) and value["reason"]) and not any(near):
            found.append(path)
    return found


# -- the data ----------------------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": row["prompt"], "text": row["chosen"]} for row in ROWS[:3]]
EQUAL = [{**row, "rejected": row["chosen"]} for row in ROWS[:3]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no records; expected at least one preference pair"),
        (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "no records"),
        (PROMPTS, r"prompt, text.*chosen, rejected"),
        (Dataset.from_list(PROMPTS), r"found the columns prompt.*chosen, rejected"),
        (EQUAL, r"no usable pair left; dropped 3 \(equal completions\).*chosen and rejected differ"),
        (Dataset.from_list(EQUAL), "no usable pair left"),
        (ROWS[0], "found a single dict"),
        (7, "cannot draw probe pairs from int"),
    ],
)
def test_probe_data_that_cannot_be_used_is_refused_on_attach(data: Any, words: str, tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(probes=data, config=quick(strict=False))
    trained = build(tmp_path / "out", "precompute", [callback])
    with pytest.raises(ProbeError, match=words):
        callback.attach(trained.trainer)
    with pytest.raises(ProbeError, match=words):  # and without attach, when training is about to begin
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


def test_prompts_that_fill_max_length_leave_nothing(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick(strict=False, max_length=3))
    trained = build(tmp_path / "out", "precompute", [callback])
    with pytest.raises(ProbeError, match=r"no usable pair left.*prompt fills max_length.*raise max_length \(now 3\)"):
        callback.attach(trained.trainer)


def test_a_dropped_pair_is_counted_in_the_record(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(probes=[*EQUAL, *ROWS[:4]], config=quick(max_pairs=7))
    (record,) = begin(build(tmp_path / "out", "precompute", [callback]), callback).records
    assert record.provenance.pairs == 4
    assert record.provenance.pairs_dropped == {"equal completions": 3}


def test_probes_of_another_tokenizer_are_refused_before_training(tmp_path: Path) -> None:
    pair = ProbePair(index=0, chosen_ids=(1, 2, 99_999), rejected_ids=(1, 2, 3), chosen_start=2, rejected_start=2)
    probes = ProbeSet(
        pairs=(*random_pairs(3).pairs, pair), source="elsewhere", dropped={}, max_length=None,
        truncation_mode="keep_start", held_out=None,
    )  # fmt: skip
    callback = AlignmentAuditCallback(probes=probes, config=quick(strict=False))
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(ConfigurationError, match=r"token id 99999, the policy's vocabulary has \d+: .*another model's"):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


def test_a_site_that_the_model_does_not_have_is_refused_before_training(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick(strict=False, sites=[{"site": "head", "layers": (9,)}]))
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(ConfigurationError, match=r"sites.0.layers names \[9\]; the model has layers 0 to"):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


def test_an_audit_of_probes_of_another_tokenizer_is_refused() -> None:
    model = tiny_model("llama", vocab_size=20)
    with pytest.raises(AlignAuditError, match=r"token id \d+.*vocabulary has 20"):
        audit(model, perturbed(model), random_pairs(3), whole())


# -- the models --------------------------------------------------------------------------------------------------------


def bert(decoder: bool = False) -> nn.Module:
    config = AutoConfig.for_model(
        "bert", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return BertForMaskedLM(config).eval()


def t5() -> nn.Module:
    config = AutoConfig.for_model("t5", vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def headless() -> nn.Module:
    return AutoModel.from_config(tiny_model("llama").config).eval()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bert, r"BertForMaskedLM is not a causal language model.*AutoModelForCausalLM"),
        (t5, r"T5ForConditionalGeneration is .*encoder.*"),
        (headless, r"LlamaModel .*AutoModelForCausalLM"),
        (lambda: nn.Linear(2, 2), r"Linear is not a transformers model"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(make: Any, words: str) -> None:
    with pytest.raises(AnatomyError, match=words):
        audit(make(), make(), random_pairs(3), whole())


def test_a_reference_that_is_no_causal_language_model_is_refused_before_training(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick(strict=False), reference=bert())
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(AnatomyError, match="BertForMaskedLM is not a causal language model"):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


@pytest.mark.parametrize("missing", ["policy", "reference"])
def test_a_path_with_no_model_is_refused(missing: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    arguments = {"policy": model, "reference": model, missing: tmp_path / "nowhere"}
    with pytest.raises(ReferenceUnavailableError, match=r"cannot load a causal language model from .*nowhere"):
        audit(arguments["policy"], arguments["reference"], random_pairs(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ReferenceUnavailableError, match="is a file; expected a directory"):
        audit(**{**arguments, missing: tmp_path / "file"}, probes=random_pairs(2))


# -- where to write ----------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    """Permission bits do not stop everybody; a file where the folder should be does."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "align_audit").write_text("in the way")
    callback = AlignmentAuditCallback(config=quick(strict=False))
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(ConfigurationError, match=r"cannot write the audit log in .*choose another output_dir"):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0
    assert (tmp_path / "out" / "align_audit").read_text() == "in the way"


def test_a_log_of_a_newer_version_is_refused_and_kept(tmp_path: Path) -> None:
    log = tmp_path / "out" / "align_audit"
    log.mkdir(parents=True)
    line = json.dumps({"schema_version": 999, "step": 3}) + "\n"
    (log / "records.jsonl").write_text(line)
    callback = AlignmentAuditCallback(config=quick(strict=False))
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(AlignAuditError, match=r"schema version 999.*Upgrade"):
        trained.trainer.train()
    assert (log / "records.jsonl").read_text() == line


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_pear": 3}, ["unknown option 'max_pear'", "max_pairs", "batch_tokens"]),
        ({"spinal": {"windows": [0.1, 0.9]}}, ["unknown option 'spinal.windows'", "max_rows"]),
        ({"max_pairs": 0}, ["max_pairs", "greater than or equal to 1", "found 0"]),
        ({"max_pairs": "many"}, ["max_pairs", "'many'"]),
        ({"tensorboard": "yes"}, ["tensorboard", "'auto' or 'off'", "'yes'"]),
        ({"patching": {"positions": "some"}}, ["patching.positions", "'last_prompt_token'", "'some'"]),
        ({"alerts": {"action": "panic"}}, ["alerts.action", "'stop'", "'panic'"]),
        ({"schedule": {"every_n_steps": 0}}, ["schedule.every_n_steps", "found 0"]),
        ({"low_rank": {"ranks": [4, 2]}}, ["low_rank.ranks", "ascending"]),
        ({"spinal": {"window": [0.9, 0.1]}}, ["spinal", "ascending window"]),
        ({"truncation_mode": "middle"}, ["truncation_mode", "'keep_start' or 'keep_end'", "'middle'"]),
        ({"max_pairs": 0, "seed": -1}, ["max_pairs", "seed", "found -1"]),
    ],
)
def test_unknown_options_and_values_name_what_is_allowed(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        AuditConfig.from_dict(values)
    for word in words:
        assert word in str(raised.value)
    assert "pydantic" not in str(raised.value)


def test_a_layer_that_is_not_there_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigurationError, match=r"low_rank.layers names \[9\]; the model has layers 0 to 3"):
        audit(model, perturbed(model), random_pairs(3), whole(low_rank={"layers": [1, 9]}))


# -- too few pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_pairs_than_a_statistic_needs(count: int, tmp_path: Path) -> None:
    policy = tiny_model("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = audit(policy, perturbed(policy), random_pairs(count), whole())
    assert [str(item.message) for item in caught if "align_audit" in item.filename or "numpy" in item.filename] == []
    assert [str(item.message) for item in caught if issubclass(item.category, RuntimeWarning)] == []

    assert record.provenance.pairs == count
    assert math.isfinite(record.margins.shift.mean), "a mean needs one pair"
    assert np.isfinite([estimate.mean for estimate in record.patching.effect]).all()
    assert math.isnan(record.localization.cv_r2)
    assert "pairs" in record.reasons["localization.cv_r2"]
    if count == 1:
        assert math.isnan(record.margins.shift.low)
        assert "pair" in (record.margins.shift.reason or "")
        assert record.low_rank == {}
        assert record.reasons["low_rank"] == (
            "cross-fitting needs two halves: at least 2 independent pairs (those that share a prompt are one), found 1"
        )
        for name in ("noise", "split_half", "random_subspace"):
            assert getattr(record.controls, name).verdict == "not_run", name
            assert getattr(record.controls, name).reason
    assert unexplained(record) == []
    assert all(math.isfinite(value) for value in scalars(record).values())

    record.save(tmp_path / "record.json")
    assert AuditRecord.load(tmp_path / "record.json").to_json() == record.to_json(), "NaN and reasons survive"


@pytest.mark.parametrize("kind", ["two pairs", "nan"])
def test_every_nan_has_its_reason(kind: str) -> None:
    reference = tiny_model("llama")
    policy = perturbed(reference)
    if kind == "nan":
        with torch.no_grad():
            policy.model.layers[2].mlp.down_proj.weight[3, 4] = math.nan
    record = audit(policy, reference, random_pairs(2), whole())
    assert unexplained(record) == []
    assert not [reason for _, reason in not_known(record) if reason == "the record gives no reason"]


def test_one_pair_is_enough_for_a_run(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(probes=ROWS[:1], config=quick(strict=True))
    stored = begin(build(tmp_path / "out", "precompute", [callback]), callback)
    (record,) = stored.records
    assert record.provenance.pairs == 1
    assert record.margins.shift.mean == 0.0
    assert not stored.failures
    assert not [alert for alert in stored.alerts if alert.level == "error"]


def test_short_completions_leave_too_few_rows_for_a_spectrum() -> None:
    policy = tiny_model("llama")
    record = audit(policy, perturbed(policy), random_pairs(2, longest=2), whole())
    assert all(math.isnan(value) for value in record.spinal.policy.contraction)
    assert "singular values" in record.reasons["spinal.policy.contraction.0"]
    assert math.isnan(record.spinal.score)
    assert unexplained(record) == []


# -- weights that are not numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["a layer", "one token", "the head"])
def test_weights_that_are_not_finite(place: str, value: float) -> None:
    """Also where only some positions or pairs are touched, and where an infinity overflows inside."""
    reference = tiny_model("llama")
    policy = perturbed(reference)
    probes = random_pairs(6)
    with torch.no_grad():
        if place == "a layer":
            policy.model.layers[2].mlp.down_proj.weight[3, 4] = value
        elif place == "one token":
            policy.model.embed_tokens.weight[probes[0].chosen_ids[0]] = value
        else:
            policy.lm_head.weight[5, 0] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = audit(policy, reference, probes, whole())
    numeric = [str(item.message) for item in caught if issubclass(item.category, RuntimeWarning)]
    assert not math.isfinite(record.margins.policy.mean)
    assert "not finite" in (record.margins.policy.reason or "")
    assert math.isfinite(record.margins.reference.mean)
    assert "not finite" in (record.patching.recovery[-1].reason or "")
    if place == "a layer":
        assert math.isfinite(record.patching.effect[1].mean), "below the layer nothing is touched"
        assert math.isnan(record.patching.effect[2].mean)
        assert record.patching.peak_layer is None
    if place == "the head":
        assert math.isfinite(record.patching.effect[3].mean), "the reference's own head reads the patched stream"
        assert math.isnan(record.patching.head_transplant.mean)
    assert unexplained(record) == []

    (alert,) = [alert for alert in judge(record, []) if alert.rule == "non_finite"]
    assert alert.level == "error"
    assert "policy" in alert.message
    assert numeric == []


def beside_nan() -> tuple[Any, Any]:
    """A policy, and a reference that gives NaN."""
    policy: Any = tiny_model("llama")
    reference: Any = perturbed(policy)
    with torch.no_grad():
        reference.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    return policy, reference


def test_a_reference_that_is_not_finite() -> None:
    policy, reference = beside_nan()
    record = audit(policy, reference, random_pairs(4), whole())
    assert math.isnan(record.margins.reference.mean)
    assert math.isfinite(record.margins.policy.mean)
    assert record.controls.identity.verdict == "failed"
    assert "finite" in record.controls.identity.reason
    assert unexplained(record) == []


def test_what_only_the_reference_leaves_unknown() -> None:
    """How the policy ranks its pairs is known of every one, whatever the reference says."""
    policy, reference = beside_nan()
    record = audit(policy, reference, random_pairs(4), whole())
    assert math.isfinite(record.margins.ranking_accuracy.mean)
    assert math.isnan(record.margins.accuracy.mean)


@pytest.mark.parametrize("at_start", [True, False])
def test_a_reference_that_is_not_finite_is_not_told_by_precomputed_margins(at_start: bool) -> None:
    """Nothing can be compared with them: that is no other reference, and before training no pass either."""
    policy, reference = beside_nan()
    drawn = random_pairs(4)
    pairs = [dataclasses.replace(pair, reference_logps=(-3.0, -4.0)) for pair in drawn.pairs]
    probes = dataclasses.replace(drawn, pairs=pairs)
    record, _ = audited(policy, reference, probes, whole(), compare_precomputed=True, at_start=at_start)
    check = record.reference_check
    assert check.verdict == ("failed" if at_start else "not_run")
    assert "not finite" in check.reason or "no margin is finite" in check.reason
    assert "not the reference the trainer uses" not in check.reason


def test_nan_weights_before_training_are_reported_and_training_is_not_refused(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick())
    trained = build(tmp_path / "out", "precompute", [callback])
    with torch.no_grad():
        trained.model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = begin(trained, callback)
    assert not stored.failures
    assert math.isnan(stored.records[0].margins.policy.mean)
    assert {alert.rule for alert in stored.alerts if alert.level == "error"} >= {"non_finite"}
    assert stored.records[0].reference_check.verdict == "failed"
    assert not [item for item in caught if issubclass(item.category, RuntimeWarning)]
