"""Where runs are looked for: below TensorBoard's log folders, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from align_audit.writers.web.log_folders import LogFolder, folders_of, log_beside, logs_in


def a_log(folder: Path) -> Path:
    """An audit log of a training run whose events lie where the trainer writes them."""
    (folder / "runs" / "Jan01_00-00-00_host").mkdir(parents=True)
    (folder / "align_audit").mkdir()
    (folder / "align_audit" / "records.jsonl").write_text("")
    return folder / "align_audit"


def names(*folders: LogFolder) -> list[str]:
    return [log.name for log in logs_in(folders)]


def test_runs_are_named_by_their_folders_from_the_log_folder_on(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    for place in ("dpo/b", "dpo/a", "ipo"):
        a_log(root / place)
    assert names(LogFolder(root)) == ["dpo/a", "dpo/b", "ipo"]
    assert names(LogFolder(root / "dpo", "x")) == ["x/a", "x/b"]
    assert names(LogFolder(root / "ipo")) == ["ipo"]
    assert names(LogFolder(root / "ipo", "x")) == ["x"]
    assert names(LogFolder(root / "ipo" / "align_audit")) == ["align_audit"]


def test_a_run_in_two_log_folders_is_one_run(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    a_log(root / "dpo" / "a")
    assert names(LogFolder(root), LogFolder(root / "dpo")) == ["dpo/a"]


def test_keys_say_nothing_of_where_a_log_is_and_stay(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    for place in ("a", "b"):
        a_log(root / place)
    keys = [log.key for log in logs_in([LogFolder(root)])]
    assert len(set(keys)) == 2
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)
    assert keys == [log.key for log in logs_in([LogFolder(root)])]


@pytest.mark.parametrize("link", ["run", "align_audit", "records.jsonl", "training.jsonl", "course.jsonl"])
def test_links_lead_nowhere_outside(tmp_path: Path, link: str) -> None:
    root = tmp_path.resolve() / "logs"
    outside = a_log(tmp_path.resolve() / "secret")
    for name in ("training.jsonl", "course.jsonl"):
        (outside / name).write_text("")
    root.mkdir()
    if link == "run":
        (root / "run").symlink_to(outside.parent)
    elif link == "align_audit":
        (root / "run").mkdir()
        (root / "run" / "align_audit").symlink_to(outside)
    else:
        inside = a_log(root / "run")
        assert names(LogFolder(root)) == ["run"]
        (inside / link).unlink(missing_ok=True)
        (inside / link).symlink_to(outside / link)
    assert names(LogFolder(root)) == []


def test_a_log_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    a_log(tmp_path / "real" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(*folders_of(str(tmp_path / "link"))) == ["run"]


def test_options_of_tensorboard_are_read_as_it_reads_them(tmp_path: Path) -> None:
    home = os.path.realpath(os.path.expanduser("~"))
    assert folders_of("") == []
    assert folders_of("gs://bucket/logs") == []
    assert folders_of("~/logs") == [LogFolder(Path(home, "logs"))]
    assert folders_of("/nowhere/a,b:c") == [LogFolder(Path("/nowhere/a,b:c"))]
    assert folders_of("", "x:/nowhere/a:b,/nowhere/c:d,,y:gs://bucket") == [
        LogFolder(Path("/nowhere/a:b"), "x"),
        LogFolder(Path("/nowhere/c:d")),
    ]


def test_a_log_beside_the_log_folder_is_seen_but_not_read(tmp_path: Path) -> None:
    a_log(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    folders = [LogFolder((tmp_path / "run" / "runs").resolve())]
    assert logs_in(folders) == []
    assert log_beside(folders) == (tmp_path / "run").resolve()
    assert log_beside([LogFolder((tmp_path / "empty").resolve())]) is None
