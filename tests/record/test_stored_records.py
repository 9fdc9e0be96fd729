"""Records that are parsed when they are looked at are those that were written, and few of them are in memory."""

from __future__ import annotations

import copy
import functools
import gc
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from align_audit.alerts.detectors import judge
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import ALERTS, FOLDER, RECORDS, RunLog
from align_audit.record.run import AuditRun
from align_audit.record.schema import Labelled, Part
from align_audit.record.site_curve import SiteCurve, SiteUnit
from align_audit.record.stored_records import (
    KEPT_PARSED,
    UNPACKED,
    Head,
    StoredRecords,
    chosen,
    head_of_line,
    parse_line,
)
from tests.helpers.make_record import make_record, make_run


def parsed() -> int:
    """Records that are in memory."""
    gc.collect()
    return sum(issubclass(type(thing), AuditRecord) for thing in gc.get_objects())


def written(folder: Path, count: int) -> list[str]:
    """A log of so many records, the last step first; its lines."""
    template = make_run("destabilizing", audits=3, layers=2)[-1]
    lines = []
    for step in reversed(range(count)):
        where = template.provenance.model_copy(update={"policy_hash": f"{step:016x}"})
        alerts = [alert.model_copy(update={"step": step}) for alert in template.alerts]
        lines.append(template.model_copy(update={"step": step, "provenance": where, "alerts": alerts}).to_json())
    (folder / FOLDER).mkdir()
    (folder / FOLDER / RECORDS).write_text("".join(line + "\n" for line in lines))
    return lines


def test_a_long_run_is_not_held_parsed(tmp_path: Path) -> None:
    before = parsed()
    lines = written(tmp_path, KEPT_PARSED * 2)
    run = AuditRun.load(tmp_path)
    assert len(run.alerts) == len(lines) * len(AuditRecord.from_json(lines[0]).alerts) > 0
    assert [record.to_json() for record in run.records] == lines[::-1]
    assert len(run.to_pandas()) == len(lines)
    assert parsed() - before <= KEPT_PARSED + 2
    log = RunLog(tmp_path)
    assert parsed() - before <= 2 * KEPT_PARSED + 2
    assert log.contains(run.records[0].key)
    assert len((tmp_path / FOLDER / ALERTS).read_text().splitlines()) == len(run.alerts)


def test_what_is_read_quickly_is_what_is_read_carefully() -> None:
    for record in (make_record(3, layers=5), *make_run("destabilizing", audits=3, layers=3)):
        line = record.to_json()
        quick = parse_line(line.encode())
        assert quick is not None
        assert quick.model_dump_json() == AuditRecord.from_json(line).model_dump_json() == line


def places(values: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where anything lies in nested values."""
    yield at
    for key, inner in (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    ):
        yield from places(inner, (*at, key))


def filled() -> dict[str, Any]:
    """The values of a record that has something in every part."""
    curve = SiteCurve(
        site="head",
        positions="all",
        pairs=4,
        exact_pairs=4,
        units=[SiteUnit(layer=0, last_layer=0, head=1)],
        sufficiency=[make_record(1).margins.kl],
        necessity=[make_record(1).margins.kl],
        sufficiency_p_adjusted=[0.5],
    )
    record = make_run("destabilizing", audits=3, layers=2)[-1].model_copy(update={"sites": [curve]})
    values: dict[str, Any] = json.loads(record.to_json())
    return values


@pytest.mark.parametrize("damage", ["another type", "nothing", "one more field", "one field less"])
def test_a_line_is_taken_where_its_record_would_be(damage: str) -> None:
    """Wherever it is damaged, and however deep: no record that a log has taken proves invalid when it is looked at."""
    whole, taken = filled(), 0
    assert head_of_line(json.dumps(whole).encode()) is not None
    for at in list(places(whole))[1:]:
        inside: Any = functools.reduce(lambda value, key: value[key], at[:-1], whole)
        kept = copy.copy(inside)
        if damage == "one field less":
            del inside[at[-1]]
        elif damage == "one more field" and isinstance(inside[at[-1]], dict):
            inside[at[-1]] = inside[at[-1]] | {"unheard of": 1}
        else:
            inside[at[-1]] = None if damage == "nothing" else [{"odd": "value"}]
        line = json.dumps(whole).encode()
        inside.clear()
        inside.extend(kept) if isinstance(inside, list) else inside.update(kept)
        record = parse_line(line)
        assert (head_of_line(line) is None) == (record is None), at
        taken += record is not None
    assert 0 < taken < len(list(places(whole))) - 1


def parts_of(annotation: Any) -> Iterator[type[Part]]:
    """The kinds of parts that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from parts_of(inner)


def test_only_labelled_parts_have_validators_of_their_own() -> None:
    """Others are validated as plain dicts when a log is opened, where a part's own validators do not run."""
    waiting: list[type[Part]] = [AuditRecord]
    parts: set[type[Part]] = set()
    while waiting:
        part = waiting.pop()
        parts.add(part)
        for info in part.model_fields.values():
            waiting += [inner for inner in parts_of(info.annotation) if inner not in parts]
    assert len(parts) > 10
    for part in parts:
        validators = part.__pydantic_decorators__
        if not issubclass(part, Labelled):
            assert not (validators.model_validators or validators.field_validators or validators.root_validators), part


def test_packed_lines_are_what_was_written(tmp_path: Path) -> None:
    lines = written(tmp_path, UNPACKED + 3)
    stored = AuditRun.load(tmp_path).records
    assert isinstance(stored, StoredRecords)
    assert [line.decode() for _, line in stored.lines] == [line + "\n" for line in lines[::-1]]


@pytest.mark.parametrize(
    "change", [{"schema_version": 3}, {"schema_version": None}, {"step": "x"}, {"schema_version": 99}]
)
def test_lines_of_other_versions_are_left_to_the_careful_reader(change: dict[str, object]) -> None:
    values = json.loads(make_record(3, layers=2).to_json()) | change
    if change == {"schema_version": None}:
        del values["schema_version"]
    assert parse_line(json.dumps(values).encode()) is None
    assert head_of_line(json.dumps(values).encode()) is None


def test_an_old_record_is_migrated_whenever_it_is_looked_at() -> None:
    """It is parsed anew, by its own version's rules, once nobody holds it."""
    old = (Path(__file__).parent / "data").glob("*.json*")
    lines = [line for path in sorted(old) for line in path.read_text().splitlines() if '"schema_version":3' in line]
    assert lines
    records = StoredRecords()
    for line in lines:
        records.append(AuditRecord.from_json(line), line.encode())
    again = pickle.loads(pickle.dumps(records))
    for record, line in zip(again, lines, strict=True):
        assert record.schema_version == 3
        assert record.model_dump_json() == AuditRecord.from_json(line).model_dump_json()


def test_they_are_a_sequence_equal_to_a_list(tmp_path: Path) -> None:
    written(tmp_path, 4)
    run = AuditRun.load(tmp_path)
    plain = list(run.records)
    assert run.records == plain
    assert plain == run.records
    assert run.records != plain[1:]
    assert run.records[1:3] == plain[1:3]
    assert run.records[-1] is plain[-1]
    assert [*run.records] == run.records + plain[:0] == plain[:0] + run.records == plain
    assert plain[2] in run.records
    assert list(reversed(run.records)) == plain[::-1]
    assert "records, steps 0 to 3" in repr(run.records)
    assert [record.step for record in copy.deepcopy(run).records] == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        run.records[4]


def test_choosing_and_judging_parse_nothing(tmp_path: Path) -> None:
    """Of 300 audits before it, an alert rule reads the last, and as many as make a baseline."""
    before = parsed()
    written(tmp_path, 300)
    run = AuditRun.load(tmp_path)
    records = pickle.loads(pickle.dumps(run.records))
    del run
    assert parsed() - before == 0
    at_most = chosen(records, lambda head: head.step < 290 and head.probe_name is None)
    assert isinstance(at_most, StoredRecords)
    assert len(at_most) == 290
    assert parsed() - before == 0
    record = make_record(400, layers=2)
    here = judge(record, at_most)
    assert parsed() - before <= 10
    assert here == judge(record, list(at_most))


def test_plain_records_are_chosen_the_same_way() -> None:
    records = make_run("healthy", audits=4, layers=2)
    assert chosen(records, lambda head: head.step > 50) == records[2:]
    assert Head.of(records[1]).key == records[1].key
