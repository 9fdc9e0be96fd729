"""The life of an audit, without a trainer: what is due, what it goes on from, and what it asks of training."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from align_audit import AuditRecord, AuditRun
from align_audit.alerts import detectors
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import policy_fingerprint, resolve_reference
from align_audit.monitoring import monitor as module
from align_audit.monitoring.monitor import Monitor, comparable
from align_audit.monitoring.outcome import Moment, Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Training
from align_audit.ranks import Ranks
from tests.helpers.callback_runs import quick
from tests.helpers.monitor_bench import AT_ONCE
from tests.helpers.tiny import random_pairs

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
            judged.append((newest.step, [each.step for each in history.earlier]))
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
        ("stop", "error", {"kl_warning": 1e-9, "kl_error": 1e9, "kl_chosen_drop": -1e2}, False, False),
        ("stop", "warning", {"kl_warning": 1e-9, "kl_error": 1e9, "kl_chosen_drop": -1e2}, True, True),
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


# -- what a look says of a full audit ----------------------------------------------------------------------------------


def test_a_look_says_how_much_more_work_a_full_audit_is(bench: Any) -> None:
    config = quick(localization={"enabled": False})
    pace = Pace(config, 0)
    looking = bench(config=config, pace=pace)
    begun, factors = Training(0, 100), []
    for step in (1, 2):
        training = Training(step, 100)
        models = OpenModels(looking.policies[step], resolve_reference(looking.policies[step], looking.reference))
        assert looking.monitor.audit(models, Moment(step, kind="health", training=training)).failures == []
        factors.append(pace.spent(training).per_look)
    assert pace.spent(begun).expected_full == factors[1] * pace.spent(begun).health
    assert 1 < factors[0] < factors[1], "a later look does not compute the reference's side"


def test_a_count_that_breaks_costs_no_look(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It only helps to plan: the look is made, it is said once, and the layers judge in its place."""
    asked = []

    def breaks(*_: Any, first: bool, **__: Any) -> float:
        asked.append(first)
        raise ZeroDivisionError

    monkeypatch.setattr("align_audit.monitoring.monitor.full_per_look", breaks)
    config = quick(localization={"enabled": False})
    pace = Pace(config, 0)
    looking = bench(config=config, pace=pace)
    for step in (1, 2, 3):
        training = Training(step, 100)
        models = OpenModels(looking.policies[step], resolve_reference(looking.policies[step], looking.reference))
        outcome = looking.monitor.audit(models, Moment(step, kind="health", training=training))
        assert outcome.failures == []
        assert [record.step for record in outcome.records.values()] == [step]
        assert pace.spent(training).per_look is None
    assert asked == [True, False], "what broke is not tried at every look"
    assert sum("could not be counted" in entry.message for entry in caplog.records) == 2
