from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_audit.errors import ConfigurationError, RecordError
from align_audit.record import lines as reading
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import ALERTS, FAILURES, FOLDER, RECORDS, RunLog
from align_audit.record.run import AuditRun
from tests.helpers.make_record import make_record, make_run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(step: int) -> AuditRecord:
    record = make_record(
        step,
        progress=0.0,
        layers=1,
        patching=False,
        localization=False,
        low_rank=False,
        spinal=False,
        alerts=[alert(step)],
        reasons={},
    )
    short = {"config": {}, "versions": {}, "reference_hash": "r", "policy_hash": "p", "probe_hash": "h"}
    return record.model_copy(update={"provenance": record.provenance.model_copy(update=short)})


def alert(step: int) -> Alert:
    return Alert(rule="kl_high", level="error", step=step, value=1.5, message="KL\nis 1.5", suggestion="")


def found(record: AuditRecord) -> str:
    return record.alerts[0].model_dump_json()


def lines(*each: str) -> bytes:
    return "".join(line + "\n" for line in each).encode()


def same(left: list[AuditRecord], right: list[AuditRecord]) -> bool:
    # NaN is unequal to itself: compare what is stored.
    return [record.to_json() for record in left] == [record.to_json() for record in right]


def test_what_is_appended_is_loaded(tmp_path: Path) -> None:
    records = make_run("destabilizing", audits=5, layers=5)
    log = RunLog(tmp_path)
    assert all(log.append(record) for record in records)
    log.append_failure(75, 'Traceback:\n  File "\udcff.py"\nValueError: no')

    for place in (tmp_path, str(tmp_path), tmp_path / FOLDER, tmp_path / FOLDER / RECORDS):
        run = AuditRun.load(place)
        assert run.directory == tmp_path / FOLDER
        assert same(run.records, records)
        assert run.alerts == [found for record in records for found in record.alerts]
        assert len(run.alerts) > 3
        assert [(failure.step, failure.error) for failure in run.failures] == [
            (75, 'Traceback:\n  File "\\udcff.py"\nValueError: no')
        ]
        assert run.failures[0].time.endswith("+00:00")
    lines = (tmp_path / FOLDER / ALERTS).read_text().splitlines()
    assert [Alert.model_validate_json(line) for line in lines] == run.alerts


def test_records_come_sorted_whatever_the_order_of_appending(tmp_path: Path) -> None:
    first, second, third = make_run(audits=3, layers=2)
    again = second.model_copy(
        update={
            "provenance": second.provenance.model_copy(
                update={"created": "2025-11-22T00:00:00+00:00", "policy_hash": "x"}
            )
        }
    )
    log = RunLog(tmp_path)
    for record in (third, second, first, again):
        assert log.append(record)
    expected = [first, again, second, third]
    assert same(log.records, expected)
    assert same(RunLog(tmp_path).records, expected)
    assert same(AuditRun.load(tmp_path).records, expected)


def test_the_same_audit_is_not_appended_twice(tmp_path: Path) -> None:
    record = make_record(50, layers=3, kind="destabilizing", progress=1.0)
    log = RunLog(tmp_path)
    assert not log.contains(record.key)
    assert log.append(record)
    assert log.contains(record.key)
    before = snapshot(tmp_path)
    assert not log.append(record)
    reopened = RunLog(tmp_path)
    assert reopened.contains(record.key)
    # Other numbers, but the same step and weights: the same audit.
    assert not reopened.append(record.model_copy(update={"alerts": [], "spinal": None}))
    assert snapshot(tmp_path) == before
    assert reopened.append(make_record(51, layers=3))


@pytest.mark.filterwarnings("ignore:.*in the middle of a line")
def test_a_kill_at_any_byte_loses_no_earlier_record_and_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # thousands of openings: the disk need not follow
    first, second, third = small(1), small(2), small(3)
    log = RunLog(tmp_path / "whole")
    log.append(first)
    log.append(second)
    whole = (log.directory / RECORDS).read_bytes()
    end_of_first = whole.index(b"\n") + 1

    folder = tmp_path / "killed" / FOLDER
    folder.mkdir(parents=True)
    for cut in range(len(whole) + 1):
        for path in folder.iterdir():
            path.unlink()
        (folder / RECORDS).write_bytes(whole[:cut])
        # A record is whole when its JSON is, with or without the newline.
        survivors = [r for r, end in ((first, end_of_first), (second, len(whole))) if cut >= end - 1]

        loaded = AuditRun.load(folder)
        assert same(loaded.records, survivors), cut
        assert snapshot(folder) == {RECORDS: whole[:cut]}, "loading must not write"

        log = RunLog(folder.parent)
        assert same(log.records, survivors), cut
        kept = (folder / RECORDS).read_bytes()
        torn = [path.read_bytes() for path in folder.glob(f"{RECORDS}.torn-*")]
        assert (kept + b"".join(torn)).rstrip(b"\n") == whole[:cut].rstrip(b"\n"), "every byte is kept somewhere"

        assert log.append(third)
        assert (folder / RECORDS).read_bytes() == lines(*(record.to_json() for record in [*survivors, third])), cut
        assert (folder / ALERTS).read_bytes() == lines(*(found(record) for record in [*survivors, third]))


@pytest.mark.filterwarnings("ignore:.*in the middle of a line")
def test_a_kill_at_any_byte_of_the_alerts_loses_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    log = RunLog(tmp_path)
    log.append(small(1))
    log.append(small(2))
    path = log.directory / ALERTS
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert AuditRun.load(tmp_path).alerts == [alert(1), alert(2)]
        RunLog(tmp_path)
        assert path.read_bytes() == whole
        for torn in log.directory.glob("*.torn-*"):
            torn.unlink()


def test_torn_ends_are_said_and_numbered(tmp_path: Path) -> None:
    RunLog(tmp_path).append(small(1))
    path = tmp_path / FOLDER / RECORDS
    whole = path.read_bytes()
    # No newline; a newline but no JSON; zeros, as some file systems leave after a power cut.
    torn = [b'{"step": 2, "sche', b'{"step": 3, "sche\n', b"\0" * 64]
    for number, end in enumerate(torn, start=1):
        path.write_bytes(whole + end)
        with pytest.warns(UserWarning, match=rf"last {len(end)} bytes were moved to records.jsonl.torn-{number}"):
            RunLog(tmp_path)
        assert path.read_bytes() == whole
    assert [path.with_name(f"{RECORDS}.torn-{n}").read_bytes() for n in (1, 2, 3)] == torn

    path.write_bytes(whole + torn[0])
    with pytest.warns(UserWarning, match="that line is left out"):
        assert len(AuditRun.load(tmp_path).records) == 1


def test_torn_alerts_and_failures_are_moved_too(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    log.append_failure(2, "ValueError")
    for name in (ALERTS, FAILURES):
        path = log.directory / name
        path.write_bytes(path.read_bytes() + b'{"rule": "k')
    with pytest.warns(UserWarning, match="were moved to") as caught:
        log = RunLog(tmp_path)
    assert [ALERTS in str(caught[0].message), FAILURES in str(caught[1].message)] == [True, True]
    log.append_failure(3, "KeyError")
    assert [failure.error for failure in AuditRun.load(tmp_path).failures] == ["ValueError", "KeyError"]
    assert len(list(log.directory.glob("*.torn-1"))) == 2


def test_a_line_that_is_finished_while_it_is_read_is_one_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file goes on after its end: what a writer adds there is the rest of the last line, and no line."""
    log = RunLog(tmp_path)
    for record in make_run(audits=3):
        log.append(record)
    path = log.directory / RECORDS
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    real, grown = reading._object, list[bytes]()

    def object_of(line: bytes) -> Any:
        if not line.endswith(b"\n") and not grown:
            grown.append(line)
            with path.open("ab") as file:
                file.write(whole[-2000:])
        return real(line)

    monkeypatch.setattr(reading, "_object", object_of)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [record.step for record in AuditRun.load(tmp_path).records] == [0, 50]
    assert grown and ["ends in the middle of a line" in str(each.message) for each in said] == [True]
    assert len(AuditRun.load(tmp_path).records) == 3


def test_a_corrupt_line_in_the_middle_is_skipped_and_kept(tmp_path: Path) -> None:
    records = make_run(audits=4, layers=2)
    log = RunLog(tmp_path)
    for record in records:
        log.append(record)
    path = log.directory / RECORDS
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:200] + b"\xff\xfe" + lines[1][202:]  # not UTF-8
    lines[2] = b'{"schema_version": 1, "step": 7}\n'  # JSON, but no record
    path.write_bytes(b"".join(lines))

    with pytest.warns(UserWarning, match="is skipped") as caught:
        run = AuditRun.load(tmp_path)
    said = [str(warning.message) for warning in caught]
    assert any(f"line 2 of {path}" in text for text in said)
    assert any(f"line 3 of {path}" in text and "not a valid record" in text for text in said)
    assert same(run.records, [records[0], records[3]])

    with pytest.warns(UserWarning, match="is skipped"):
        log = RunLog(tmp_path)
    assert log.append(records[1])  # lost, so audited again
    assert path.read_bytes() == b"".join(lines) + records[1].to_json().encode() + b"\n"


def test_a_record_of_the_first_schema_is_still_read() -> None:
    """Version 1 knew neither layouts, nor pairs per control, nor estimators, nor finer sites."""
    new = make_record(2)
    old = json.loads(new.to_json()) | {"schema_version": 1}
    for name in ("shared_prompts", "layout_reason"):
        del old["provenance"][name]
    for control in old["controls"].values():
        del control["pairs"]
    for name in ("estimator", "attribution"):
        del old["patching"][name]
    del old["sites"]
    record = AuditRecord.from_json(json.dumps(old))
    assert (record.schema_version, record.provenance.shared_prompts) == (1, False)
    assert record.patching is not None
    assert record.patching.estimator == "exact"
    assert record.margins == new.margins


def test_a_newer_schema_is_refused_by_reader_and_writer(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    newer = json.loads(small(2).to_json()) | {"schema_version": 99, "something": "new"}
    path = log.directory / RECORDS
    path.write_bytes(path.read_bytes() + json.dumps(newer).encode() + b"\n")
    for read in (AuditRun.load, RunLog):
        with pytest.raises(RecordError, match=r"line 2 of .* schema version 99.*Upgrade"):
            read(tmp_path)


@pytest.mark.parametrize("where", ["output_dir", "folder", "log"])
def test_an_unwritable_place_is_refused_with_what_to_do(tmp_path: Path, where: str) -> None:
    if where == "output_dir":
        (tmp_path / "run").write_text("a file in the way")
    elif where == "folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / FOLDER).write_text("a file in the way")
    else:
        (tmp_path / "run" / FOLDER / RECORDS).mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"cannot write the audit log in .*choose another output_dir"):
        RunLog(tmp_path / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permission bits do not bind this user")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    RunLog(tmp_path)
    (tmp_path / FOLDER).chmod(0o555)
    try:
        with pytest.raises(ConfigurationError, match="may write to"):
            RunLog(tmp_path)
    finally:
        (tmp_path / FOLDER).chmod(0o755)


def test_a_disk_that_fills_up_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    log.append(small(1))
    before = (log.directory / RECORDS).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(small(2))
    assert (log.directory / RECORDS).read_bytes() == before
    assert log.contains(small(2).key), "it is of this log all the same"
    with pytest.warns(UserWarning, match=r"1 audit that the disk had refused is in .*records\.jsonl now"):
        assert log.append(small(3))
    run = AuditRun.load(tmp_path)
    assert [record.step for record in run.records] == [1, 2, 3]
    assert [alert.step for alert in run.alerts] == [1, 2, 3]


def test_what_the_disk_refused_to_the_end_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in (1, 2):
            with pytest.raises(OSError, match="No space left"):
                log.append(small(step))
        with pytest.warns(UserWarning, match="audits are missing in the log .*No space left"):
            log.close()
    log = RunLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(small(1))
    with pytest.warns(UserWarning, match="1 audit that the disk had refused"):
        log.close()
    assert [record.step for record in AuditRun.load(tmp_path).records] == [1]


def test_alerts_cut_off_from_their_record_are_restored_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(1).model_copy(update={"alerts": [alert(1), alert(1)]}))
    path = log.directory / ALERTS
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    RunLog(tmp_path)
    assert path.read_bytes() == whole
    RunLog(tmp_path)
    assert path.read_bytes() == whole


def test_an_alert_of_no_record_is_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(small(5))
    path = log.directory / ALERTS
    path.write_text(path.read_text() + alert(3).model_dump_json() + "\n")
    assert AuditRun.load(tmp_path).alerts == [alert(3), alert(5)]


def test_an_earlier_run_is_set_aside_whole(tmp_path: Path) -> None:
    records = make_run("destabilizing", audits=3, layers=2)
    log = RunLog(tmp_path)
    for number in (1, 2):
        for record in records:
            assert log.append(record), "the new log is empty"
        log.append_failure(7, "ValueError")
        log.save_arrays(50, "pairs", {"x": np.full(2, number)})
        assert log.set_aside() == tmp_path / FOLDER / f"previous-{number}"
        assert (log.records, AuditRun.load(tmp_path).records, AuditRun.load(tmp_path).failures) == ([], [], [])
    for number in (1, 2):
        earlier = AuditRun.load(tmp_path / FOLDER / f"previous-{number}")
        assert same(earlier.records, records)
        assert len(earlier.failures) == 1
        assert earlier.load_arrays(50, "pairs")["x"].tolist() == [number, number]
    assert RunLog(tmp_path).append(records[0])


def test_a_kill_while_setting_aside_mixes_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename
    for survive in range(4):
        folder = tmp_path / str(survive)
        log = RunLog(folder)
        log.append(small(1))
        log.append_failure(2, "ValueError")
        log.save_arrays(1, "pairs", {"x": np.ones(1)})
        moved: list[str] = []

        def killed(path: Path, target: Path, moved: list[str] = moved, survive: int = survive) -> Path:
            if len(moved) == survive:
                raise KeyboardInterrupt
            moved.append(path.name)
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                log.set_aside()
        again = RunLog(folder)
        assert same(again.records, [small(1)]), "the old run is still recognized as one, and set aside again"
        again.set_aside()
        assert {path.name for path in again.directory.iterdir()} == {RECORDS, "previous-1", "previous-2"}


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    arrays = {
        "shift": np.array([1.5, math.nan, -math.inf]),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.array(7),
        "empty": np.zeros((0, 4)),
        "mask": np.array([True, False]),
    }
    path = log.save_arrays(20, "pairs", arrays)
    assert path == tmp_path / FOLDER / "step-20" / "pairs.safetensors"
    assert log.step_dir(20) == path.parent
    for loaded in (log.load_arrays(20, "pairs"), AuditRun.load(tmp_path).load_arrays(20, "pairs")):
        assert set(loaded) == set(arrays)
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype
            assert loaded[name].shape == array.shape
            np.testing.assert_array_equal(loaded[name], array)


def test_an_interrupted_record_is_not_added_when_the_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever interrupts an audit is told that it was given up: its line was taken back, and stays so."""
    log = RunLog(tmp_path)
    log.append(small(1))
    before = (log.directory / RECORDS).read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append(small(2))
    assert not log.contains(small(2).key) and same(log.records, [small(1)])
    log.close()
    assert (log.directory / RECORDS).read_bytes() == before


def test_a_break_while_saving_keeps_the_old_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    path = log.save_arrays(20, "pairs", {"x": np.ones(3)})
    before = snapshot(tmp_path)

    def killed(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log.save_arrays(20, "pairs", {"x": np.zeros(1000)})
    assert snapshot(tmp_path) == before
    log.save_arrays(20, "pairs", {"x": np.zeros(2)})
    assert log.load_arrays(20, "pairs")["x"].tolist() == [0, 0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecordError, match=r"cannot read the arrays .*pairs\.safetensors"):
        log.load_arrays(20, "pairs")


def test_absent_arrays_and_names_that_leave_the_folder(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(RecordError, match="step-3"):
        log.load_arrays(3, "pairs")
    assert not (log.directory / "step-3").exists(), "looking must not make folders"
    for name in ("../escape", "a/b", "", ".."):
        with pytest.raises(ValueError, match="plain name"):
            log.save_arrays(3, name, {"x": np.ones(1)})


def test_a_good_log_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log = RunLog(tmp_path)
        log.append(small(1))
        log.append_failure(2, "ValueError")
        RunLog(tmp_path)
        AuditRun.load(tmp_path)
