"""Records, alerts and whole logs with damage: a record that every reader can show, or a ``RecordError``."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from rich.console import Console

from align_audit.alerts.detectors import judge
from align_audit.errors import ConfigurationError, RecordError
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import ALERTS, FAILURES, FOLDER, RECORDS, RunLog
from align_audit.record.numbers import walk
from align_audit.record.run import AuditRun, layer_rows, row_of
from align_audit.record.stored_records import Head, head_of_line, parse_line
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.alert_panel import alert_panel
from align_audit.writers.audit_table import summary_table
from align_audit.writers.brief import brief, brief_of_more
from align_audit.writers.scalars import not_known, scalars
from align_audit.writers.standing import standing_at
from align_audit.writers.tensorboard import controls_table, not_known_table
from align_audit.writers.web.page import page
from align_audit.writers.web.page_data import page_data
from tests.fuzz.cases import as_json, bytes_of, damaged, fuzz, told, values
from tests.helpers.make_record import make_record, make_run

DATA = Path(__file__).parents[1] / "record" / "data"
RECORDED = [json.loads(record.to_json()) for record in make_run("destabilizing", audits=3, layers=3)]
OLD = [json.loads(line) for path in sorted(DATA.glob("*.records.jsonl")) for line in path.read_text().splitlines()]
LINES = [as_json(whole) for whole in [*RECORDED[1:2], *OLD]]
ALERT = RECORDED[-1]["alerts"][0] if RECORDED[-1]["alerts"] else {}


def readable(record: AuditRecord) -> None:
    """Everything that is made of a stored record, as far as that can be without drawing."""
    again = AuditRecord.from_json(record.to_json())
    assert again.to_json() == record.to_json()
    quick = parse_line(record.to_json().encode())
    assert quick is None or quick.to_json() == record.to_json()
    list(walk(record))
    scalars(record)
    not_known(record)
    row_of(record)
    layer_rows(record)
    controls_table(record)
    not_known_table(record)
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(record))
    console.print(brief(standing_at(record, [])))
    console.print(brief_of_more(standing_at(record, [])))
    for alert in record.alerts:
        console.print(alert_panel(alert))
    page(page_data(AuditRun(Path("nowhere"), [record], record.alerts, [])))
    judge(record, [make_record(1, layers=3)])


def parsed(text: bytes) -> None:
    # A log takes a line by its head: that has to be refused where the record would be.
    quick = parse_line(text)
    assert repr(head_of_line(text)) == repr(None if quick is None else Head.of(quick))  # NaN is not equal to itself
    try:
        record = AuditRecord.from_json(text)
    except RecordError as error:
        told(error, 100_000)
        return
    readable(record)


@fuzz(whole=damaged(RECORDED))
def test_records_with_other_values(whole: Any) -> None:
    parsed(as_json(whole))


@fuzz(whole=damaged(OLD))
def test_old_records_with_other_values(whole: Any) -> None:
    parsed(as_json(whole))


@fuzz(text=bytes_of(LINES))
def test_records_with_other_bytes(text: bytes) -> None:
    parsed(text)


@fuzz(text=st.one_of(st.binary(max_size=30), values.map(as_json), st.just(b"[" * 3000)))
def test_what_is_no_record(text: bytes) -> None:
    for kind in (AuditRecord, TransferRecord):
        try:
            kind.from_json(text)
        except RecordError as error:
            told(error)
        else:
            raise AssertionError("taken for a record")


LOG_LINES = st.one_of(
    st.sampled_from([as_json(whole) for whole in RECORDED]),
    damaged(RECORDED).map(as_json),
    bytes_of(LINES),
    st.binary(max_size=20),
)
ALERT_LINES = st.one_of(damaged([ALERT]).map(as_json), bytes_of([as_json(ALERT)]), values.map(as_json))


@fuzz(
    0.5,
    lines=st.lists(LOG_LINES, max_size=4),
    others=st.lists(ALERT_LINES, max_size=3),
    ending=st.sampled_from([b"\n", b"", b"\r\n", b"\n\n"]),
)
def test_logs_of_any_lines(lines: list[bytes], others: list[bytes], ending: bytes) -> None:
    """Read, gone on with, and read again: a new record is there then, and those that could be read."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)
        log = Path(folder) / FOLDER
        log.mkdir()
        (log / RECORDS).write_bytes(b"\n".join(lines) + ending)
        for name in (ALERTS, FAILURES):
            (log / name).write_bytes(b"\n".join(others) + ending)
        try:
            before = AuditRun.load(folder)
            writing = RunLog(folder)
        except RecordError as error:
            told(error)
            return
        except ConfigurationError as error:
            raise AssertionError("the folder can be written") from error
        record = make_record(77, layers=3)
        assert writing.append(record) or writing.contains(record.key)
        writing.close()
        after = AuditRun.load(folder)
        assert len(after.records) >= len(before.records)
        assert record.key in {kept.key for kept in after.records}
        assert {head.key for head in writing.records.heads} == {kept.key for kept in after.records}
