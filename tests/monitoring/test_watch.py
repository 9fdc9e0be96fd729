"""The side process: checkpoints of a training are audited as they appear, in order, once, and never half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditRun
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, ProbeError, ReferenceUnavailableError
from align_audit.models.loading import load_model
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.monitoring import watch
from align_audit.monitoring.watch import WatchEnd, watch_checkpoints
from align_audit.record.log import RunLog
from tests.helpers.audits import QUICK
from tests.helpers.checkpoints import arrive, base_model, checkpoint_files, probe_file, write_state

HEALTH = AuditConfig.from_dict({**QUICK, "patching": {"enabled": False}})
"""The least that can be asked of an audit of a checkpoint."""


class Place:
    """A training's folder, three checkpoints that can be put there, and the lines that a watch says."""

    def __init__(self, made: Path, run: Path) -> None:
        self.made, self.run = made, run
        self.base, self.probes = made / "base", made / "probes.jsonl"
        run.mkdir()
        self.said: list[str] = []
        self.told: list[str] = []

    def put(self, *steps: int) -> None:
        for step in steps:
            # With the times of the copies: a checkpoint is as old as it was written.
            shutil.copytree(
                self.made / f"checkpoint-{step}", self.run / f"checkpoint-{step}", copy_function=shutil.copy
            )
            write_state(self.run / f"checkpoint-{step}", step, 3)

    def watch(self, **changes: Any) -> WatchEnd:
        said = {"say": self.said.append, "tell": self.told.append}
        options: dict[str, Any] = {"every": 0.02, "idle": 30.0, "settled": 0.3, **said, **changes}
        reference, config = options.pop("reference", str(self.base)), options.pop("config", HEALTH)
        return watch_checkpoints(self.run, reference, self.probes, config, **options)

    @property
    def steps(self) -> list[int]:
        """Of the records, in the order of the log's lines."""
        lines = (self.run / "align_audit" / "records.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    probe_file(folder)
    base = base_model(folder)
    for step in (1, 2, 3):
        checkpoint_files(base, folder / f"checkpoint-{step}", step, 3)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return Place(made, tmp_path / "run")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that were loaded."""
    names: list[str] = []
    load = watch.CheckpointAuditor.load

    def counted(self: Any, folder: Path) -> Any:
        names.append(folder.name)
        return load(self, folder)

    monkeypatch.setattr(watch.CheckpointAuditor, "load", counted)
    return names


def test_those_that_wait_are_audited_in_order_until_training_has_ended(place: Place) -> None:
    place.put(3, 1, 2)
    end = place.watch()
    assert place.steps == [1, 2, 3]
    assert end.reason == "training ended at step 3, and all its checkpoints are done"
    assert "3 checkpoints wait (steps 1, 2, 3); the oldest is audited first" in place.said
    assert not place.told and not end.broken
    run = AuditRun.load(place.run)
    assert [record.provenance.policy_hash for record in run.records] == [
        fingerprint(load_model(place.run / f"checkpoint-{step}")) for step in (1, 2, 3)
    ]
    assert [row.step for row in run.training_log] == [1, 2, 3], "what the trainer logged is kept beside"
    assert run.records[0].extra["checkpoint"]["folder"] == "checkpoint-1"


def test_a_second_start_loads_nothing_that_the_log_has(place: Place, loaded: list[str]) -> None:
    place.put(1, 2)
    assert place.watch(idle=0.0).audited == [place.run / "checkpoint-1", place.run / "checkpoint-2"]
    place.put(3)
    end = place.watch()
    assert loaded == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [folder.name for folder in end.in_log] == ["checkpoint-1", "checkpoint-2"]
    assert place.steps == [1, 2, 3]
    for folder in place.run.glob("checkpoint-*"):  # as a copy would have them
        os.utime(folder / "config.json")
        os.utime(folder / "trainer_state.json")
    assert place.watch().audited
    assert place.steps == [1, 2, 3], "their weights are in the log, whatever the times of their files"


def test_a_checkpoint_that_is_being_written_is_not_read(place: Place, loaded: list[str]) -> None:
    slow = threading.Thread(target=arrive, args=(place.made / "checkpoint-3", place.run / "checkpoint-3", 0.1))
    place.put(1)
    slow.start()
    end = place.watch()
    slow.join()
    assert not end.broken and not place.told
    assert loaded == ["checkpoint-1", "checkpoint-3"]
    assert place.steps == [1, 3]
    expected = fingerprint(load_model(place.made / "checkpoint-3"))
    assert AuditRun.load(place.run).records[-1].provenance.policy_hash == expected


def test_without_a_trainers_state_when_nothing_changes_any_more(place: Place) -> None:
    place.put(1)
    (place.run / "checkpoint-1" / "trainer_state.json").unlink()
    began = time.monotonic()
    end = place.watch(idle=0.5)
    assert time.monotonic() - began > 0.3
    assert place.steps == [1]
    assert end.reason == "nothing new came for 0.5 s (--idle)"


def test_a_later_one_waits_for_an_earlier_one_that_is_still_copied(place: Place) -> None:
    """An earlier step after a later one would be a training that was resumed."""
    place.put(3)
    slow = threading.Thread(target=arrive, args=(place.made / "checkpoint-2", place.run / "checkpoint-2", 0.05))
    slow.start()
    time.sleep(0.05)
    place.watch()
    slow.join()
    assert place.steps == [2, 3]


def test_one_that_stays_torn_is_passed_over_and_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TORN_AFTER", 0.2)
    place.put(1, 2, 3)
    with (place.run / "checkpoint-2" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    end = place.watch()
    assert place.steps == [1, 3]
    assert [folder.name for folder in end.broken] == ["checkpoint-2"]
    assert place.told == [
        "checkpoint-2 is passed over: it is not complete: model.safetensors is not as long as its header says"
    ]
    assert [failure.step for failure in AuditRun.load(place.run).failures] == [2]


def test_one_that_cannot_be_audited_is_passed_over_and_kept(place: Place) -> None:
    place.put(1, 2, 3)
    (place.run / "checkpoint-2" / "config.json").write_text("{}")
    write_state(place.run / "checkpoint-2", 2, 3)
    end = place.watch()
    assert place.steps == [1, 3]
    assert [folder.name for folder in end.broken] == ["checkpoint-2"]
    (failure,) = AuditRun.load(place.run).failures
    assert failure.step == 2 and "Traceback" in failure.error
    assert len(place.told) == 1 and place.told[0].startswith("checkpoint-2 is passed over: cannot load")


def test_one_that_is_deleted_before_its_turn_or_while_it_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """``save_total_limit`` does both; it is said, nothing of it is kept, and the others go on."""
    place.put(1, 2, 3)
    load = watch.CheckpointAuditor.load

    def with_rotation(self: Any, folder: Path) -> Any:
        if folder.name == "checkpoint-1":
            shutil.rmtree(place.run / "checkpoint-1")
            shutil.rmtree(place.run / "checkpoint-2")
        return load(self, folder)

    monkeypatch.setattr(watch.CheckpointAuditor, "load", with_rotation)
    end = place.watch()
    assert place.steps == [3]
    assert place.told == [
        "checkpoint-1 was deleted while it was read; nothing of it was audited",
        "checkpoint-2 was deleted before it was audited (save_total_limit?)",
    ]
    assert not end.broken and AuditRun.load(place.run).failures == []
    assert not (place.run / "align_audit" / "step-1").exists()


def test_one_that_is_written_to_while_it_is_read_is_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put(3)
    load = watch.CheckpointAuditor.load

    def with_rewriting(self: Any, folder: Path) -> Any:
        policy = load(self, folder)
        if not place.told:
            shutil.copy(place.made / "checkpoint-2" / "model.safetensors", folder / "model.safetensors")
            write_state(folder, 3, 3)
        return policy

    monkeypatch.setattr(watch.CheckpointAuditor, "load", with_rewriting)
    place.watch()
    assert place.told == ["checkpoint-3 changed while it was read; nothing of it was audited"]
    (record,) = AuditRun.load(place.run).records
    assert record.provenance.policy_hash == fingerprint(load_model(place.made / "checkpoint-2"))


def test_one_that_is_deleted_while_it_is_audited_is_audited_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put(1, 3)
    prepare = watch.CheckpointAuditor.prepare

    def with_rotation(self: Any, policy: Any, folder: Path, *given: Any, **named: Any) -> Any:
        (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
        shutil.rmtree(folder)
        return prepare(self, policy, folder, *given, **named)

    monkeypatch.setattr(watch.CheckpointAuditor, "prepare", with_rotation)
    place.watch(idle=0.0)
    assert place.steps == [1, 3]
    hashes = [record.provenance.policy_hash for record in AuditRun.load(place.run).records]
    assert hashes == [fingerprint(load_model(place.made / f"checkpoint-{step}")) for step in (1, 3)]


def test_a_training_that_was_resumed_writes_its_steps_anew(place: Place) -> None:
    place.put(1, 2)
    place.watch(idle=0.0)
    shutil.rmtree(place.run / "checkpoint-2")
    shutil.copytree(place.made / "checkpoint-3", place.run / "checkpoint-2", copy_function=shutil.copy)
    write_state(place.run / "checkpoint-2", 2, 3)
    place.watch(idle=0.0)
    assert place.steps == [1, 2, 2]
    assert AuditRun.load(place.run).status.word != "BLIND"


def test_one_older_than_what_was_audited_is_no_resumed_training(place: Place) -> None:
    place.put(1, 2)
    shutil.move(place.run / "checkpoint-1", place.run / "aside")
    place.watch(idle=0.0)
    shutil.move(place.run / "aside", place.run / "checkpoint-1")
    place.watch(idle=0.0)
    assert place.steps == [2]
    assert "checkpoint-1 is passed over: it is older than what was audited of step 2" in place.told[0]


def test_idle_names_what_never_became_complete(place: Place) -> None:
    place.put(1)
    (place.run / "checkpoint-1" / "config.json").unlink()
    end = place.watch(idle=0.1)
    assert end.reason == "nothing new came for 0.1 s (--idle)"
    words = "it has no config.json and no adapter_config.json"
    assert place.told == [f"checkpoint-1 is passed over: it is not complete: {words}"]
    assert [folder.name for folder in end.broken] == ["checkpoint-1"]
    assert [failure.step for failure in AuditRun.load(place.run).failures] == [1]


@pytest.mark.parametrize("shards", ["pytorch_model_fsdp_0", "global_step1"])
def test_where_every_checkpoint_is_in_shards_it_is_said_while_training_runs(
    place: Place, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is ever complete: nothing would be heard until the end."""
    monkeypatch.setattr(watch, "TORN_AFTER", 0.05)
    for step in (1, 2):
        (place.run / f"checkpoint-{step}" / shards).mkdir(parents=True)
        (place.run / f"checkpoint-{step}" / shards / "__0_0.distcp").write_bytes(b"x")
        write_state(place.run / f"checkpoint-{step}", step, 3)
    place.watch(idle=0.3)
    words = f"its weights are in the shards of {shards}, of the engine that trained it; "
    assert place.told[0].startswith(f"checkpoint-1 waits, and those after it: {words}")
    assert [line.split(":")[0] for line in place.told[1:]] == [f"checkpoint-{step} is passed over" for step in (1, 2)]
    with pytest.raises(ReferenceUnavailableError, match=f"holds no model: {words}"):
        load_model(place.run / "checkpoint-1")


def test_an_interrupt_ends_it_and_leaves_nothing_half(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put(1, 2)
    audit = watch.CheckpointAuditor.audit

    def interrupted(self: Any, prepared: Any) -> Any:
        if prepared.moment.step == 2:
            raise KeyboardInterrupt
        return audit(self, prepared)

    monkeypatch.setattr(watch.CheckpointAuditor, "audit", interrupted)
    end = place.watch()
    assert end.interrupted
    assert end.reason == "stopped; the audit of checkpoint-2 was given up, and is made at the next start"
    monkeypatch.undo()
    place.watch(idle=0.0)
    assert place.steps == [1, 2]


def test_a_folder_that_goes_away_for_a_while(place: Place) -> None:
    place.put(3)
    output = place.run.parent / "log"
    place.run.rename(place.run.with_name("away"))
    place.run.mkdir()
    watching = watch.Arrivals.look
    tries = 0

    def look(self: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 2:
            place.run.rmdir()
        if tries == 4:
            place.run.with_name("away").rename(place.run)
        return watching(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Arrivals, "look", look)
        end = place.watch(output=output)
    assert [record.step for record in AuditRun.load(output).records] == [3]
    assert len(place.told) == 1 and "tried again" in place.told[0]
    assert not end.broken


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_log_that_another_process_writes(place: Place) -> None:
    program = f"""
from align_audit.record.log import RunLog
log = RunLog({str(place.run)!r})
print("ready", flush=True)
input()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with pytest.raises(ConfigurationError, match=r"another process .* writes the audit log in .*--output"):
            place.watch()
    finally:
        holder.communicate("\n")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda place: place.run.rmdir(), ConfigurationError, "no folder at"),
        (lambda place: setattr(place, "probes", place.run / "lost.jsonl"), ProbeError, "lost.jsonl: no such file"),
        (lambda place: setattr(place, "base", place.run / "lost"), ReferenceUnavailableError, "cannot load"),
        (
            lambda place: setattr(place, "run", place.run / "checkpoint-1"),
            ConfigurationError,
            "is a checkpoint itself; expected the output directory",
        ),
    ],
    ids=["no run", "no probes", "no reference", "a checkpoint"],
)
def test_what_no_checkpoint_can_be_audited_with(
    place: Place, change: Callable[[Place], None], error: type[Exception], words: str
) -> None:
    place.put(1)
    if words == "no folder at":
        shutil.rmtree(place.run / "checkpoint-1")
    change(place)
    with pytest.raises(error, match=words):
        place.watch()
    if place.run.is_dir():
        RunLog(place.run).close()


def test_a_full_model_and_no_reference(place: Place) -> None:
    place.put(1)
    with pytest.raises(ReferenceUnavailableError, match="is a full model"):
        place.watch(reference=None)


def test_other_pairs_than_the_logs(place: Place) -> None:
    place.put(1)
    place.watch(idle=0.0)
    with pytest.raises(ConfigurationError, match="other probe pairs"):
        place.watch(config=HEALTH.model_copy(update={"max_pairs": 3}))


# -- processes ---------------------------------------------------------------------------------------------------------


def start(place: Place) -> subprocess.Popen[str]:
    options = place.run.parent / "audit.yaml"
    HEALTH.to_yaml(options)
    command = [
        sys.executable, "-m", "align_audit", "watch", place.run, "--probes", place.probes, "--reference", place.base,
        "--config", options, "--every", "0.1", "--device", "cpu",
    ]  # fmt: skip
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(test: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not test():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


def test_killed_or_terminated_it_goes_on_where_it_was(place: Place) -> None:
    records = place.run / "align_audit" / "records.jsonl"
    place.put(1)
    process = start(place)
    until(lambda: records.exists() and place.steps == [1], process)
    place.put(2)
    process.kill()
    process.communicate()
    process = start(place)
    until(lambda: len(place.steps) == 2, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    # A line whose writing is interrupted is taken back, and what is said of it is what is on disk.
    done = "1 audited, 1 in the log already" if place.steps == [1, 2] else "1 in the log already"
    assert out.rstrip().endswith(f"checkpoints: {done}") and "Traceback" not in out
    assert ("audit of checkpoint-2 was given up" in out) == (place.steps == [1])
    place.put(3)
    end = place.watch()
    assert len(end.in_log) + len(end.audited) == 3
    assert place.steps == [1, 2, 3]
