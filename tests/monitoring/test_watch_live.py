"""The side process beside a training that saves, and deletes, checkpoints in another process; killed twice on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from align_audit import AuditRun
from align_audit.config import AuditConfig
from tests.helpers.audits import QUICK
from tests.helpers.checkpoints import probe_file

ROOT = Path(__file__).resolve().parents[2]
LAST = 8

TRAINING = """
import sys, time
from pathlib import Path
from transformers import TrainerCallback
from align_audit import AlignmentAuditCallback, AuditConfig
from tests.helpers.dpo import build

folder = Path(sys.argv[1])

class Permitted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        while not (folder / f"go-{state.global_step}").exists():
            time.sleep(0.02)

audit = AlignmentAuditCallback(probes=str(folder / "probes.jsonl"), config=AuditConfig.from_yaml(folder / "audit.yaml"))
run = build(
    folder / "run" / "out", "ref_model made", [audit, Permitted()], base=folder / "base",
    max_steps=int(sys.argv[2]), save_steps=1, save_total_limit=2,
)
audit.attach(run.trainer)
run.trainer.train()
"""


class Live:
    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.output = folder, folder / "run" / "out", folder / "watched"
        probe_file(folder)
        AuditConfig.from_dict(QUICK).to_yaml(folder / "audit.yaml")
        self.processes: list[subprocess.Popen[bytes]] = []
        """In the order in which they were started."""

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        with self.printed(len(self.processes)).open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
            )
        self.processes.append(process)
        return process

    def printed(self, number: int) -> Path:
        """What a process prints, by the order in which they were started."""
        return self.folder / f"printed-{number}.txt"

    def watch(self) -> subprocess.Popen[bytes]:
        return self.start(
            "-m", "align_audit", "watch", self.run, "--probes", self.folder / "probes.jsonl", "--reference",
            self.folder / "base", "--config", self.folder / "audit.yaml", "--output", self.output, "--every", "0.1",
            "--device", "cpu",
        )  # fmt: skip

    def permit(self, *steps: int) -> None:
        for step in steps:
            (self.folder / f"go-{step}").touch()

    @property
    def steps(self) -> list[int]:
        """Those of the watch's log, in the order of its lines."""
        path = self.output / "align_audit" / "records.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def saved(self, step: int) -> bool:
        return (self.run / f"checkpoint-{step}" / "trainer_state.json").exists()

    def until(self, test: Callable[[], bool], *running: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 240
        while not test():
            for process in running:
                assert process.poll() is None, self.printed(self.processes.index(process)).read_text()
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.slow
def test_every_checkpoint_that_still_exists_is_audited_once_with_the_callbacks_numbers(tmp_path: Path) -> None:
    live = Live(tmp_path)
    training = live.start("-c", TRAINING, tmp_path, LAST)
    try:
        live.permit(1, 2)
        live.until(lambda: live.saved(1), training)
        first = live.watch()
        live.until(lambda: live.steps == [1], training, first)
        first.kill()  # in the audit of checkpoint-2, or just before it
        live.permit(3, 4, 5)
        live.until(lambda: live.saved(5), training)
        second = live.watch()
        live.until(lambda: live.steps[-1] >= 4, training, second)
        second.kill()
        third = live.watch()
        live.until(lambda: live.steps[-1] == 5, training, third)
        live.permit(*range(6, LAST + 1))  # checkpoints are deleted while it audits
        status = third.wait(timeout=240)
        assert training.wait(timeout=60) == 0
    finally:
        for process in live.processes:
            process.kill()
            process.wait()
    out = live.printed(3).read_text()
    assert status == 0, out
    assert f"training ended at step {LAST}" in out and "Traceback" not in out
    assert len(set(live.steps)) == len(live.steps) and live.steps == sorted(live.steps)
    assert {1, 4, 5, LAST} <= set(live.steps)
    assert 3 not in live.steps, "it was deleted before anybody looked"
    run = AuditRun.load(live.output)
    assert run.failures == []
    by_step = {record.step: record for record in AuditRun.load(live.run).records if record.kind == "full"}
    for record in run.records:
        called_back = by_step[record.step]
        assert record.key == called_back.key
        assert record.margins.shift.mean == pytest.approx(called_back.margins.shift.mean, rel=1e-6)
        assert record.margins.kl.mean == pytest.approx(called_back.margins.kl.mean, rel=1e-6)
        assert record.patching is not None and called_back.patching is not None
        for here, there in zip(record.patching.effect, called_back.patching.effect, strict=True):
            assert here.mean == pytest.approx(there.mean, rel=1e-5, abs=1e-7)
