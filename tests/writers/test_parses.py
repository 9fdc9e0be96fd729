"""What a writer parses of a long run does not grow with what came before: counted, for time says little on a busy machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align_audit.record import stored_records
from align_audit.record.audit_record import AuditRecord
from align_audit.record.run import AuditRun
from align_audit.record.status import status_of
from align_audit.record.stored_records import Head, StoredRecords
from align_audit.record.training_log import LogRow, up_to
from align_audit.writers.closing_table import closing
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import TensorBoard
from align_audit.writers.terminal import Terminal
from tests.helpers.alert_cases import health, with_part
from tests.helpers.make_record import make_record
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
