"""``align-audit run`` on what a ``DPOTrainer`` saved: full models, adapters, folders of checkpoints; bad arguments."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.models.loading import load_model, load_tokenizer
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.record.audited_checkpoints import CHECKPOINTS
from align_audit.writers.latest_healthy import latest_healthy
from tests.cli.commands import arguments, refused
from tests.helpers.callback_runs import quick
from tests.helpers.checkpoints import write_state
from tests.helpers.dpo import build, train
from tests.helpers.pages import data_in
from tests.helpers.tiny import tiny_model
from tests.monitoring.test_reference_modes import begin

PICTURES = {
    "margins_over_steps.png", "recovery_by_layer_and_step.png", "layer_gain_by_layer_and_step.png",
    "block_transplants.png", "low_rank_curve.png", "depth_trace.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(place: SimpleNamespace) -> dict[str, Path]:
    """A LoRA checkpoint of each kind: a new adapter, and a pretrained one beside its frozen copy."""
    found = {}
    for mode in ("new adapter", "pretrained adapter"):
        output = place.folder / mode.replace(" ", "-") / "out"
        callback = AlignmentAuditCallback(probes=str(place.probes), config=quick())
        train(output, mode, callback, max_steps=1, save_steps=1)
        found[mode] = output
    return found


# -- full models -------------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_audited_as_the_callback_did(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint = place.full / "checkpoint-2"
    more = ["--reference", place.base, "--verbose"]
    done = command(*arguments(place, checkpoint, tmp_path / "out", *more), pictures=True)
    assert done.code == 0, done.err
    (record,) = AuditRun.load(tmp_path / "out").records
    ours = {record.step: record for record in AuditRun.load(place.full).records}[2]
    assert record.key == ours.key
    assert record.provenance.probe_hash == ours.provenance.probe_hash
    assert record.margins.shift.mean == pytest.approx(ours.margins.shift.mean, rel=1e-6)
    for here, there in zip(record.patching.effect, ours.patching.effect, strict=True):
        assert here.mean == pytest.approx(there.mean, rel=1e-5, abs=1e-7)
    assert record.margins.shift.mean != 0.0
    assert record.provenance.policy_hash == fingerprint(load_model(checkpoint))
    assert record.reference_check.source == "loaded from base"
    assert f"{tmp_path / 'out' / 'align_audit' / 'records.jsonl'}" in done.out
    assert "align_audit, step 2: 4 pairs, llama with 3 layers" in done.out
    assert {path.name for path in (tmp_path / "out" / "pictures").iterdir()} == PICTURES
    assert (tmp_path / "out" / "pictures" / "block_transplants.png").read_bytes().startswith(b"\x89PNG")
    arrays = AuditRun.load(tmp_path / "out").load_arrays(2, "arrays")
    assert arrays["per_pair.effect"].shape == (4, 4)


def test_a_folder_of_checkpoints_is_one_run_and_a_second_time_changes_nothing(
    command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = arguments(place, place.full, tmp_path / "out", "--reference", place.base, "--max-pairs", "3")
    first = command(*again)
    assert not (tmp_path / "out" / "pictures").exists()
    assert first.code == 0, first.err
    records = AuditRun.load(tmp_path / "out").records
    assert [record.step for record in records] == [1, 2]
    assert {record.provenance.pairs for record in records} == {3}, "--max-pairs goes before the file's"
    assert len({record.provenance.policy_hash for record in records}) == 2
    assert len({record.provenance.reference_hash for record in records}) == 1
    log = tmp_path / "out" / "align_audit" / "records.jsonl"
    before = log.read_bytes()

    assert [line.split()[:3] for line in first.out.splitlines() if line.startswith("align_audit step")] == [
        ["align_audit", "step", "1"], ["align_audit", "step", "2"]
    ]  # fmt: skip
    assert "latest healthy: checkpoint-" in first.out
    beside, elsewhere = tmp_path / "out" / "align_audit" / "report.html", tmp_path / "page.html"
    assert beside.is_file() and "the report is" not in first.out, "it is written in any case"

    monkeypatch.setattr("align_audit.monitoring.monitor.run_audit", None)
    for report, page in (
        (["--report"], beside),
        (["--report", elsewhere], elsewhere),
        ([f"--report={elsewhere}"], elsewhere),
    ):
        page.unlink(missing_ok=True)
        written = command(*again, *report, "--verbose")
        assert written.code == 0, written.err
        assert f"the report is {page} (" in written.out
        page_of_it = data_in(page.read_text(encoding="utf-8"))["run"]
        assert page_of_it["latest_healthy"].startswith("checkpoint-"), "though they lie in another folder"
    second = command(*again, "--verbose", pictures=True)
    assert second.code == 0, "what is shown is no other option: " + second.err
    assert "2 of 2 checkpoints are in the log already; --fresh audits them again" in second.out
    assert "in the log already" not in first.out
    assert "2 audits in " in first.out and "0 audits in " in second.out
    assert log.read_bytes() == before
    assert {path.name for path in (tmp_path / "out" / "pictures").iterdir()} == PICTURES


def test_the_log_knows_where_the_checkpoints_lie_that_were_audited(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    """The log lies elsewhere: every screen names the checkpoint to go back to, as long as it is there."""
    saved = tmp_path / "saved"
    saved.mkdir()
    for step in (1, 2):
        shutil.copytree(place.full / f"checkpoint-{step}", saved / f"checkpoint-{step}")
    done = command(*arguments(place, saved, tmp_path / "out", "--reference", place.base))
    assert done.code == 0, done.err
    run = AuditRun.load(tmp_path / "out")
    assert run.checkpoints == {1: "checkpoint-1", 2: "checkpoint-2"}
    assert str(latest_healthy(run)) == "checkpoint-2"
    before = (run.directory / CHECKPOINTS).read_bytes()
    assert command(*arguments(place, saved, tmp_path / "out", "--reference", place.base)).code == 0
    assert (run.directory / CHECKPOINTS).read_bytes() == before
    shutil.rmtree(saved / "checkpoint-2")
    assert AuditRun.load(tmp_path / "out").checkpoints == {1: "checkpoint-1"}
    assert str(latest_healthy(AuditRun.load(tmp_path / "out"))) == "checkpoint-1"


@pytest.mark.parametrize("wrong", ["reference", "probes"])
def test_a_refused_run_leaves_nothing_behind(command: Any, place: SimpleNamespace, tmp_path: Path, wrong: str) -> None:
    """An empty log would be a run of which `align-audit watch` says that no audit comes."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    more = ["--reference", "no-such-model"] if wrong == "reference" else ["--reference", place.base, "--probes", empty]
    call = ["run", place.full, "--config", place.options, "--output", tmp_path / "out", *more]
    done = command(*call, *(["--probes", place.probes] if wrong == "reference" else []))
    refused(done, "align-audit: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]


def test_a_reference_that_is_not_there_is_refused_before_anything_loads(
    command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align_audit.monitoring.checkpoints.load_policy", None)
    near = place.base.parent / f"{place.base.name}x"
    done = command(*arguments(place, place.full, tmp_path / "out", "--reference", near))
    refused(done, f"error: --reference: {near}: no such folder (did you mean {place.base}?)")
    assert not (tmp_path / "out").exists()


def test_checkpoints_audited_one_by_one_make_the_same_run(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    """The second call goes on where the first stopped: principal angles need the subspaces of the audit before."""
    options = tmp_path / "audit.yaml"
    quick(low_rank={"layers": [1], "ranks": [1], "random_draws": 0}).to_yaml(options)

    def audited(checkpoint: Path, output: Path) -> list[Any]:
        done = command(
            "run", checkpoint, "--probes", place.probes, "--config", options, "--output", output,
            "--reference", place.base,
        )  # fmt: skip
        assert done.code == 0, done.err
        return AuditRun.load(output).records

    together = audited(place.full, tmp_path / "together")
    audited(place.full / "checkpoint-1", tmp_path / "apart")
    apart = audited(place.full / "checkpoint-2", tmp_path / "apart")
    assert [record.step for record in apart] == [record.step for record in together] == [1, 2]
    angles = [record.low_rank["shift"][1].principal_angles for record in together]
    assert angles[0] is None
    assert angles[1] is not None
    assert [record.low_rank["shift"][1].principal_angles for record in apart] == [None, pytest.approx(angles[1])]


def test_the_step_is_given_or_read_from_the_folder(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(place.full / "checkpoint-1", tmp_path / "final")
    more = ["--reference", place.base, "--step", "70"]
    assert command(*arguments(place, tmp_path / "final", tmp_path / "out", *more)).code == 0
    assert [record.step for record in AuditRun.load(tmp_path / "out").records] == [70]
    refused = command(*arguments(place, place.full, tmp_path / "other", *more))
    assert refused.code == 2
    assert "--step names one step" in refused.err


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["new adapter", "pretrained adapter"])
def test_an_adapter_knows_its_reference(
    mode: str, command: Any, place: SimpleNamespace, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Adapters off for a new adapter; the frozen copy that the trainer saves beside a pretrained one."""
    done = command(*arguments(place, adapters[mode] / "checkpoint-1", tmp_path / "out"))
    assert done.code == 0, done.err
    (record,) = AuditRun.load(tmp_path / "out").records
    ours = AuditRun.load(adapters[mode]).records[-1]
    assert ours.step == record.step == 1
    source = {"new adapter": "the policy with its adapters off", "pretrained adapter": "the policy's 'ref' adapter"}
    assert record.reference_check.source == ours.reference_check.source == source[mode]
    assert record.key == ours.key
    assert record.margins.shift.mean == pytest.approx(ours.margins.shift.mean, rel=1e-5)
    assert record.margins.reference.mean == pytest.approx(ours.margins.reference.mean, rel=1e-6)
    if mode == "new adapter":  # the base, loaded on its own, is the same reference
        alone = arguments(place, adapters[mode] / "checkpoint-1", tmp_path / "alone", "--reference", place.base)
        assert command(*alone).code == 0
        (other,) = AuditRun.load(tmp_path / "alone").records
        assert other.margins.reference.mean == pytest.approx(record.margins.reference.mean, rel=1e-6)
        assert other.margins.shift.mean == pytest.approx(record.margins.shift.mean, rel=1e-4)


def test_an_adapter_saved_without_tokenizer_takes_its_bases(
    command: Any, place: SimpleNamespace, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(adapters["new adapter"] / "checkpoint-1" / name, tmp_path / "bare" / name)
    done = command(*arguments(place, tmp_path / "bare", tmp_path / "out"))
    assert done.code == 0, done.err
    (record,) = AuditRun.load(tmp_path / "out").records
    assert record.provenance.probe_hash == AuditRun.load(adapters["new adapter"]).records[0].provenance.probe_hash


# -- bad arguments: one clear message, exit code 2, no traceback -------------------------------------------------------


def test_a_missing_checkpoint(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    refused(command(*arguments(place, tmp_path / "nowhere", tmp_path / "out")), "no checkpoint at", "nowhere")
    (tmp_path / "empty").mkdir()
    done = command(*arguments(place, tmp_path / "empty", tmp_path / "out"))
    refused(done, "holds no config.json, no adapter_config.json and no checkpoint-N folder")


def test_a_full_model_with_no_reference(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    done = command(*arguments(place, place.full / "checkpoint-2", tmp_path / "out"))
    refused(done, "checkpoint-2 is a full model", "pass --reference")


def test_a_missing_reference(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    done = command(*arguments(place, place.full, tmp_path / "out", "--reference", tmp_path / "lost"))
    refused(done, "no such folder", "lost")


def test_a_reference_of_another_shape(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    done = command(*arguments(place, place.full, tmp_path / "out", "--reference", tmp_path / "other"))
    refused(done, "decoder layers 2 against the policy's 3")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("lost.jsonl", None, ("lost.jsonl: no such file",)),
        ("empty.jsonl", "", ("no records",)),
        ("broken.jsonl", '{"prompt": "a"', ("line 1: not valid JSON",)),
        ("columns.jsonl", '{"prompt": "a", "answer": "b"}\n', ("prompt, answer", "chosen, rejected")),
        ("equal.jsonl", '{"prompt": "a", "chosen": " b", "rejected": " b"}\n', ("no usable pair left", "differ")),
    ],
)
def test_probes_that_cannot_be_used(
    name: str, text: str | None, words: tuple[str, ...], command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    changed = SimpleNamespace(**{**vars(place), "probes": tmp_path / name})
    refused(command(*arguments(changed, place.full, tmp_path / "out", "--reference", place.base)), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_pears: 3", ("unknown option 'max_pears'", "max_pairs")),
        ("patching: {positions: middle}", ("patching.positions", "last_prompt_token", "'middle'")),
        ("patching: {drawes: 3}", ("unknown option 'patching.drawes'", "noise_draws")),
        ("max_pairs: [", ("cannot read the audit configuration",)),
        ("- 1", ("expected a mapping of options, found list",)),
        (None, ("cannot read the audit configuration",)),
    ],
)
def test_a_bad_options_file(
    text: str | None, words: tuple[str, ...], command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    changed = SimpleNamespace(**{**vars(place), "options": tmp_path / "bad.yaml"})
    refused(command(*arguments(changed, place.full, tmp_path / "out", "--reference", place.base)), *words)


def test_bad_values_of_options(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    common = arguments(place, place.full, tmp_path / "out", "--reference", place.base)
    refused(command(*common, "--max-pairs", "0"), "max_pairs", "greater than or equal to 1")
    refused(command(*common, "--device", "abacus"), "--device abacus cannot be used")
    done = command(*common, "--colour", "red")
    assert done.code == 2
    assert "No such option" in done.err


def test_an_output_that_cannot_be_written(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command(*arguments(place, place.full, tmp_path / "file" / "out", "--reference", place.base))
    refused(done, "cannot write the audit log in", "choose another")


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_audited(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    given = arguments(place, place.full, tmp_path / "out", "--reference", place.base)
    refused(command(*given, "--report", tmp_path), f"--report {tmp_path} is a folder; expected a file, such as")
    refused(command(*given, "--report", tmp_path / "no" / "page.html"), "there is no folder")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_audits_of_another_kind(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    """One log is one run: numbers of other pairs or of another reference cannot stand beside each other."""
    common = arguments(place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base)
    assert command(*common).code == 0
    before = (tmp_path / "out" / "align_audit" / "records.jsonl").read_bytes()
    other = arguments(place, place.full / "checkpoint-2", tmp_path / "out", "--reference", place.base)
    refused(command(*other, "--max-pairs", "3"), "other probe pairs", "--output")
    wrong = arguments(place, place.full / "checkpoint-2", tmp_path / "out", "--reference", place.full / "checkpoint-1")
    refused(command(*wrong), "another reference", "--output")
    mixed = arguments(place, place.full / "checkpoint-2", tmp_path / "out", "--reference", place.base, "--step", "1")
    refused(command(*mixed), "step 1 of another model", "--output")
    quick(patching={"noise_draws": 2}).to_yaml(tmp_path / "other.yaml")
    changed = SimpleNamespace(**{**vars(place), "options": tmp_path / "other.yaml"})
    again = arguments(changed, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base)
    refused(command(*again), "with other options", "--output")
    assert (tmp_path / "out" / "align_audit" / "records.jsonl").read_bytes() == before


def test_a_checkpoint_without_tokenizer(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(place.full / "checkpoint-1", tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*chat*"))
    done = command(*arguments(place, tmp_path / "bare", tmp_path / "out", "--reference", tmp_path / "bare"))
    refused(done, "no tokenizer found in bare", "processing_class.save_pretrained")
    assert command(*arguments(place, tmp_path / "bare", tmp_path / "out", "--reference", place.base)).code == 0


def test_a_tokenizer_without_pad_token_is_enough(place: SimpleNamespace) -> None:
    assert load_tokenizer([place.base]).pad_token is None


def test_the_command_itself(tmp_path: Path) -> None:
    """In its own process: help with an example; an error is a message and code 2, before anything heavy loads."""
    shown = subprocess.run(
        [sys.executable, "-m", "align_audit.cli.app", "run", "--help"], capture_output=True, text=True, check=True
    )
    example = "Example: align-audit run runs/dpo/checkpoint-500 --reference base-model --probes held-out.jsonl"
    assert example in " ".join(shown.stdout.split())
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "align_audit.cli.app", "run", "nowhere", "--probes", "pairs.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    loaded = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == [
        "align-audit: error: no checkpoint at nowhere: expected a folder with a saved model, or of checkpoint-N folders"
    ]
    assert loaded
    assert not {line.split("|")[-1].strip() for line in loaded} & {"torch", "transformers", "datasets", "numpy"}
    assert list(tmp_path.iterdir()) == []


def test_the_probes_are_checked_before_training_by_the_callback_too(place: SimpleNamespace, tmp_path: Path) -> None:
    """The same file serves both: what the callback reads is what the command reads."""
    callback = AlignmentAuditCallback(probes=str(place.probes), config=quick())
    with contextlib.redirect_stdout(None):
        stored = begin(build(tmp_path / "out", "precompute", [callback]), callback)
    ours = AuditRun.load(place.full).records[0]
    assert stored.records[0].provenance.probe_hash == ours.provenance.probe_hash


@pytest.mark.parametrize(("max_steps", "level"), [(None, "error"), (200, "error"), (1000, "warning")])
def test_rules_that_speak_of_a_share_of_the_run_know_its_length(
    max_steps: int | None, level: str, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    """From what the trainer left in the checkpoint; where it left nothing they go by steps."""
    for step in (60, 70):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(place.base, folder)
        if max_steps is not None:
            write_state(folder, step, max_steps)
    out = tmp_path / "out"
    done = command(*arguments(place, tmp_path / "run", out, "--reference", place.base))
    assert done.code == 0
    (alert,) = AuditRun.load(out).records[-1].alerts
    assert (alert.rule, alert.level) == ("never_started", level)
