"""A log read as it grows: each line once, whole, and from the start again where it is another log."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from align_audit.errors import RecordError
from align_audit.record import followed
from align_audit.record.followed import FollowedRun
from align_audit.record.log import FOLDER, RunLog
from align_audit.record.places import log_folders
from align_audit.record.run import AuditRun
from align_audit.record.training_log import TrainingLog
from tests.helpers.screens import a_run, calm

RUINED = a_run("ruined")


def write(folder: Path, *records: object) -> RunLog:
    log = RunLog(folder)
    for record in records:
        log.append(record)  # type: ignore[arg-type]
    return log


def test_it_is_what_a_load_would_give(tmp_path: Path) -> None:
    log = write(tmp_path, *RUINED[:2])
    log.append_failure(7, "Traceback\nValueError: no")
    run = FollowedRun(log.directory)
    assert run.refresh()[0]
    for record in RUINED[2:]:
        log.append(record)
        TrainingLog(tmp_path).append(record.step, {"loss": 0.5})
        assert run.refresh()[0]
    loaded = AuditRun.load(tmp_path)
    assert [record.to_json() for record in run.run.records] == [record.to_json() for record in loaded.records]
    assert run.run.failures == loaded.failures
    assert run.run.training_log == loaded.training_log
    assert run.run.status == loaded.status
    assert run.refresh() == (False, [])


def test_no_line_is_parsed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    head_of_line = followed.head_of_line
    monkeypatch.setattr(followed, "head_of_line", lambda line: parsed.append(line) or head_of_line(line))
    log = write(tmp_path, *RUINED[:3])
    run = FollowedRun(log.directory)
    run.refresh()
    log.append(RUINED[3])
    run.refresh()
    assert [line.decode() for line in parsed] == [record.to_json() for record in RUINED[:4]]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_half_a_line_is_waited_for(tmp_path: Path, cut: int) -> None:
    line = RUINED[0].to_json().encode() + b"\n"
    (tmp_path / FOLDER).mkdir()
    path = tmp_path / FOLDER / "records.jsonl"
    run = FollowedRun(tmp_path / FOLDER)
    with path.open("ab", buffering=0) as file:
        for first in range(0, len(line), len(line) // cut):
            file.write(line[first : first + len(line) // cut])
            run.refresh()
            assert (len(run.run.records) == 1) == (path.stat().st_size == len(line))
    assert (run.skipped, run.trouble) == (0, None)


def test_alerts_that_open_or_get_worse_are_news_once(tmp_path: Path) -> None:
    log = write(tmp_path, *RUINED[:3])
    run = FollowedRun(log.directory)
    assert run.refresh()[1] == []
    log.append(RUINED[3])
    _, news = run.refresh()
    assert [(alert.event, alert.level, alert.step) for alert in news] == [("opened", "error", 20)]
    log.append(RUINED[4])
    assert [alert for alert in run.refresh()[1] if alert.event == "open"] == []
    data = (log.directory / "records.jsonl").read_bytes()
    (log.directory / "records.jsonl").unlink()
    (log.directory / "records.jsonl").write_bytes(data)
    assert run.refresh() == (True, []), "the same log, written again"
    assert len(run.run.records) == 5


def test_a_log_that_begins_anew_or_goes_away(tmp_path: Path) -> None:
    log = write(tmp_path, *RUINED)
    run = FollowedRun(log.directory)
    run.refresh()
    log.set_aside()
    log.append(calm(0))
    assert run.refresh()[0]
    assert [record.step for record in run.run.records] == [0]
    shutil.rmtree(tmp_path)
    assert run.refresh()[0]
    assert len(run.run.records) == 0
    assert run.run.status.word == "BLIND"


def test_a_line_that_cannot_be_read_is_said_and_costs_no_other(tmp_path: Path) -> None:
    log = write(tmp_path, calm(0))
    path = log.directory / "records.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 3}\n')
    log.append(calm(5))
    run = FollowedRun(log.directory)
    run.refresh()
    assert [record.step for record in run.run.records] == [0, 5]
    assert run.skipped == 1
    assert run.trouble is not None and "records.jsonl" in run.trouble


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    log = write(tmp_path, calm(0))
    line = calm(5).to_json().replace('"schema_version":', '"schema_version":9', 1)
    with (log.directory / "records.jsonl").open("a") as file:
        file.write(line + "\n")
    run = FollowedRun(log.directory)
    run.refresh()
    assert run.trouble is not None and "newer" in run.trouble


def test_links_are_followed_once(tmp_path: Path) -> None:
    """To runs on another disk, and not to what has a name of its own there, nor in circles."""
    here, there = tmp_path / "here", tmp_path / "there"
    for name in (here / "own", there / "a", there / "sweep/b"):
        write(name, calm(0))
    for link, to in (("latest", here / "own"), ("scratch", there / "a"), ("sweep", there / "sweep"), ("up", tmp_path)):
        (here / link).symlink_to(to)
    (there / "sweep" / "round").symlink_to(here)
    names = [log.parent.relative_to(here).as_posix() for log in log_folders(here)]
    assert names == ["own", "scratch", "sweep/b"]


FOREIGN = ("", '{"mine": 1}\n', '{"step": 3, "loss": 0.1}\n', "not JSON\n", "[1]\n")
"""What another program may have written under a name of ours, the first of them nothing."""


@pytest.mark.parametrize("name", ["records.jsonl", "alerts.jsonl", "failures.jsonl"])
@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_of_another_program_hides_no_run(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path / "runs" / "dpo", calm(0))
    for folder in (tmp_path / "runs", tmp_path / "runs" / "dpo", tmp_path / "alone"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    log = tmp_path / "runs" / "dpo" / FOLDER
    assert log_folders(tmp_path / "runs") == [log] and log_folders(tmp_path) == [log]
    assert [record.step for record in AuditRun.load(tmp_path / "runs" / "dpo").records] == [0]
    # A log that was named, and is empty, is one of no audit.
    for place in [tmp_path / "alone", *([tmp_path / "alone" / name] if text else [])]:
        with pytest.raises(RecordError, match=r"no run log at|holds no audit"):
            AuditRun.load(place)


def test_a_copied_log_is_one_under_any_name(tmp_path: Path) -> None:
    log = write(tmp_path / "dpo", calm(0)).directory
    shutil.copytree(log, tmp_path / "copies" / "of dpo")
    assert log_folders(tmp_path / "copies" / "of dpo") == [tmp_path / "copies" / "of dpo"]
    (tmp_path / "records.jsonl").write_text("")
    assert len(AuditRun.load(tmp_path / "copies" / "of dpo" / "records.jsonl").records) == 1
    assert len(AuditRun.load(tmp_path / "records.jsonl").records) == 0


def test_where_runs_are_looked_for(tmp_path: Path) -> None:
    for name in ("dpo", "sweep/a", "sweep/b", "deep/1/2/3", "deep/1/2/3/4", "dpo/checkpoint-20", ".hidden"):
        write(tmp_path / name, calm(0))
    (tmp_path / "link").symlink_to(tmp_path / "sweep")  # which is there itself
    (tmp_path / "empty" / FOLDER).mkdir(parents=True)
    names = [log.parent.relative_to(tmp_path).as_posix() for log in log_folders(tmp_path)]
    assert names == ["deep/1/2/3", "dpo", "sweep/a", "sweep/b"]
    for place in (tmp_path / "dpo", tmp_path / "dpo" / FOLDER):
        assert log_folders(place) == [tmp_path / "dpo" / FOLDER]
    assert log_folders(tmp_path / "nowhere") == []


def test_a_folder_that_may_not_be_looked_into_holds_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user other than root meets that wherever a disk has its lost+found."""
    log = RunLog(tmp_path / "mine")
    log.append(calm(5))
    (tmp_path / "theirs").mkdir()
    is_file = Path.is_file

    def refused(self: Path) -> bool:
        if "theirs" in self.parts:
            raise PermissionError(13, "Permission denied")
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert log_folders(tmp_path) == [tmp_path / "mine" / FOLDER]
