"""What a writer parses of a long run does not grow with what came before: counted, for time says little on a busy machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align_audit.record import status, stored_records
from align_audit.record.audit_record import AuditRecord
from align_audit.record.course import present_course
from align_audit.record.run import AuditRun
from align_audit.record.status import status_of
from align_audit.record.stored_records import Head, StoredRecords
from align_audit.record.training_log import LogRow, up_to
from align_audit.writers import standing
from align_audit.writers.closing_table import closing
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import TensorBoard
from align_audit.writers.terminal import Terminal
from align_audit.writers.web.page_data import page_data
from tests.helpers.alert_cases import health, with_part
from tests.helpers.make_record import make_record
from tests.helpers.screens import LOG as SCREEN_LOG
from tests.helpers.screens import a_run, quick_look
from tests.writers.test_tensorboard import Recorder

LONG = (8, 16, 32)
TEMPLATE = make_record(0, layers=2, alerts=[])


def at(step: int) -> AuditRecord:
    made = with_part(
        TEMPLATE.model_copy(update={"step": step}), "provenance", created=f"{step:06d}", policy_hash=f"{step}"
    )
    return made if step % 4 == 0 else health(made)


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that were parsed, of runs of which only two records stay so."""
    lines: list[bytes] = []
    parse = stored_records.parse_line

    def counted(line: bytes) -> AuditRecord | None:
        lines.append(line)
        return parse(line)

    monkeypatch.setattr(stored_records, "parse_line", counted)
    monkeypatch.setattr(stored_records, "KEPT_PARSED", 2)
    return lines


def stored(count: int) -> StoredRecords:
    """A run of so many records, none of them parsed."""
    records = StoredRecords()
    for step in range(count):
        record = at(step)
        records.append_line(Head.of(record), record.to_json().encode())
    return records


def tensorboard(record: AuditRecord, history: Any) -> None:
    TensorBoard("nowhere", lambda: Recorder()).record(record, history)


def terminal(record: AuditRecord, history: Any) -> None:
    Terminal(Console(file=io.StringIO())).record(record, history)


EACH_AUDIT: dict[str, Callable[[AuditRecord, Any], object]] = {
    "TensorBoard": tensorboard,
    "Terminal": terminal,
    "status": lambda record, history: status_of(history, [], []),
    "standing": standing_at,
}


@pytest.mark.parametrize("shown", EACH_AUDIT)
def test_what_is_shown_of_an_audit_parses_as_much_whatever_came_before(shown: str, parses: list[bytes]) -> None:
    counts = []
    for count in LONG:
        history, record = stored(count), at(count)
        parses.clear()
        EACH_AUDIT[shown](record, history)
        counts.append(len(parses))
    assert counts[0] == counts[1] == counts[2] <= 2, counts


def test_the_table_at_the_end_parses_each_record_about_once(parses: list[bytes]) -> None:
    counts = []
    for count in LONG:
        run = AuditRun(Path("nowhere"), stored(count), [], [])
        parses.clear()
        assert closing(run, {})
        counts.append(len(parses))
    assert all(count <= 2 * length for count, length in zip(counts, LONG, strict=True)), counts
    assert counts[2] - counts[1] <= 2 * (counts[1] - counts[0]), "twice the records, twice the work"


def test_a_page_parses_full_audits_and_no_others(parses: list[bytes], tmp_path: Path) -> None:
    for count in LONG:
        run = AuditRun(tmp_path, stored(count), [], [])
        parses.clear()
        page_data(run)
        full = sum(head.kind == "full" for head in run.records.heads)  # type: ignore[attr-defined]
        assert len(parses) <= 4 * full + 4, "where, evidence and SPINAL are of all of them"
        looks = AuditRun(tmp_path, StoredRecords(stored(count)._kept).where(lambda head: head.kind == "health"), [], [])
        parses.clear()
        page_data(looks)
        assert len(parses) <= 4


def test_a_run_is_gone_through_once_for_how_it_stood_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    still_open = status.open_alerts

    def counted(heads: Any) -> Any:
        seen.append(len(heads))
        return still_open(heads)

    monkeypatch.setattr(status, "open_alerts", counted)
    monkeypatch.setattr(standing, "open_alerts", counted)
    monkeypatch.setattr(standing, "course_of", None)
    for count in LONG:
        seen.clear()
        assert len(standing.standings_over(stored(count))) == count
        assert sum(seen) == 2 * count


@pytest.mark.parametrize("ends", ["well", "ruined", "resolved"])
def test_gone_through_once_says_what_each_audit_says_by_itself(ends: str) -> None:
    records = [each for record in a_run(ends) for each in (quick_look(record), record)]
    records[0] = records[0].model_copy(update={"alerts": records[1].alerts})
    log = [*SCREEN_LOG, LogRow(900, {"loss": 0.1})]
    course = present_course(records)
    singly = [standing_at(record, records, log) for record in standing.audit_of_each_step(course)]
    assert standing.standings_over(course, log) == singly


def test_the_heads_hold_what_is_drawn_of_all_records(parses: list[bytes]) -> None:
    record = at(4)
    quick = stored_records.head_of_line(record.to_json().encode())
    assert quick == Head.of(record)
    assert (quick.kl, quick.chosen_logp_change_per_token) == (
        record.margins.kl, record.margins.chosen_logp_change_per_token,
    )  # fmt: skip
    assert parses == []


def test_the_rows_until_a_step_are_looked_up() -> None:
    class Counted(list[LogRow]):
        reads = 0

        def __getitem__(self, place: Any) -> Any:
            Counted.reads += not isinstance(place, slice)
            return super().__getitem__(place)

    for count in (1_000, 100_000):
        rows = Counted(LogRow(step, {}) for step in range(count))
        Counted.reads = 0
        assert len(up_to(rows, 10)) == 11
        assert Counted.reads <= 20
