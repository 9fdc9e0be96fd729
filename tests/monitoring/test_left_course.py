"""What a run that goes on is judged by, and what it may go back to: nothing of the course that it left."""

from __future__ import annotations

from typing import Any

import pytest

from align_audit.alerts import detectors
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import resolve_reference
from align_audit.monitoring.outcome import Moment
from align_audit.monitoring.schedule import Training
from tests.helpers.callback_runs import quick
from tests.helpers.monitor_bench import AT_ONCE
from tests.record.test_turns import saved


def test_an_alert_of_the_course_that_was_left_is_not_open_in_the_new_one(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after an alert at step 3; resumed from step 1, it is audited first at step 4."""
    judged_by: list[list[int]] = []
    real = detectors.course_of

    def watched(record: Any, earlier: Any) -> Any:
        course = real(record, earlier)
        judged_by.append([each.step for each in course])
        return course

    first = bench(quick(alerts=AT_ONCE))
    for step in (1, 2, 3):
        first.audit(step)
    assert [alert.event for alert in first.run.records[-1].alerts] == ["open"]
    second = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9}))
    second.monitor.log.go_on(1)
    second.monitor.resume(2)
    monkeypatch.setattr(detectors, "course_of", watched)
    second.audit(1, step=4)
    second.audit(2, step=5)
    assert judged_by == [[1], [1, 4]]


def test_an_alert_names_no_checkpoint_of_the_course_that_was_left(bench: Any) -> None:
    """Resumed from step 1, clean at step 4, and not at step 6: ``checkpoint-3`` is there, of the course before."""
    first = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9}))
    first.audit(1)
    saved(first.output, 1, 300.0)
    saved(first.output, 3, 200.0)

    def late(history: Any) -> str | None:
        return "It is late." if history.step > 5 else None

    second = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9, "rules": {"late": late}}))
    second.monitor.log.go_on(1)
    second.monitor.resume(2)
    for step, policy in ((4, second.policies[2]), (6, second.policies[3])):
        models = OpenModels(policy, resolve_reference(policy, second.reference))
        outcome = second.monitor.audit(models, Moment(step, training=Training(step, 9)))
    alert = next(alert for alert in outcome.alerts if alert.rule == "late")
    assert (alert.clean_step, alert.checkpoint) == (4, "checkpoint-1")
