"""The log when what it stands on is taken away: disk space, its folder, its file's end, the process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from align_audit.errors import ConfigurationError
from align_audit.files import write_atomically
from align_audit.record import lock as lock_module
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import ALERTS, FAILURES, FOLDER, RECORDS, RunLog
from align_audit.record.run import AuditRun
from tests.helpers.make_record import make_record
from tests.record.test_log import same, small

HOLDER = """
import sys
from align_audit.record.log import RunLog
log = RunLog(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting takes root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves 4 KB of a disk: less than a large record takes, so that a part of it fits."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    os.truncate(filler, filler.stat().st_size - 4096)
    return filler


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the log under ``tmp_path`` open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


@pytest.mark.parametrize("end", [b'{"step": 2, "sche', b'{"step": 2}'])
def test_what_another_process_left_without_a_newline_swallows_no_record(tmp_path: Path, end: bytes) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    for name in (RECORDS, ALERTS):
        with (log.directory / name).open("ab") as file:
            file.write(end)
    assert log.append(small(2))
    with pytest.warns(UserWarning, match="line 2 of .* is skipped"):
        run = AuditRun.load(tmp_path)
    assert same(run.records, [small(1), small(2)])
    assert end + b"\n" in (log.directory / RECORDS).read_bytes()


@pytest.mark.filterwarnings("ignore:alerts could not be copied")
def test_a_full_disk_leaves_the_log_whole_and_the_next_append_works(small_disk: Path) -> None:
    log = RunLog(small_disk)
    assert log.append(make_record(1, layers=4))
    filler = fill(small_disk)
    large = make_record(2, layers=40)
    assert len(large.to_json()) > 8192
    whole = (log.directory / RECORDS).read_bytes()
    for step in (2, 3, 4):
        with pytest.raises(OSError, match="No space left"):
            log.append(large.model_copy(update={"step": step}))
        assert (log.directory / RECORDS).read_bytes() == whole
    with pytest.raises(OSError, match="No space left"):
        log.append_failure(2, "x" * 50_000)
    filler.unlink()
    with pytest.warns(UserWarning, match="3 audits that the disk had refused are in"):
        assert log.append(make_record(5, layers=4))
    assert [record.step for record in AuditRun.load(small_disk).records] == [1, 2, 3, 4, 5]
    assert AuditRun.load(small_disk).failures == []
    assert len((log.directory / RECORDS).read_bytes().splitlines()) == 5


def test_alerts_that_found_no_room_are_said_and_restored(small_disk: Path) -> None:
    log = RunLog(small_disk)
    filler = fill(small_disk)
    assert len(small(1).to_json()) <= 4096
    with pytest.warns(UserWarning, match="alerts could not be copied"):
        assert log.append(small(1))
    filler.unlink()
    assert (log.directory / ALERTS).read_bytes() == b""
    assert len(RunLog(small_disk).records) == 1
    assert len((log.directory / ALERTS).read_bytes().splitlines()) == 1


def test_a_deleted_folder_is_made_again_with_the_records_so_far(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.append(small(step))
    shutil.rmtree(tmp_path / FOLDER)
    log.save_arrays(3, "arrays", {"x": np.ones(1)})
    with pytest.warns(UserWarning, match=r"deleted or replaced .* its 2 records"):
        assert log.append(small(3))
    log.append(small(4))
    run = AuditRun.load(tmp_path)
    assert same(run.records, [small(step) for step in (1, 2, 3, 4)])
    assert (len(run.alerts), len((log.directory / ALERTS).read_bytes().splitlines())) == (4, 4)
    assert run.load_arrays(3, "arrays")["x"].tolist() == [1]
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.warns(UserWarning, match="its 4 records"):
        log.append_failure(5, "ValueError")
    assert (len(AuditRun.load(tmp_path).records), len(AuditRun.load(tmp_path).failures)) == (4, 1)


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    log = RunLog("run")
    log.append(small(1))
    monkeypatch.chdir(tmp_path / "elsewhere")
    log.append(small(2))
    log.save_arrays(2, "arrays", {"x": np.ones(1)})
    assert len(AuditRun.load(tmp_path / "run").records) == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*deleted or replaced")
def test_a_link_that_now_leads_elsewhere_takes_the_whole_log_along(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    link = tmp_path / "run"
    link.symlink_to("old", target_is_directory=True)
    log = RunLog(link)
    log.append(small(1))
    link.unlink()
    link.symlink_to("new", target_is_directory=True)
    log.append(small(2))
    assert same(AuditRun.load(link).records, [small(1), small(2)])
    # Back again, where a part is present: nothing is doubled.
    link.unlink()
    link.symlink_to("old", target_is_directory=True)
    log.append(small(3))
    assert same(AuditRun.load(link).records, [small(1), small(2), small(3)])


def test_a_log_that_another_living_process_writes_is_refused(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"another process .*align_audit; .* Choose another output_dir"):
        RunLog(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert RunLog(tmp_path).append(small(1))


def test_the_same_process_may_open_a_log_again(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    first.append(small(1))
    second = RunLog(tmp_path)
    second.set_aside()
    second.append(small(2))
    assert same(RunLog(tmp_path).records, [small(2)])


def test_the_lock_goes_with_the_last_log_of_the_process(tmp_path: Path) -> None:
    first, second = RunLog(tmp_path), RunLog(tmp_path)
    opener = [sys.executable, "-c", HOLDER, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    del first
    assert subprocess.run(opener, input=b"", capture_output=True, env=env).returncode != 0
    del second
    assert subprocess.run(opener, input=b"", capture_output=True, env=env).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_worker_that_outlives_its_parent_holds_no_log(tmp_path: Path) -> None:
    code = """
import os, sys, time
from align_audit.record.log import RunLog
log = RunLog(sys.argv[1])
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)
            assert RunLog(tmp_path).append(small(1))
        finally:
            os.kill(child, signal.SIGKILL)


def test_files_get_the_mode_that_open_gives(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    arrays = log.save_arrays(1, "arrays", {"x": np.ones(1)})
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert {path.stat().st_mode for path in (arrays, log.directory / RECORDS)} == {plain.stat().st_mode}


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path: Path) -> None:
    for name in ("ü" * 127, "x" * 255):
        write_atomically(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_unfinished_files_of_killed_processes_go_at_the_next_opening(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    folder = log.step_dir(1)
    old = time.time() - 7200
    abandoned = [log.directory / f"a.json.{'0' * 16}.tmp", folder / f"arrays.safetensors.{'f' * 16}.tmp"]
    foreign = [folder / "notes.tmp", folder / f"young.json.{'1' * 16}.tmp", tmp_path / "outside"]
    for path in (*abandoned, *foreign):
        path.write_bytes(b"half")
    link = folder / f"link.json.{'2' * 16}.tmp"
    link.symlink_to(tmp_path / "outside")
    for path in (*abandoned, foreign[0], foreign[2]):
        os.utime(path, (old, old))
    os.utime(link, (old, old), follow_symlinks=False)
    del log
    RunLog(tmp_path)
    assert [path.exists() for path in abandoned] == [False, False]
    assert [path.exists() for path in (*foreign, link)] == [True] * 4


def test_arrays_follow_their_records_when_setting_aside_was_killed(tmp_path: Path) -> None:
    """The state a kill leaves just before the records are moved, which is last."""
    log = RunLog(tmp_path)
    log.append(small(1))
    log.append_failure(1, "ValueError")
    log.save_arrays(1, "arrays", {"x": np.ones(1)})
    aside = log.directory / "previous-1"
    aside.mkdir()
    for name in (ALERTS, FAILURES, "step-1"):
        (log.directory / name).rename(aside / name)
    again = RunLog(tmp_path).set_aside()
    run = AuditRun.load(again)
    assert same(run.records, [small(1)])
    assert (len(run.failures), run.load_arrays(1, "arrays")["x"].tolist()) == (1, [1])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": -' + b"9" * 4000 + b"}",
        b'{"schema_version": 3, "reasons": 7, "low_rank": [], "patching": {"standing_out": {"layers": 1}}}',
        b"\x00\xff",
    ],
    ids=["deep list", "deep object", "long version", "negative version", "odd parts", "not UTF-8"],
)
def test_no_line_makes_a_run_unloadable(tmp_path: Path, line: bytes) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    log.append_failure(1, "ValueError")
    for name in (RECORDS, ALERTS, FAILURES):
        path = log.directory / name
        path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.warns(UserWarning, match="line 1 of .* is skipped") as caught:
        run = AuditRun.load(tmp_path)
    assert (same(run.records, [small(1)]), len(run.alerts), len(run.failures)) == (True, 1, 1)
    assert len(caught) == 3
    assert max(len(str(warning.message)) for warning in caught) < 2000
    with pytest.warns(UserWarning, match="is skipped"):
        assert RunLog(tmp_path).append(small(2))


def test_a_record_with_undecodable_names_is_written(tmp_path: Path) -> None:
    record = make_record(1, layers=2)
    named = record.provenance.model_copy(
        update={"probe_source": "a\udcff (3 records)", "config": {"\udcfe": ["\udcfd"]}}
    )
    record = record.model_copy(update={"provenance": named})
    assert RunLog(tmp_path).append(record)
    (loaded,) = AuditRun.load(tmp_path).records
    assert loaded.provenance.probe_source == "a\\udcff (3 records)"
    assert loaded.provenance.config == {"\\udcfe": ["\\udcfd"]}
    assert loaded.margins.model_dump_json() == record.margins.model_dump_json()
    assert not RunLog(tmp_path).append(record)


def test_control_characters_of_a_path_reach_no_message(tmp_path: Path) -> None:
    place = tmp_path / "run\x1b[31m"
    log = RunLog(place)
    log.append(small(1))
    (log.directory / RECORDS).write_bytes((log.directory / RECORDS).read_bytes() + b'{"torn')
    with pytest.warns(UserWarning, match="middle of a line") as caught:
        records: list[AuditRecord] = AuditRun.load(place).records
    assert len(records) == 1
    assert "\\x1b[31m" in str(caught[0].message)
    assert "\x1b" not in str(caught[0].message)


def test_a_run_that_has_ended_lets_go_of_its_log(tmp_path: Path) -> None:
    """A notebook keeps its trainer, and another process goes on with the run; what this one still writes is not lost."""
    log = RunLog(tmp_path)
    log.append(small(1))
    log.close()
    opener = [sys.executable, "-c", HOLDER, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(opener, input=b"", capture_output=True, env=env).returncode == 0
    log.append(small(2))
    assert same(AuditRun.load(tmp_path).records, [small(1), small(2)])
    assert subprocess.run(opener, input=b"", capture_output=True, env=env).returncode != 0, "taken again"


def test_without_locks_no_file_is_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would move no log aside then."""
    monkeypatch.setattr(lock_module, "fcntl", None)
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *args: opened.append(real_open(*args)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), real_close(handle))[1])
    held = lock_module.lock(tmp_path / "records.jsonl")
    assert opened and sorted(opened) == sorted(closed)
    held.forget()
