"""The report beside the log: when it is written, of what, and what it costs a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, RecordError
from align_audit.record.log import RunLog
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow
from align_audit.writers.closing_table import REPORT
from align_audit.writers.web.report_writer import Report, report_of
from align_audit.writers.writer import Surroundings, Writers
from tests.helpers.alert_cases import with_part
from tests.helpers.make_record import make_run
from tests.helpers.pages import data_in
from tests.helpers.screens import a_run, screen


def data_of(path: Path) -> dict[str, Any]:
    """The value that a page was made of."""
    return data_in(path.read_text(encoding="utf-8"))


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    """Written after each audit, at one that broke, and at the end with what was logged since."""
    log, logged = RunLog(tmp_path), [LogRow(5, {"loss": 0.6})]
    report = log.directory / REPORT
    writers = Writers([Report(lambda: logged)])
    writers.start(AuditRun.of(log))
    assert not report.exists()
    steps = []
    for record in a_run("ruined"):
        log.append(record)
        writers.record(record, log.records)
        (only,) = data_of(report)["sets"]
        steps.append((record.step, only["status"]["word"], only["panels"][0]["steps"][-1]))
    assert steps == [(0, "HEALTHY", 0), (5, "HEALTHY", 5), (10, "HEALTHY", 10), (20, "ERROR", 20), (40, "ERROR", 40)]
    log.append_failure(50, "RuntimeError: no memory")
    writers.failure()
    assert data_of(report)["run"]["failures"][0][0] == "50"
    logged.append(LogRow(60, {"loss": 0.2}))
    writers.close()
    (only,) = data_of(report)["sets"]
    assert only["training"][0]["values"] == [0.6, 0.2]
    assert list(log.directory.glob("*.tmp")) == []


def test_audits_that_break_from_the_start_have_a_page(tmp_path: Path) -> None:
    """Silence must not look like health."""
    log = RunLog(tmp_path)
    writers = Writers([Report()])
    writers.start(AuditRun.of(log))
    log.append_failure(20, "RuntimeError: no memory")
    writers.failure()
    assert data_of(log.directory / REPORT)["run"]["status"]["word"] == "BLIND"


def test_a_run_without_audits_leaves_no_page(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    writers = Writers([Report()])
    writers.start(AuditRun.of(log))
    writers.close()
    assert not (log.directory / REPORT).exists()


def test_a_record_that_the_history_lacks_is_shown(tmp_path: Path) -> None:
    log, records = RunLog(tmp_path), a_run("well")
    report = Report()
    report.start(AuditRun.of(log))
    report.record(records[1], records[:1])
    assert data_of(log.directory / REPORT)["sets"][0]["panels"][0]["steps"] == [0, 5]


def test_a_page_that_cannot_be_written_breaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path)
    (log.directory / REPORT).mkdir()
    writers = Writers([Report()])
    writers.start(AuditRun.of(log))
    for record in a_run("well")[:2]:
        writers.record(record, [record])
    assert "could not write step 0 to the report: IsADirectoryError" in caplog.text
    assert caplog.text.count("Traceback") == 1


def test_it_is_on_unless_it_is_switched_off(tmp_path: Path) -> None:
    assert Report.of(AuditConfig(), Surroundings(tmp_path)) is not None
    assert Report.of(AuditConfig(report=False), Surroundings(tmp_path)) is None
    assert AuditConfig(report=False).measures_as(AuditConfig().to_dict())


def test_the_closing_line_names_the_page(tmp_path: Path) -> None:
    log, records = RunLog(tmp_path), a_run("well")
    writers = Writers([Report()])
    writers.start(AuditRun.of(log))
    for record in records:
        log.append(record)
        writers.record(record, log.records)
    writers.close()
    assert f"report: {log.directory / REPORT}" in screen(records, 400, output_dir=tmp_path)


def test_a_look_at_the_largest_run_costs_a_fraction_of_a_second(tmp_path: Path) -> None:
    """Measured: 0.2 to 0.3 s of processor time for 50 audits of 32 layers; a full audit of such a model takes minutes."""
    log = RunLog(tmp_path)
    for record in make_run("destabilizing", 50, 32):
        log.append(with_part(record, "provenance", policy_hash=f"policy-{record.step}"))
    report = Report()
    report.start(AuditRun.of(log))
    began = time.process_time()
    report.record(log.records[-1], log.records)
    assert time.process_time() - began < 2.0
    assert (log.directory / REPORT).stat().st_size <= 2_000_000


def test_a_stored_run_has_its_page_beside_the_log_or_where_it_is_asked_for(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    for record in a_run("well"):
        log.append(record)
    run, path, size = report_of(tmp_path / "run")
    assert (len(run.records), path, size) == (5, log.directory / REPORT, path.stat().st_size)
    assert report_of(log.directory, tmp_path / "page.html")[1] == tmp_path / "page.html"
    with pytest.raises(ConfigurationError, match="choose a file in a folder that exists"):
        report_of(tmp_path / "run", tmp_path / "nowhere" / "page.html")
    with pytest.raises(RecordError, match="no run log at"):
        report_of(tmp_path / "nothing")
