"""Curves that a kill, or a deleted folder, left out are written by the process that goes on; none of them twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from align_audit.record.log import RunLog
from align_audit.record.run import AuditRun
from align_audit.writers.event_files import TagsWritten, event_files, find_event_folder
from align_audit.writers.few_scalars import few_scalars
from align_audit.writers.scalars import scalars
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import TensorBoard
from tests.helpers.callback_runs import quick, run
from tests.helpers.make_record import make_run

# The pairs do not matter here, so the trainer has no eval set.
pytestmark = pytest.mark.filterwarnings("ignore:align_audit found no held-out pairs")

KILLED = """
import json, os, signal, sys
from pathlib import Path
from align_audit.writers.tensorboard import TensorBoard
from tests.helpers.callback_runs import quick, run

moment, record = "", TensorBoard.record
def killed(self, one, history):
    if one.step == 2:
        if moment == "half":
            board = self._summary_writer()
            board.add_scalar("align_audit/margins/kl", one.margins.kl.mean, 2)
            board.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, one, history)
TensorBoard.record = killed
ends = {}
for moment in ("before", "half"):
    if not (child := os.fork()):
        run(Path(sys.argv[1]) / moment, quick(tensorboard="auto", tensorboard_scalars="all", tensorboard_images=False,
            schedule={"every_n_steps": 1}),
            attach=False, save_steps=1)
        os._exit(0)
    ends[moment] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""
"""Two runs, one after the other, each in a process of its own that is killed; what they import is imported once."""
CONFIG = {
    "tensorboard": "auto", "tensorboard_scalars": "all", "tensorboard_images": False, "schedule": {"every_n_steps": 1},
}  # fmt: skip


def counted(output: Path) -> Counter[tuple[str, int]]:
    """How often each tag was written at each step, in all event files of a run."""
    counts: Counter[tuple[str, int]] = Counter()
    for path in event_files(output):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        counts.update((tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))
        counts.update((tag, event.step) for tag in events.Tags()["tensors"] for event in events.Tensors(tag))
    return counts


def points(output: Path, tag: str) -> list[int]:
    """The steps of a curve, in ascending order."""
    return sorted(step for (name, step), count in counted(output).items() for _ in range(count) if name == tag)


def each_once(output: Path, everything: bool = True) -> None:
    counts = counted(output)
    records = AuditRun.load(output).records
    for record in records:
        few = (*few_scalars(standing_at(record, records)), "align_audit health/status/text_summary")
        rest = (*scalars(record), "align_audit/controls/text_summary", "align_audit/not_known/text_summary")
        for tag in (*few, *(rest if everything else ())):
            assert counts[tag, record.step] == 1, (tag, record.step)
        assert everything or not any(counts[tag, record.step] for tag in rest)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """The folder of the runs that were killed, by moment; how each ended; and what they said."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("moment", ["before", "half"])
def test_a_step_killed_between_log_and_tensorboard_has_its_curves_after_the_run_goes_on(
    killed: tuple[Path, dict[str, int], str], moment: str
) -> None:
    folder, ends, said = killed
    output = folder / moment
    assert ends[moment] == -signal.SIGKILL, said
    assert [record.step for record in AuditRun.load(output).records] == [0, 1, 2]
    assert points(output, "align_audit/margins/shift") == [0, 1]
    run(output, quick(**CONFIG), attach=False, save_steps=1, resume=str(output / "checkpoint-1"))
    assert [record.step for record in AuditRun.load(output).records] == [0, 1, 2, 3]
    each_once(output)


def test_a_deleted_folder_is_written_again(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, quick(**CONFIG), attach=False, save_steps=1, max_steps=2)
    shutil.rmtree(output / "align_audit" / "tensorboard")
    run(output, quick(**CONFIG), attach=False, save_steps=1, max_steps=3, resume=True)
    assert points(output, "align_audit/margins/shift") == [0, 1, 2, 3]
    each_once(output)


def written(output: Path) -> RunLog:
    log = RunLog(output)
    for record in make_run("destabilizing", audits=3, layers=2):
        log.append(record)
    return log


def begin(output: Path, log: RunLog, images: bool = False, which: Literal["few", "all"] = "all") -> None:
    board = TensorBoard(output, lambda: None, images=images, scalars=which)
    board.start(AuditRun.of(log))
    board.close()


def test_nothing_is_written_twice_however_often_a_run_goes_on(tmp_path: Path) -> None:
    log = written(tmp_path)
    for _ in range(3):
        begin(tmp_path, log)
    each_once(tmp_path)
    # Old curves of another run, in the trainer's own folder, are not this run's.
    board = SummaryWriter(str(tmp_path / "runs" / "old"))
    for record in log.records:
        for tag, value in scalars(record).items():
            board.add_scalar(tag, value, record.step, walltime=1.0)
        board.add_text("align_audit/controls", "old", record.step, walltime=1.0)
    board.close()
    shutil.rmtree(tmp_path / "align_audit" / "tensorboard")
    begin(tmp_path, log)
    assert points(tmp_path, "align_audit/margins/shift") == [0, 0, 50, 50, 100, 100]


def test_the_few_are_not_written_twice_either_and_not_confused_with_all(tmp_path: Path) -> None:
    log = written(tmp_path)
    for _ in range(2):
        begin(tmp_path, log, which="few")
        each_once(tmp_path, everything=False)
    begin(tmp_path, log, which="all")
    each_once(tmp_path)


@pytest.mark.parametrize("which", ["few", "all"])
def test_an_event_file_cut_off_anywhere_is_completed(tmp_path: Path, which: Literal["few", "all"]) -> None:
    log = written(tmp_path / "whole")
    begin(tmp_path / "whole", log, which=which)
    (whole,) = event_files(tmp_path / "whole")
    data = whole.read_bytes()
    for cut in range(0, len(data), len(data) // 7):
        output = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", output)
        (file,) = event_files(output)
        os.truncate(file, cut)
        begin(output, RunLog(output), which=which)
        each_once(output, everything=which == "all")


def test_a_damaged_event_file_stops_nothing(tmp_path: Path) -> None:
    log = written(tmp_path)
    folder = tmp_path / "align_audit" / "tensorboard"
    folder.mkdir()
    for number, data in enumerate((b"", b"\xff" * 500, b"\x05" + bytes(11) + b"align_audit/", bytes(4000))):
        (folder / f"events.out.tfevents.{number}").write_bytes(data)
    (folder / "events.out.tfevents.9").mkdir()
    tags = TagsWritten("/controls/text_summary")
    for path in event_files(tmp_path):
        tags.read(path)
    assert not tags.at(0, 0.0)
    begin(tmp_path, log)
    files = [path for path in folder.iterdir() if path.name.endswith(".align_audit")]
    tags.read(files[0])
    assert all(tags.complete("align_audit", step, 0.0) for step in (0, 50, 100))


def test_a_link_that_leads_nowhere_is_no_event_file(tmp_path: Path) -> None:
    """Trackers' clients leave such links in the output folder; no training is refused for them."""
    log = RunLog(tmp_path / "out")
    (tmp_path / "out" / "wandb").mkdir()
    (tmp_path / "out" / "wandb" / "events.out.tfevents.1.host.1.0").symlink_to(tmp_path / "nowhere")
    assert event_files(tmp_path / "out") == []
    board = TensorBoard(tmp_path / "out", lambda: None)
    board.start(AuditRun.of(log))
    board.close()
    assert len(event_files(tmp_path / "out")) == 1


def test_only_the_last_audit_is_drawn_again(tmp_path: Path) -> None:
    log = written(tmp_path)
    begin(tmp_path, log, images=True)
    events = EventAccumulator(str(tmp_path / "align_audit" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    assert "align_audit/margins/margins_over_steps" in tags
    assert {event.step for tag in tags for event in events.Images(tag)} == {100}


def test_a_file_of_another_host_with_this_process_id_is_another_runs(tmp_path: Path) -> None:
    """In containers every run may be process 1."""
    for folder, host in (("theirs", "elsewhere"), ("ours", socket.gethostname())):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"events.out.tfevents.1700000000.{host}.{os.getpid()}.0").touch()
        expected = tmp_path / "ours" if folder == "ours" else None
        assert find_event_folder(tmp_path) == expected
