"""A checkpoint beside the log of its run: base, policy and pairs are what was recorded, or it is said, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align_audit import AlignmentAuditCallback, AuditRecord, AuditRun, ProbeSet, audit, transfer
from align_audit.errors import ReferenceUnavailableError
from align_audit.models.loading import load_tokenizer
from tests.cli.commands import arguments, refused
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, build, saved_model, train


@pytest.fixture
def lora(place: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A LoRA run with its base, free to be spoilt."""
    source = place.folder / "lora-of-origins"
    if not source.exists():
        callback = AlignmentAuditCallback(probes=str(place.probes), config=quick())
        train(source / "out", "new adapter", callback, max_steps=2, save_steps=1)
    kept = place.folder / "lora-of-origins-base"
    if not kept.exists():
        shutil.copytree(source / "base", kept)
    # The adapter names its base by its absolute path: there, and nowhere else.
    shutil.rmtree(source / "base", ignore_errors=True)
    shutil.copytree(kept, source / "base")
    run = tmp_path / "run"
    shutil.copytree(source / "out", run)
    return SimpleNamespace(run=run, base=source / "base", kept=kept, checkpoint=run / "checkpoint-2")


@pytest.fixture
def full(place: SimpleNamespace, tmp_path: Path) -> Path:
    """The output of a full fine-tuning, free to be spoilt."""
    return Path(shutil.copytree(place.full, tmp_path / "run"))


def other_model(folder: Path) -> str:
    """Of the same shape, with other weights."""
    path = saved_model(folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def said(record: AuditRecord) -> dict[str, str]:
    return {name: check["verdict"] for name, check in record.extra["origin"].items()}


def only(output: Path) -> AuditRecord:
    (record,) = AuditRun.load(output).records
    return record


PASSED = {"reference": "passed", "policy": "passed", "probes": "passed"}


# -- as recorded -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_as_its_run_left_it(command: Any, place: SimpleNamespace, full: Path, tmp_path: Path) -> None:
    done = command(*arguments(place, full / "checkpoint-2", tmp_path / "out", "--reference", place.base))
    assert done.code == 0
    record = only(tmp_path / "out")
    assert said(record) == PASSED
    assert "align-audit:" not in done.err
    assert record.reference_check.verdict == "passed"
    assert str(full / "align_audit" / "records.jsonl") in record.reference_check.reason
    assert AuditRecord.from_json(record.to_json()).extra == record.extra


@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_whose_base_is_named_or_not(
    named: bool, command: Any, place: SimpleNamespace, lora: SimpleNamespace, tmp_path: Path
) -> None:
    """The same weights under PEFT's names and under their own have two hashes, and are one reference."""
    more = ["--reference", lora.base] if named else []
    done = command(*arguments(place, lora.checkpoint, tmp_path / "out", *more))
    assert (done.code, "align-audit:" in done.err) == (0, False)
    assert said(only(tmp_path / "out")) == PASSED


def test_a_base_that_moved_is_the_same_base(
    command: Any, place: SimpleNamespace, lora: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.move(lora.base, tmp_path / "moved")
    point_at(lora.checkpoint, tmp_path / "moved")
    assert command(*arguments(place, lora.checkpoint, tmp_path / "out")).code == 0
    assert said(only(tmp_path / "out")) == PASSED


def test_a_run_that_was_given_the_base_as_a_path_is_read_with_adapters_off(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    base = Path(saved_model(tmp_path / "run" / "base"))
    callback = AlignmentAuditCallback(probes=str(place.probes), config=quick(), reference=str(base))
    train(tmp_path / "run" / "out", "new adapter", callback, max_steps=1, save_steps=1)
    done = command(*arguments(place, tmp_path / "run" / "out" / "checkpoint-1", tmp_path / "out"))
    assert (done.code, "align-audit:" in done.err) == (0, False)
    assert said(only(tmp_path / "out")) == PASSED


def test_a_narrower_dtype_hides_whether_it_is_the_same(
    command: Any, place: SimpleNamespace, full: Path, tmp_path: Path
) -> None:
    more = ["--reference", place.base, "--dtype", "bfloat16"]
    done = command(*arguments(place, full / "checkpoint-2", tmp_path / "out", *more))
    assert (done.code, "align-audit:" in done.err) == (0, False)
    assert said(only(tmp_path / "out")) == {"reference": "not_run", "policy": "not_run", "probes": "passed"}


def test_a_checkpoint_of_a_run_that_was_set_aside_is_known(
    command: Any, place: SimpleNamespace, full: Path, tmp_path: Path
) -> None:
    """A later run in the same folder, from another base, saved no step 2 of its own."""
    shutil.copytree(full / "checkpoint-2", tmp_path / "kept")
    base = Path(other_model(tmp_path / "base"))
    callback = AlignmentAuditCallback(probes=str(place.probes), config=quick(), reference=None)
    again = build(full, "ref_model made", [callback], base=tmp_path / "second", max_steps=1, save_steps=1, seed=3)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    again.model.load_state_dict(weights)
    again.trainer.ref_model.load_state_dict(weights)
    callback.attach(again.trainer)
    with pytest.warns(UserWarning, match="audits of an earlier run"):
        again.trainer.train()
    done = command(*arguments(place, full / "checkpoint-2", tmp_path / "old", "--reference", place.base))
    assert (done.code, "align-audit:" in done.err) == (0, False)
    assert said(only(tmp_path / "old")) == PASSED
    assert "previous-1" in only(tmp_path / "old").reference_check.reason
    done = command(*arguments(place, full / "checkpoint-1", tmp_path / "new", "--reference", base))
    assert (done.code, "align-audit:" in done.err) == (0, False)
    assert said(only(tmp_path / "new")) == PASSED


# -- not as recorded ---------------------------------------------------------------------------------------------------


def point_at(checkpoint: Path, base: Path) -> None:
    file = checkpoint / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "base_model_name_or_path": str(base)}))


def test_an_adapter_whose_base_was_replaced(
    command: Any, place: SimpleNamespace, lora: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.rmtree(lora.base)
    other_model(lora.base)
    done = command(*arguments(place, lora.checkpoint, tmp_path / "out"))
    refused(done, "is not the one that its run was audited against", "replaced or moved", "--reference")
    assert not (tmp_path / "out").exists(), "nothing was stored"
    # The right one, named: the reference is right then, and what the adapter stands on is still not.
    done = command(*arguments(place, lora.checkpoint, tmp_path / "out", "--reference", lora.kept))
    assert done.code == 0
    assert done.err.count("align-audit:") == 1
    assert "does not hold the policy that its run had at step 2" in done.err
    assert said(only(tmp_path / "out")) == {**PASSED, "policy": "failed"}


def test_an_adapter_that_points_elsewhere(
    command: Any, place: SimpleNamespace, lora: SimpleNamespace, tmp_path: Path
) -> None:
    point_at(lora.checkpoint, Path(other_model(tmp_path / "elsewhere")))
    done = command(*arguments(place, lora.checkpoint, tmp_path / "out"))
    refused(done, "checkpoint-2: this reference", "is not the one that its run was audited against")


def test_of_a_folder_the_checkpoints_with_another_base_are_passed_over(
    command: Any, place: SimpleNamespace, lora: SimpleNamespace, tmp_path: Path
) -> None:
    point_at(lora.checkpoint, Path(other_model(tmp_path / "elsewhere")))
    done = command(*arguments(place, lora.run, tmp_path / "out"))
    assert done.code == 1
    assert "checkpoint-2 is passed over" in done.err
    assert only(tmp_path / "out").step == 1


def test_another_reference_that_was_named_is_said_and_recorded(
    command: Any, place: SimpleNamespace, full: Path, tmp_path: Path
) -> None:
    base = other_model(tmp_path / "other")
    done = command(*arguments(place, full / "checkpoint-2", tmp_path / "out", "--reference", base))
    assert done.code == 0
    assert done.err.count("align-audit:") == 1
    assert "this reference (loaded from other) is not the one" in done.err
    record = only(tmp_path / "out")
    assert said(record) == {**PASSED, "reference": "failed"}
    assert record.reference_check.verdict == "failed"
    assert "reference_mismatch" in {alert.rule for alert in record.alerts}
    assert "reference_mismatch" in done.out


def test_a_checkpoint_that_a_later_run_wrote_over(
    command: Any, place: SimpleNamespace, full: Path, tmp_path: Path
) -> None:
    """The later run had no callback: the log is the first one's."""
    train(full, "ref_model made", None, max_steps=2, save_steps=1, learning_rate=1e-3)
    done = command(*arguments(place, full / "checkpoint-2", tmp_path / "out", "--reference", place.base))
    assert done.code == 0
    assert done.err.count("align-audit:") == 1
    assert "does not hold the policy that its run had at step 2" in done.err
    assert said(only(tmp_path / "out")) == {**PASSED, "policy": "failed"}


@pytest.mark.parametrize("change", ["another file", "another seed"])
def test_other_probes(change: str, command: Any, place: SimpleNamespace, full: Path, tmp_path: Path) -> None:
    other = SimpleNamespace(**vars(place))
    if change == "another file":
        other.probes = tmp_path / "other.jsonl"
        other.probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    else:
        other.options = tmp_path / "seed.yaml"
        quick(seed=11).to_yaml(other.options)
    done = command(*arguments(other, full / "checkpoint-2", tmp_path / "out", "--reference", place.base))
    assert done.code == 0
    assert done.err.count("align-audit:") == 1
    assert "are other pairs than its run was audited on" in done.err
    assert said(only(tmp_path / "out")) == {**PASSED, "probes": "failed"}


def test_other_probes_are_said_once_for_a_folder(
    command: Any, place: SimpleNamespace, full: Path, tmp_path: Path
) -> None:
    changed = SimpleNamespace(**{**vars(place), "options": tmp_path / "seed.yaml"})
    quick(seed=11).to_yaml(changed.options)
    done = command(*arguments(changed, full, tmp_path / "out", "--reference", place.base))
    assert done.code == 0, done.err
    assert done.err.count("are other pairs than its run was audited on") == 1
    assert [said(record) for record in AuditRun.load(tmp_path / "out").records] == [{**PASSED, "probes": "failed"}] * 2


# -- in Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(place: SimpleNamespace) -> ProbeSet:
    return ProbeSet.from_dataset(str(place.probes), load_tokenizer([place.base]), max_pairs=4)


def test_audit_of_a_path_checks_the_same(
    place: SimpleNamespace, lora: SimpleNamespace, pairs: ProbeSet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "align_audit"):
        record = audit(str(lora.checkpoint), None, pairs, quick())
    assert said(record) == PASSED
    assert not caplog.records
    shutil.rmtree(lora.base)
    other_model(lora.base)
    with pytest.raises(ReferenceUnavailableError, match="is not the one that its run was audited against"):
        audit(str(lora.checkpoint), None, pairs, quick())
    with caplog.at_level(logging.WARNING, "align_audit"):
        by_name = audit(lora.checkpoint, str(lora.base), {"held": pairs}, quick())
    assert said(by_name["held"]) == {**PASSED, "policy": "failed", "reference": "failed"}
    assert len(caplog.records) == 2


def test_transfer_of_a_path_checks_the_same(place: SimpleNamespace, lora: SimpleNamespace, pairs: ProbeSet) -> None:
    eight = ProbeSet.from_dataset(str(place.probes), load_tokenizer([place.base]), max_pairs=8)
    sets = {"first": pairs, "second": eight}
    config = quick(low_rank={"layers": [1], "ranks": [1], "random_draws": 0})
    assert "not the one" not in transfer(str(lora.checkpoint), None, sets, config).reference_source
    shutil.rmtree(lora.base)
    other_model(lora.base)
    with pytest.raises(ReferenceUnavailableError, match="is not the one that its run was audited against"):
        transfer(str(lora.checkpoint), None, sets, config)
    named = transfer(str(lora.checkpoint), str(lora.base), sets, config)
    assert "not the one that the run of this checkpoint was audited against" in named.reference_source


def test_a_damaged_log_checks_what_is_left_of_it(place: SimpleNamespace, full: Path, pairs: ProbeSet) -> None:
    log = full / "align_audit" / "records.jsonl"
    log.write_bytes(b"\xff\n" + b'{"step": 2}\n' + b"[" * 5000 + b"\n" + log.read_bytes()[:-10])
    record = audit(str(full / "checkpoint-1"), str(place.base), pairs, quick())
    assert said(record) == PASSED
    log.write_bytes(b"\n")
    assert "origin" not in audit(str(full / "checkpoint-1"), str(place.base), pairs, quick()).extra


def test_hashes_of_an_earlier_version_are_compared_with_nothing(
    place: SimpleNamespace, full: Path, pairs: ProbeSet
) -> None:
    """Fingerprints were made otherwise then: another hash is no other reference."""
    log = full / "align_audit" / "records.jsonl"
    values = [json.loads(line) for line in log.read_text().splitlines()]
    for value in values:
        value["provenance"]["reference_hash"] = "f00d" * 4
    log.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert audit(str(full / "checkpoint-1"), str(place.base), pairs, quick()).reference_check.verdict == "failed"
    log.write_text("".join(json.dumps(value | {"methods_version": 1}) + "\n" for value in values))
    record = audit(str(full / "checkpoint-1"), str(place.base), pairs, quick())
    assert "origin" not in record.extra and record.reference_check.verdict != "failed"
