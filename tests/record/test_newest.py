"""The end of a log: its lines backward, and as many of its records as tell how the run stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from align_audit.record import newest
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.record.newest import lines_from_end, read_newest
from align_audit.record.run import AuditRun
from align_audit.record.status import status_of
from tests.helpers.alert_cases import health, with_part
from tests.helpers.make_record import make_run
from tests.helpers.pages import health_run, healthy_run, hostile_run, ruined_run, sets_run

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    "content", [b"", b"a\n", b"a\nbcd\n\n \nefghijkl\n", b"a\nbc\nbeing wri", b"being written", b"\n\na\n"]
)
def test_lines_come_last_first_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block: int
) -> None:
    monkeypatch.setattr(newest, "_BLOCK", block)
    path = tmp_path / "log"
    path.write_bytes(content)
    whole = [line for line in content.split(b"\n")[:-1] if line.strip()]
    assert list(lines_from_end(path)) == whole[::-1]


def test_an_absent_log_has_no_lines(tmp_path: Path) -> None:
    assert list(lines_from_end(tmp_path / "log")) == []
    assert read_newest(tmp_path / "log").records == ()


def written(folder: Path, records: list[AuditRecord]) -> Path:
    log = RunLog(folder)
    for record in records:
        log.append(record)
    log.close()
    return log.directory / "records.jsonl"


@pytest.mark.parametrize("run", [healthy_run, ruined_run, health_run, hostile_run, sets_run])
def test_it_says_how_the_run_stands(tmp_path: Path, run: Callable[[], AuditRun]) -> None:
    stored = run()
    path = written(tmp_path, list(stored.records))
    records = read_newest(path).records
    now = status_of(records, [], [])
    assert (now.word, now.reason) == (stored.status.word, status_of(stored.records, [], []).reason)
    if now.word != "HEALTHY":
        assert now.since == stored.status.since


def test_of_a_long_log_little_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, make_run("healthy", 30, 4))
    parsed: list[bytes] = []
    parse_line = newest.parse_line
    monkeypatch.setattr(newest, "parse_line", lambda line: parsed.append(line) or parse_line(line))
    assert [record.step for record in read_newest(path).records] == [1300, 1350, 1400, 1450]
    assert len(parsed) == 4


def test_it_goes_back_to_a_full_audit_and_to_the_sets_that_are_asked_for(tmp_path: Path) -> None:
    first, *rest = make_run("healthy", 9, 4)
    other_set = with_part(first, "provenance", probe_name="helpful")
    path = written(tmp_path / "full", [first, *map(health, rest)])
    assert len(read_newest(path).records) == 9
    path = written(tmp_path / "set", [other_set, *rest])
    assert len(read_newest(path).records) == 4
    assert read_newest(path, {"helpful"}).records[0].provenance.probe_name == "helpful"


def test_what_cannot_be_read_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, make_run("healthy", 3, 4))
    with path.open("ab") as file:
        file.write(b'{"schema_version": 999}\nno JSON\n')
    said = read_newest(path)
    assert len(said.records) == 3
    assert said.unread is not None and said.unread.startswith("2 lines at the end of the log cannot be read")
    assert "is not JSON" in said.unread


@pytest.mark.parametrize("path", sorted(DATA.glob("*.records.jsonl")), ids=lambda path: path.stem)
def test_logs_of_older_versions_have_an_end_too(path: Path) -> None:
    said = read_newest(path)
    assert said.records and said.unread is None
