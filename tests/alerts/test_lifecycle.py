"""The life of an alert, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from align_audit.alerts.lifecycle import step
from align_audit.record.alert import Alert
from align_audit.record.open_alerts import cause_of, open_after


def alert(at: int, level: Any = "warning", cause: str = "drift", **changes: Any) -> Alert:
    values: dict[str, Any] = {"rule": "kl_out_of_bounds", "value": 1.0, "message": "", "suggestion": ""}
    return Alert(**(values | {"step": at, "level": level, "cause": cause} | changes))


def lives(alerts: list[Alert]) -> list[tuple[str, str, int | None, int]]:
    return [(each.event, each.level, each.since, each.looks) for each in alerts]


def test_a_whole_life() -> None:
    opened = step([], [alert(10)], 10)
    assert lives(opened) == [("opened", "warning", 10, 1)]
    worse = step(opened, [alert(20, "error", value=3.0)], 20)
    assert lives(worse) == [("worse", "error", 10, 2)]
    milder = step(worse, [alert(30, value=0.5)], 30)
    assert lives(milder) == [("open", "error", 10, 3)]
    assert milder[0].value == 0.5
    unseen = step(milder, [], 40)
    assert lives(unseen) == [("open", "error", 10, 0)]
    assert lives(step(unseen, [], 50)) == [("resolved", "error", 10, 0)]
    assert lives(step(unseen, [alert(50)], 50)) == [("open", "error", 10, 1)]


def test_looks_at_one_step_count_once() -> None:
    opened = step([], [alert(10)], 10)
    assert lives(step(opened, [alert(10, "error")], 10)) == [("worse", "error", 10, 1)]
    unseen = step(step(opened, [], 20), [], 20)
    assert lives(unseen) == [("open", "warning", 10, 0)]
    assert lives(step(unseen, [], 30)) == [("resolved", "warning", 10, 0)]


def test_what_was_measured_earlier_keeps_open_and_opens_nothing() -> None:
    assert step([], [alert(10)], 20) == []
    opened = step([], [alert(10)], 10)
    assert lives(step(opened, [alert(10)], 20)) == [("open", "warning", 10, 1)]


def test_what_nothing_can_be_said_of_stays_as_it_is() -> None:
    opened = step([], [alert(10)], 10)
    (held,) = step(opened, [], 20, {"drift"})
    assert (held.event, held.looks, held.step) == ("open", 1, 20)


def test_causes_live_apart() -> None:
    both = step([], [alert(10), alert(10, cause="preference")], 10)
    assert lives(step(both, [alert(20)], 20)) == [("open", "warning", 10, 2), ("open", "warning", 10, 0)]


def test_advice_is_kept_while_it_is_open() -> None:
    opened = step([], [alert(10)], 10)
    opened = [
        each.model_copy(update={"checkpoint": "checkpoint-5", "clean_step": 5, "command": "go"}) for each in opened
    ]
    (kept,) = step(opened, [alert(20)], 20)
    assert (kept.checkpoint, kept.clean_step, kept.command) == ("checkpoint-5", 5, "go")


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_open_after_a_step_does_not_depend_on_the_order_of_its_sets(order: int) -> None:
    resolved = alert(20, event="resolved", since=10)
    opened_anew = alert(20, event="opened", since=20)
    still, milder = alert(20, "error", event="worse", since=10, looks=2), alert(20, event="open", since=10)
    assert open_after([resolved], 20) == []
    assert open_after([alert(20, event="open", since=10), resolved][::order], 20) == []
    assert open_after([resolved, opened_anew][::order], 20) == [opened_anew]
    assert lives(open_after([still, milder][::order], 20)) == [("worse", "error", 10, 2)]


def test_alerts_of_earlier_versions_have_the_cause_of_their_rule() -> None:
    assert cause_of(alert(10, cause="")) == "drift"
    assert cause_of(alert(10, cause="", rule="control_failed")) == "control_failed"
    assert lives(step([alert(10, cause="")], [alert(20)], 20)) == [("open", "warning", 10, 2)]
