"""What happens when an audit, the log or a writer breaks, on one process and on several."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from align_audit import AuditRun, ProbeSet
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import AlignAuditError
from align_audit.models.reference import resolve_reference
from align_audit.monitoring import monitor as module
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import AuditFailure, Moment
from align_audit.ranks import Ranks
from align_audit.record import log as log_module
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.terminal import Terminal
from align_audit.writers.web.report_writer import Report
from align_audit.writers.writer import Writers
from tests.helpers.callback_runs import quick
from tests.helpers.monitor_bench import AT_ONCE, Broken, Curves
from tests.helpers.tiny import random_pairs


def test_curves_that_break_cost_no_record(bench: Any, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    outcome = bench(writers=Writers([Curves(breaks=True), Terminal()])).audit(1)
    assert outcome.failures == []
    assert list(outcome.records) == [None]
    assert "could not write step 1 to TensorBoard" in caplog.text
    assert "step 1" in capsys.readouterr().out, "the terminal was told all the same"


def test_a_terminal_that_breaks_costs_no_record(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: Any) -> None:
        raise SystemExit("nobody reads")

    monkeypatch.setattr(Terminal, "record", gone)
    curves = Curves()
    first = bench(writers=Writers([Terminal(), curves]))
    assert first.audit(1).failures == []
    assert first.audit(2).failures == []
    assert curves.told == [(1, [1]), (2, [1, 2])]
    assert [record.step for record in first.run.records] == [1, 2]
    assert "could not write step 2 to standard output: SystemExit: nobody reads" in caplog.text


def test_writers_are_told_of_alerts_after_their_record(bench: Any) -> None:
    curves = Curves()
    outcome = bench(writers=Writers([curves]), config=quick(alerts=AT_ONCE)).audit(1)
    assert curves.alerts == [(alert.rule, 1) for alert in outcome.alerts] != []


def test_an_audit_that_the_log_holds_already_is_told_to_nobody(bench: Any) -> None:
    """Another monitor on the same log has audited these weights since this one read what is in it."""
    writer, again = Curves(), Curves()
    first = bench(config=quick(alerts=AT_ONCE), writers=Writers([writer]))
    second = bench(config=quick(alerts=AT_ONCE), writers=Writers([again]), log=first.monitor.log)
    first.audit(1)
    second.audit(1)
    assert (writer.told, writer.alerts) == ([(1, [1])], [("at_once", 1)])
    assert (again.told, again.alerts) == ([], [])
    assert len(first.run.records) == 1


def test_the_trainers_log_is_on_disk_with_the_audit(
    bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training_log = TrainingLog(tmp_path / "run")
    monitor = bench(training_log=training_log)
    training_log.append(1, {"loss": 0.5})
    training_log.path.unlink()
    monitor.audit(1)
    assert "training.jsonl is not safe on disk: FileNotFoundError" in caplog.text
    assert [record.step for record in monitor.run.records] == [1], "which costs no audit"


@pytest.mark.parametrize("method", ["save_arrays", "append"])
def test_an_alert_is_acted_on_although_the_log_cannot_be_written(
    method: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench(quick(alerts={"action": "stop", **AT_ONCE}))
    Broken(monkeypatch, method)
    outcome = first.audit(1)
    assert outcome.stop
    assert [alert.rule for alert in outcome.alerts] == ["at_once"]
    (failure,) = outcome.failures
    assert failure.kind == "OSError: no space left on device"
    assert [stored.step for stored in first.run.failures] == [1]
    assert "in fail" in failure.traceback


class Large:
    """Stands for the recordings of both models."""


def test_an_audit_that_broke_keeps_nothing_of_what_it_measured(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody collects garbage for it: memory of an accelerator that is held so is training's."""
    held = []

    def breaks(*_: Any) -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise ValueError("planted")

    monkeypatch.setattr(module, "run_audit", breaks)
    first = bench()
    gc.collect()
    gc.disable()
    try:
        outcome = first.audit(1)
        assert [each() for each in held] == [None]
    finally:
        gc.enable()
    assert "large = Large()" not in outcome.failures[0].traceback
    assert 'raise ValueError("planted")' in outcome.failures[0].traceback


def test_an_exit_that_a_handler_of_the_users_asks_for_is_no_audit_that_breaks(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster is about to stop the program, whose handler ends it."""
    monkeypatch.setattr(module, "run_audit", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    first = bench()
    try:
        with pytest.raises(SystemExit):
            first.audit(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert first.run.failures == []

    def asks_for_it(*_: Any) -> None:
        raise SystemExit("a library")

    monkeypatch.setattr(module, "run_audit", asks_for_it)
    assert [failure.kind for failure in first.audit(2).failures] == ["SystemExit: a library"]


@pytest.mark.parametrize("method", ["append", "save_arrays"])
def test_what_the_disk_refuses_is_told_all_the_same_and_once(
    method: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A webhook or a tracker is told of an alert on a full disk, and the log has the audit when there is room again."""
    curves = Curves()
    first = bench(writers=Writers([curves]), config=quick(alerts=AT_ONCE))
    with monkeypatch.context() as full:
        if method == "append":
            full.setattr(log_module, "append_whole", no_room)
        else:
            full.setattr(RunLog, "save_arrays", no_room)
        outcome = first.audit(1)
        assert first.audit(2).failures
    assert outcome.failures and [alert.rule for alert in outcome.alerts] == ["at_once"]
    assert curves.alerts == [("at_once", 1)], "told when it opened, and not again"
    with contextlib.nullcontext() if method == "save_arrays" else pytest.warns(UserWarning, match="had refused are in"):
        assert first.audit(3).failures == []
    assert [record.step for record in first.run.records] == [1, 2, 3]


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_failure_that_cannot_be_recorded_is_said(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = bench()
    Broken(monkeypatch, "append", "append_failure")
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        first.audit(1)
    (shown,) = [entry.getMessage() for entry in caplog.records]
    assert "could not be recorded (OSError: no space left on device)" in shown
    # It lies in no file, so the traceback is here.
    assert "failures.jsonl" not in shown
    assert "in fail" in shown


def test_a_failure_that_was_recorded_is_said_with_its_place(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = bench()
    Broken(monkeypatch, "append")
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        first.audit(1)
    (shown,) = [entry.getMessage() for entry in caplog.records]
    assert "broke and was recorded" in shown
    assert "align_audit/failures.jsonl" in shown
    assert "Traceback" not in shown


def test_an_audit_that_breaks_is_on_the_page_at_once(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that went on saying HEALTHY while no audit comes through would be believed."""
    report = Report()
    first = bench(writers=Writers([report]))
    report.start(AuditRun.of(first.monitor.log))
    plant(monkeypatch, None)
    first.audit(1)
    page = (first.run.directory / "report.html").read_text(encoding="utf-8")
    assert "ZeroDivisionError: planted" in page
    assert '"word":"BLIND"' in page


def test_an_error_without_words_is_called_by_its_name() -> None:
    assert AuditFailure.of(MemoryError()).kind == "MemoryError"
    assert AuditFailure.of(MemoryError("8 GB")).kind == "MemoryError: 8 GB"


def plant(monkeypatch: pytest.MonkeyPatch, *names: str | None) -> list[str | None]:
    """Audits on these sets break; which were tried."""
    tried: list[str | None] = []
    real = module.run_audit

    def fails(models: Any, request: AuditRequest, *more: Any) -> Any:
        tried.append(request.probe_name)
        if request.probe_name in names:
            raise ZeroDivisionError("planted")
        return real(models, request, *more)

    monkeypatch.setattr(module, "run_audit", fails)
    return tried


SETS: dict[str, ProbeSet] = {"a": random_pairs(8), "b": random_pairs(8, seed=1), "c": random_pairs(8, seed=2)}


def test_a_set_that_breaks_leaves_the_others(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = plant(monkeypatch, "b")
    first = bench(sets=SETS)
    outcome = first.audit(1)
    assert list(outcome.records) == ["a", "c"]
    assert [(failure.probe_name, failure.kind) for failure in outcome.failures] == [("b", "ZeroDivisionError: planted")]
    (stored,) = first.run.failures
    assert (stored.step, stored.probe_name) == (1, "b")
    assert "in fails" in stored.error, "the traceback leads to the place"
    assert first.audit(1).failures == [], "the same weights would break again"
    assert tried == ["a", "b", "c"]


def test_what_breaks_is_shown_once_and_recorded_each_time(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, None)
    first = bench()
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        first.audit(1)
        first.audit(2)
    (shown,) = [entry.getMessage() for entry in caplog.records]
    assert "the audit at step 1 broke and was recorded; training goes on. ZeroDivisionError: planted" in shown
    assert [stored.step for stored in first.run.failures] == [1, 2]


def test_strict_raises_after_recording(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = plant(monkeypatch, "b")
    first = bench(sets=SETS, strict=True)
    with pytest.raises(ZeroDivisionError, match="planted"):
        first.audit(1)
    assert tried == ["a", "b"]
    assert [record.provenance.probe_name for record in first.run.records] == ["a"]
    assert [stored.probe_name for stored in first.run.failures] == ["b"]


def test_a_keyboard_interrupt_is_the_users(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    first = bench()
    monkeypatch.setattr(module, "run_audit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.audit(1)
    assert first.run.failures == []


# -- several processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside(Ranks):
    """The processes of a run of two, of which the other one says what ``says`` is."""

    says: Any = ([], [], None)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.says] if self.rank == 0 else [self.says, value]


def test_a_process_without_a_log_asks_for_what_the_first_one_asks(
    reference: nn.Module, policies: list[nn.Module], bench: Any
) -> None:
    config = quick(alerts={"action": "stop", **AT_ONCE})
    alerts = bench(config).audit(1).alerts
    second = Monitor({None: random_pairs(8)}, config, ranks=Beside(1, 2, says=(alerts, [], 8)))
    outcome = second.audit(OpenModels(policies[1], resolve_reference(policies[1], reference)), Moment(1))
    assert outcome.records == {}
    assert (outcome.alerts, outcome.stop, outcome.next_look) == (alerts, True, 8)


def broke_beside() -> Beside:
    failure = AuditFailure("ValueError: planted", "Traceback: planted\n", "a")
    return Beside(0, 2, says=([], [failure], None))


def test_what_breaks_on_another_process_is_recorded_with_its_rank(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = bench(ranks=broke_beside())
    (failure,) = first.audit(1).failures
    assert failure.rank == 1
    (stored,) = first.run.failures
    assert stored.error == "On rank 1:\nTraceback: planted\n"
    assert "on the probes 'a' broke on rank 1 and was recorded" in caplog.text


def test_strict_raises_on_every_process(bench: Any) -> None:
    with pytest.raises(AlignAuditError, match="the audit broke on rank 1: ValueError: planted"):
        bench(ranks=broke_beside(), strict=True).audit(1)


def test_closing_lets_go_of_curves_and_processes(bench: Any) -> None:
    curves = Curves()
    first = bench(writers=Writers([curves]), ranks=broke_beside())
    first.monitor.close()
    first.monitor.close()
    assert curves.closed == 1
    assert first.audit(1).failures == [], "alone now"
