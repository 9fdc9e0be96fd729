"""``align-audit run`` and ``transfer`` on a folder of which a checkpoint cannot be read, and with code of their own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.errors import AuditMemoryError, ConfigurationError
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.monitoring import monitor
from tests.cli.commands import arguments, refused
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import train
from tests.models.test_loading import ADAPTER_DAMAGE, FULL_DAMAGE, with_code

OTHER_DEPTH = "of another depth"


def of_another_depth(folder: Path) -> None:
    """Whole, but not of the model that training started from."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    del model.model.layers[-1]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = None
    model.save_pretrained(folder)


def of_another_vocabulary(folder: Path) -> None:
    """Its last tokens are missing: the pairs cannot be read by it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(8)
    model.save_pretrained(folder)


DAMAGE = {
    **FULL_DAMAGE,
    OTHER_DEPTH: of_another_depth,
    "of another vocabulary": of_another_vocabulary,
    "not a folder": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_checkpoint_is_named_and_the_others_are_audited(
    damage: str, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step, source in ((1, 1), (2, 2), (3, 1)):
        shutil.copytree(place.full / f"checkpoint-{source}", run / f"checkpoint-{step}")
    harm = DAMAGE[damage]
    if harm is None:
        shutil.rmtree(run / "checkpoint-2")
        (run / "checkpoint-2").write_text("")
    else:
        harm(run / "checkpoint-2")
    done = command(*arguments(place, run, tmp_path / "out", "--reference", place.base))
    assert done.code == 1, done.err
    assert "Traceback" not in done.out + done.err
    (line,) = [line for line in done.err.splitlines() if "align-audit: " in line]
    assert "align-audit: checkpoint-2 is passed over: " in line
    records = AuditRun.load(tmp_path / "out").records
    assert [record.step for record in records] == [1, 3]
    ours = AuditRun.load(place.full).select(None).records
    expected = next(record for record in ours if record.step == 1)
    for record in records:
        assert record.margins.shift.mean == pytest.approx(expected.margins.shift.mean, rel=1e-6)
    assert "2 audits in " in done.out

    alone = command(*arguments(place, run / "checkpoint-2", tmp_path / "alone", "--reference", place.base))
    assert alone.code == 2
    assert "Traceback" not in alone.out + alone.err
    assert len([line for line in alone.err.splitlines() if "align-audit: " in line]) == 1


@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_one_damaged_adapter_is_named_and_the_others_are_audited(
    damage: str, command: Any, place: SimpleNamespace, lora: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(lora / "checkpoint-1", run / f"checkpoint-{step}")
    ADAPTER_DAMAGE[damage](run / "checkpoint-1")
    done = command(*arguments(place, run, tmp_path / "out"))
    assert done.code == 1, done.err
    (line,) = [line for line in done.err.splitlines() if "align-audit: " in line]
    assert "align-audit: checkpoint-1 is passed over: " in line
    assert [record.step for record in AuditRun.load(tmp_path / "out").records] == [2]


@pytest.fixture(scope="module")
def lora(place: SimpleNamespace) -> Path:
    output = place.folder / "lora" / "out"
    train(
        output,
        "new adapter",
        AlignmentAuditCallback(probes=str(place.probes), config=quick()),
        max_steps=1,
        save_steps=1,
    )
    return output


def test_where_no_checkpoint_can_be_audited_the_command_fails(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(place.full, tmp_path / "run")
    for step in (1, 2):
        FULL_DAMAGE["weights cut off"](tmp_path / "run" / f"checkpoint-{step}")
    done = command(*arguments(place, tmp_path / "run", tmp_path / "out", "--reference", place.base))
    assert done.code == 2
    assert "none of the 2 checkpoints could be audited; the first: cannot load" in done.err
    assert "Traceback" not in done.err


def test_a_damaged_tokenizer_does_not_hide_a_whole_model(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(place.full, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "tokenizer.json").write_text("{")
    done = command(*arguments(place, tmp_path / "run", tmp_path / "out", "--reference", place.base))
    assert done.code == 0, done.err
    records, ours = AuditRun.load(tmp_path / "out").records, AuditRun.load(place.full).records
    assert [record.step for record in records] == [1, 2]
    assert {record.provenance.probe_hash for record in records} == {ours[0].provenance.probe_hash}


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("planted"), AuditMemoryError("planted"), RuntimeError("planted"),
        torch.OutOfMemoryError("planted"), OSError("planted"), SystemExit("planted"),
    ],
    ids=repr,
)  # fmt: skip
def test_whatever_breaks_the_audit_of_one_checkpoint_the_others_are_audited(
    error: BaseException, command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with a gate it is no checkpoint that kept it."""
    real = monitor.run_audit

    def breaks(models: Any, request: Any, *more: Any) -> Any:
        if request.step == 1:
            raise error
        return real(models, request, *more)

    monkeypatch.setattr(monitor, "run_audit", breaks)
    call = arguments(place, place.full, tmp_path / "out", "--reference", place.base)
    done = command(*call, "--gate", "kl>=0", "--fail-on", "error")
    assert done.code == 2, done.err
    passed_over, broken = [line for line in done.err.splitlines() if "align-audit: " in line]
    assert passed_over.startswith("align-audit: checkpoint-1 is passed over: ") and "planted" in passed_over
    assert broken == "align-audit: checkpoint-1 broke --gate kl>=0, --fail-on error: it could not be audited"
    stored = AuditRun.load(tmp_path / "out")
    assert [record.step for record in stored.records] == [2]
    assert [failure.step for failure in stored.failures] == [1]


def test_an_error_that_nobody_foresaw_has_a_status_of_its_own(
    command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> Any:
        raise RuntimeError("planted\x1b[2J")

    monkeypatch.setattr(monitor, "run_audit", breaks)
    call = arguments(place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base)
    done = command(*call)
    assert done.code == 70
    assert "in breaks" in done.err, "the traceback, for a report"
    assert done.err.splitlines()[-1].startswith("align-audit: error: RuntimeError: planted")
    assert "\x1b" not in done.err


def test_fresh_keeps_the_log_where_no_checkpoint_can_be_audited(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(place.full / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    call = arguments(place, tmp_path / "run", tmp_path / "out", "--reference", place.base, "--max-pairs", "3")
    assert command(*call).code == 0
    log = tmp_path / "out" / "align_audit"
    written = (log / "records.jsonl").read_bytes()
    of_another_vocabulary(tmp_path / "run" / "checkpoint-1")
    refused(command(*call, "--fresh"))
    assert (log / "records.jsonl").read_bytes() == written
    assert not (log / "previous-1").exists()


# -- the reference's dtype, and code of its own ------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_16_bits_is_compared_in_the_checkpoints_dtype(
    stored: torch.dtype, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    """As if it had been saved in float32 after rounding, to the bit."""
    for name, dtype in (("narrow", stored), ("wide", torch.float32)):
        rounded: Any = AutoModelForCausalLM.from_pretrained(place.base, dtype=stored)
        rounded.to(dtype).save_pretrained(tmp_path / name)
        done = command(*arguments(place, place.full, tmp_path / f"{name}-out", "--reference", tmp_path / name))
        assert done.code == 0, done.err
    narrow, wide = (AuditRun.load(tmp_path / f"{name}-out").records for name in ("narrow", "wide"))
    assert [record.step for record in narrow] == [1, 2]
    for one, other in zip(narrow, wide, strict=True):
        assert one.margins.model_dump_json() == other.margins.model_dump_json()
        assert math.isfinite(one.margins.shift.mean)
        assert [effect.mean for effect in one.patching.effect] == [effect.mean for effect in other.patching.effect]
        assert one.provenance.reference_hash == other.provenance.reference_hash


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float32"])
def test_both_models_are_read_in_the_dtype_asked_for(
    dtype: str, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    call = arguments(place, place.full / "checkpoint-2", tmp_path / "out", "--reference", place.base)
    refused(command(*call, "--dtype", "int8"), "--dtype: expected float32, bfloat16", "found 'int8'")
    done = command(*call, "--dtype", dtype)
    assert done.code == 0, done.err
    (record,) = AuditRun.load(tmp_path / "out").records
    for path, found in (
        (place.full / "checkpoint-2", record.provenance.policy_hash),
        (place.base, record.provenance.reference_hash),
    ):
        assert found == fingerprint(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


@pytest.mark.parametrize("name", ["run", "transfer"])
def test_code_of_its_own_is_run_where_the_option_says_so(
    name: str, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    folder = with_code(shutil.copytree(place.full / "checkpoint-2", tmp_path / "checkpoint-2"))
    if name == "run":
        call = arguments(place, folder, tmp_path / "out", "--reference", place.base)
    else:
        sets = [part for kind in ("one", "two") for part in ("--probes", f"{kind}={place.probes}")]
        options = tmp_path / "transfer.yaml"
        quick(max_pairs=8, low_rank={"layers": [1], "ranks": [1], "random_draws": 0}).to_yaml(options)
        call = ["transfer", folder, "--reference", place.base, *sets, "--config", options, "--output", tmp_path / "out"]
    refused(command(*call), str(folder), "--trust-remote-code")
    assert "--trust-remote-code" in command(name, "--help").out
    done = command(*call, "--trust-remote-code")
    assert done.code == 0, done.err
    if name == "run":
        (record,) = AuditRun.load(tmp_path / "out").records
        ours = {record.step: record for record in AuditRun.load(place.full).records}[2]
        assert record.margins.shift.mean == pytest.approx(ours.margins.shift.mean, rel=1e-6)
    else:
        assert json.loads((tmp_path / "out" / "transfer.json").read_text())
