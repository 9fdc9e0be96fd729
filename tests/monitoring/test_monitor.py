"""The life of an audit, without a trainer: what is due, what it goes on from, and what happens when something breaks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align_audit import Alert, AuditConfig, AuditRecord, AuditRun, ProbeSet
from align_audit.alerts import detectors
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import AlignAuditError
from align_audit.models.reference import policy_fingerprint, resolve_reference
from align_audit.monitoring import monitor as module
from align_audit.monitoring.monitor import Monitor, comparable
from align_audit.monitoring.outcome import AuditFailure, Moment, Outcome
from align_audit.ranks import Ranks
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.terminal import Terminal
from align_audit.writers.web.report_writer import Report
from align_audit.writers.writer import Writers
from tests.helpers.tiny import perturbed, random_pairs, tiny_model
from tests.monitoring.test_callback import quick

AT_ONCE: dict[str, Any] = {"rules": {"at_once": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}}
"""Limits that any policy that has moved at all is beyond."""


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def policies(reference: nn.Module) -> list[nn.Module]:
    """Of steps 0 to 3; the first has not moved."""
    return [perturbed(reference, scale=0.02 * step, seed=step) for step in range(4)]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[AuditRequest]:
    """What is asked of each audit that is made."""
    made: list[AuditRequest] = []
    real = module.run_audit

    def watched(models: Any, request: AuditRequest, *more: Any) -> Any:
        made.append(request)
        return real(models, request, *more)

    monkeypatch.setattr(module, "run_audit", watched)
    return made


class Bench:
    """A monitor on a log in ``output``, and audits of the policy of a step."""

    def __init__(
        self,
        reference: nn.Module,
        policies: list[nn.Module],
        output: Path,
        config: AuditConfig | None = None,
        **options: Any,
    ) -> None:
        self.reference, self.policies = reference, policies
        sets = options.pop("sets", {None: random_pairs(8)})
        log = options.pop("log", None) or RunLog(output)
        self.monitor = Monitor(sets, config or quick(), log, **options)
        self.output = output

    def audit(self, policy: int, step: int | None = None) -> Outcome:
        models = OpenModels(self.policies[policy], resolve_reference(self.policies[policy], self.reference))
        return self.monitor.audit(models, Moment(policy if step is None else step))

    @property
    def run(self) -> AuditRun:
        return AuditRun.load(self.output)


@pytest.fixture
def bench(reference: nn.Module, policies: list[nn.Module], tmp_path: Path) -> Any:
    """Makes benches; all in one folder, so that a second one goes on with the log of the first."""
    return lambda config=None, **options: Bench(reference, policies, tmp_path / "run", config, **options)


class Broken:
    """A method that breaks from now on, as a full disk would make it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(RunLog, name, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise OSError("no space left on device")


class Curves:
    """Stands for the TensorBoard curves."""

    name = "TensorBoard"

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.told: list[tuple[int, list[int]]] = []
        self.alerts: list[tuple[str, int]] = []
        self.closed = 0

    def start(self, run: AuditRun) -> None:
        raise AssertionError("started already")

    def record(self, record: AuditRecord, history: Any) -> None:
        if self.breaks:
            raise OSError("no space left on device")
        self.told.append((record.step, [each.step for each in history]))

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        self.alerts.append((alert.rule, record.step))

    def close(self) -> None:
        self.closed += 1


# -- what is due -------------------------------------------------------------------------------------------------------


def test_weights_are_audited_once_at_a_step(bench: Any, requests: list[AuditRequest]) -> None:
    first = bench()
    assert list(first.audit(1).records) == [None]
    assert first.audit(1).records == {}
    first.audit(2, step=1)
    first.audit(1, step=2)
    assert [request.step for request in requests] == [1, 1, 2]
    assert [record.step for record in first.run.records] == [1, 1, 2]


def test_what_an_earlier_process_audited_is_not_due(bench: Any, requests: list[AuditRequest]) -> None:
    bench().audit(1)
    second = bench()
    assert second.monitor.due(1, policy_fingerprint(second.policies[1])) == []
    assert second.monitor.due(1, policy_fingerprint(second.policies[2])) == [None]
    assert second.monitor.due(2, policy_fingerprint(second.policies[1])) == [None]
    assert second.audit(1) == Outcome({}, [], [], [], save=False, stop=False)
    assert len(requests) == 1


def test_a_set_that_the_log_lacks_is_audited_alone(bench: Any, requests: list[AuditRequest]) -> None:
    sets = {"a": random_pairs(4), "b": random_pairs(5, seed=1)}
    bench(sets={"b": sets["b"]}).audit(1)
    assert list(bench(sets=sets).audit(1).records) == ["a"]
    assert [request.probe_name for request in requests] == ["b", "a"]


def test_nothing_is_opened_where_nothing_is_due(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench()
    first.audit(1)
    monkeypatch.setattr(OpenModels, "__enter__", None)
    assert first.audit(1).failures == []


def test_all_processes_know_what_the_first_ones_log_holds(bench: Any, reference: nn.Module) -> None:
    bench().audit(1)
    first = bench()
    first.monitor.agree()

    class Second(Ranks):
        def share(self, value: Any) -> Any:
            return first.monitor._audited

    second = Monitor({None: random_pairs(8)}, quick(), ranks=Second(1, 2))
    weights = policy_fingerprint(first.policies[1])
    assert second.due(1, weights) == [None]
    second.agree()
    assert second.due(1, weights) == []


# -- what an audit goes on from, and is judged by ----------------------------------------------------------------------

LOW_RANK = quick(low_rank={"layers": [1], "ranks": [1], "random_draws": 0})


def came_from(request: AuditRequest, run: AuditRun) -> int | None:
    """The step whose subspace the audit was given; None: it was given none."""
    given = request.previous.subspaces.get(("shift", 1))
    for record in run.records:
        stored = run.load_arrays(record.step, "arrays").get("subspace.shift.1")
        if given is not None and stored is not None and (given == stored).all():
            return record.step
    assert given is None
    return None


def test_an_audit_goes_on_from_the_one_before_in_memory(bench: Any, requests: list[AuditRequest]) -> None:
    first = bench(LOW_RANK)
    for step in (1, 2, 3):
        first.audit(step)
    assert [came_from(request, first.run) for request in requests] == [None, 1, 2]


@pytest.mark.parametrize(("step", "expected"), [(1, None), (2, 1), (3, 2), (4, 2)])
def test_a_resumed_run_goes_on_from_the_last_audit_before_its_step(
    step: int, expected: int | None, bench: Any, requests: list[AuditRequest]
) -> None:
    first = bench(LOW_RANK)
    first.audit(1)
    first.audit(2)
    second = bench(LOW_RANK)
    second.monitor.resume(step)
    second.audit(3, step=9)
    assert came_from(requests[-1], first.run) == expected


def test_an_audit_passed_by_hands_on_what_it_left(bench: Any, requests: list[AuditRequest]) -> None:
    """Killed after step 2, resumed at step 1: step 2 is in the log, and step 3 goes on from it."""
    first = bench(LOW_RANK)
    first.audit(1)
    first.audit(2)
    second = bench(LOW_RANK)
    second.monitor.resume(2)
    second.audit(2)
    second.audit(3)
    second.audit(2)  # as where two events of one step fall together
    second.audit(3, step=4)
    assert [request.step for request in requests] == [1, 2, 3, 4]
    assert [came_from(request, first.run) for request in requests[2:]] == [2, 3]


def test_other_pairs_are_not_gone_on_from(bench: Any, requests: list[AuditRequest]) -> None:
    bench(LOW_RANK).audit(1)
    second = bench(LOW_RANK, sets={None: random_pairs(5, seed=1)})
    second.monitor.resume(2)
    second.audit(2)
    assert requests[-1].previous.subspaces == {}


def test_an_audit_is_judged_by_earlier_ones_of_its_own_pairs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[int, list[int]]] = []
    asked: list[int] = []
    judge = module.judge
    monkeypatch.setattr(
        module, "judge", lambda record, *rest, **more: asked.append(record.step) or judge(record, *rest, **more)
    )
    real = detectors._history

    def watched(view: Any, newest: AuditRecord, course: Any) -> Any:
        history = real(view, newest, course)
        if len(judged) < len(asked):  # the new record comes first, then the last ones of other sets
            judged.append((newest.step, [each.step for each in history.before]))
        return history

    monkeypatch.setattr(detectors, "_history", watched)
    pairs, others = random_pairs(4), random_pairs(5, seed=1)
    bench(sets={"a": others}).audit(0)
    first = bench(sets={"a": pairs, "b": others})
    first.audit(1)
    first.audit(3)
    first.audit(2)
    assert judged == [(0, []), (1, []), (1, []), (3, [1]), (3, [1]), (2, [1]), (2, [1])]


def test_comparable_audits(bench: Any) -> None:
    sets = {"a": random_pairs(4), "b": random_pairs(5, seed=1)}
    first = bench(sets=sets)
    for step in (1, 2, 3):
        first.audit(step)
    records, pairs = first.run.records, sets["a"].content_hash
    assert [each.step for each in comparable(records, "a", pairs, 3)] == [1, 2]
    assert comparable(records, "a", pairs, 1) == []
    assert comparable(records, "a", sets["b"].content_hash, 3) == []
    assert {each.provenance.probe_name for each in comparable(records, "b", sets["b"].content_hash, 9)} == {"b"}


# -- what an audit asks of training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "level", "limits", "save", "stop"),
    [
        ("log", "error", AT_ONCE, False, False),
        ("save", "error", AT_ONCE, True, False),
        ("stop", "error", AT_ONCE, True, True),
        ("stop", "error", {"kl_warning": 1e-9, "kl_error": 1e9}, False, False),
        ("stop", "warning", {"kl_warning": 1e-9, "kl_error": 1e9}, True, True),
        ("stop", "warning", {"kl_warning": 1e9, "kl_error": 1e9}, False, False),
    ],
)
def test_alerts_become_wishes(
    action: str, level: str, limits: dict[str, Any], save: bool, stop: bool, bench: Any
) -> None:
    outcome = bench(quick(alerts={"action": action, "action_level": level, **limits})).audit(1)
    assert (outcome.save, outcome.stop) == (save, stop)
    if save:
        assert outcome.reasons == ["at_once" if limits is AT_ONCE else "kl_out_of_bounds"]


# -- what breaks -------------------------------------------------------------------------------------------------------


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
