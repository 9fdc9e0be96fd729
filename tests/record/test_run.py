"""A run read back, and its tables: every number of a record is where its name says."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

from align_audit.errors import RecordError
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER, RECORDS, RunLog
from align_audit.record.run import AuditRun, one_per_step
from tests.helpers.make_record import make_record, make_run
from tests.record.test_log import same


def test_a_saved_file_of_another_name_is_a_run_too(tmp_path: Path) -> None:
    records = make_run("destabilizing", audits=3, layers=2)
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(record.to_json() + "\n" for record in records))
    run = AuditRun.load(path)
    assert same(run.records, records)
    assert run.alerts == [found for record in records for found in record.alerts]


def test_a_missing_log_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()  # a folder of that name is no log: it may be a clone of the package
    for place in (tmp_path, tmp_path / "absent", tmp_path / RECORDS):
        with pytest.raises(RecordError) as caught:
            AuditRun.load(place)
        assert str(place / FOLDER / RECORDS) in str(caught.value)
        assert str(place / RECORDS) in str(caught.value)


def test_an_empty_log_is_a_run_without_records(tmp_path: Path) -> None:
    RunLog(tmp_path)
    run = AuditRun.load(tmp_path)
    assert (run.records, run.alerts, run.failures) == ([], [], [])
    assert list(run.to_pandas().columns) == ["step"]
    assert list(run.to_pandas(layers=True).columns) == ["step", "layer"]


def test_the_wide_table_has_the_records_numbers_under_their_paths(tmp_path: Path) -> None:
    records = make_run("destabilizing", audits=4, layers=5)
    records[3] = records[3].model_copy(update={"spinal": None})
    log = RunLog(tmp_path)
    for record in records:
        log.append(record)
    table = AuditRun.load(tmp_path).to_pandas()
    assert table["step"].tolist() == [0, 50, 100, 150]
    assert table["margins.shift.mean"].tolist() == [record.margins.shift.mean for record in records]
    assert table["margins.shift.low"].tolist() == [record.margins.shift.low for record in records]
    assert table["controls.noise.verdict"].tolist() == [record.controls.noise.verdict for record in records]
    assert table["alerts"].tolist() == [len(record.alerts) for record in records]
    assert table["provenance.policy_hash"].tolist() == [record.provenance.policy_hash for record in records]
    assert table["patching.peak_layer"].isna().tolist() == [True, False, False, False]
    assert table["spinal.delta_align"].isna().tolist() == [False, False, False, True]
    peak = records[2].patching.peak_layer  # type: ignore[union-attr]
    curve = records[2].low_rank["shift"][peak]
    assert table.loc[2, f"low_rank.shift.{peak}.rank_95"] == curve.rank_95
    kinds = {type(value) for column in table for value in table[column]}
    assert not kinds & {list, dict, AuditRecord}, "single numbers only"
    assert "spinal" not in table


def test_the_layer_table_is_tidy(tmp_path: Path) -> None:
    records = make_run(audits=3, layers=5)
    log = RunLog(tmp_path)
    for record in records:
        log.append(record)
    table = AuditRun.load(tmp_path).to_pandas(layers=True)
    assert table[["step", "layer"]].to_numpy().tolist() == [[s, layer] for s in (0, 50, 100) for layer in range(5)]
    last = records[2]
    assert last.patching is not None
    assert last.spinal is not None
    rows = table[table.step == 100]
    for name, estimates in (
        ("effect", last.patching.effect),
        ("recovery", last.patching.recovery),
        ("layer_gain", last.patching.layer_gain),
        ("block_transplant", last.patching.block_transplant),
        ("noise_effect", last.controls.noise.effect),
        ("reverse_effect", last.controls.reverse.effect),
    ):
        assert estimates is not None
        assert rows[name].tolist() == [estimate.mean for estimate in estimates]
        assert rows[f"{name}_low"].tolist() == [estimate.low for estimate in estimates]
        assert rows[f"{name}_high"].tolist() == [estimate.high for estimate in estimates]
    assert rows["policy_contraction"].tolist() == last.spinal.policy.contraction
    assert rows["reference_transport"].tolist()[:4] == last.spinal.reference.transport
    assert math.isnan(rows["reference_transport"].tolist()[4])
    assert rows["policy_transport_stderr"].tolist()[:4] == last.spinal.policy.transport_stderr
    assert rows["transport_change_stderr"].tolist()[:4] == last.spinal.transport_change_stderr
    assert rows["terminal"].tolist() == [layer in last.spinal.terminal_layers for layer in range(5)]
    measured = rows["shift_rank_95"].notna().tolist()
    assert measured == [
        layer in last.low_rank["shift"] and not math.isnan(last.low_rank["shift"][layer].rank_95) for layer in range(5)
    ]
    assert table[table.step == 0]["recovery"].isna().all()


def test_tables_of_records_with_parts_switched_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(make_record(1, layers=3, patching=False, localization=False, low_rank=False, spinal=False))
    run = AuditRun.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run.to_pandas(layers=True)) == 3
        assert "patching" not in run.to_pandas()


def test_the_latest_audit_of_a_step_counts() -> None:
    first, second = make_run(audits=2, layers=2)
    again = first.model_copy(
        update={"provenance": first.provenance.model_copy(update={"created": "2031-01-01T00:00:00+00:00"})}
    )
    assert one_per_step([again, second, first]) == [again, second]
