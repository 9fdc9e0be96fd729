"""When an audit is made, by event and state of training: decisions alone, without any training."""

from __future__ import annotations

from typing import Any

import pytest

from align_audit.config import ScheduleConfig
from align_audit.monitoring.schedule import Decision, Event, Training, decide

NOTHING, AUDIT, LATER = Decision.NOTHING, Decision.AUDIT, Decision.LATER
NEVER: dict[str, Any] = {"before_training": False, "on_save": False, "on_evaluate": False, "on_last_step": False}


def decided(event: Event, options: dict[str, Any], training: dict[str, Any], pending: bool = False) -> Decision:
    """With only these options on, at step 4 of 10 where ``training`` does not say otherwise."""
    return decide(
        event, Training(**{"step": 4, "max_steps": 10, **training}), ScheduleConfig(**{**NEVER, **options}), pending
    )


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("event", list(Event))
def test_with_everything_off_only_what_is_pending_is_audited(event: Event, pending: bool) -> None:
    waits_no_longer = {Event.STEP_BEGIN, Event.EVALUATE, Event.SAVE, Event.EPOCH_END}
    expected = AUDIT if pending and event in waits_no_longer else NOTHING
    assert decided(event, {}, {}, pending) is expected


@pytest.mark.parametrize(
    ("option", "event"),
    [("before_training", Event.TRAIN_BEGIN), ("on_save", Event.SAVE), ("on_evaluate", Event.EVALUATE)],
)
def test_an_option_asks_at_its_own_event_alone(option: str, event: Event) -> None:
    assert [each for each in Event if decided(each, {option: True}, {}) is AUDIT] == [event]


@pytest.mark.parametrize("event", [Event.EVALUATE, Event.SAVE])
def test_an_event_that_asks_audits_what_is_pending_with_it(event: Event) -> None:
    assert decided(event, {"on_save": True, "on_evaluate": True}, {}, pending=True) is AUDIT


@pytest.mark.parametrize(
    ("step", "expected"), [(1, NOTHING), (2, NOTHING), (3, AUDIT), (4, NOTHING), (6, AUDIT), (10, NOTHING)]
)
def test_every_third_step(step: int, expected: Decision) -> None:
    assert decided(Event.STEP_END, {"every_n_steps": 3}, {"step": step}) is expected


@pytest.mark.parametrize(
    ("event", "training", "expected"),
    [
        (Event.STEP_END, {"step": 9}, NOTHING),
        (Event.STEP_END, {"step": 10}, AUDIT),
        (Event.STEP_END, {"step": 9, "stopping": True}, AUDIT),
        (Event.EPOCH_END, {"step": 10}, NOTHING),
        (Event.EPOCH_END, {"step": 9, "stopping": True}, AUDIT),
        (Event.TRAIN_END, {"step": 9}, AUDIT),
        (Event.TRAIN_END, {"step": 10, "best_loaded": True}, NOTHING),
        (Event.STEP_END, {"step": 10, "best_loaded": True}, AUDIT),
        (Event.SAVE, {"step": 10, "stopping": True}, NOTHING),
        (Event.EVALUATE, {"step": 10, "stopping": True}, NOTHING),
    ],
)
def test_the_last_step_is_whichever_event_can_tell(event: Event, training: dict[str, Any], expected: Decision) -> None:
    assert decided(event, {"on_last_step": True}, training) is expected


@pytest.mark.parametrize(
    ("event", "options", "training", "expected"),
    [
        (Event.STEP_END, {"every_n_steps": 2}, {}, LATER),
        (Event.STEP_END, {"on_last_step": True}, {"step": 10}, LATER),
        (Event.STEP_END, {"every_n_steps": 3}, {}, NOTHING),
        # By now the reference was synchronized.
        (Event.SAVE, {"on_save": True}, {}, AUDIT),
        (Event.EVALUATE, {"on_evaluate": True}, {}, AUDIT),
        (Event.TRAIN_END, {"on_last_step": True}, {"step": 10}, AUDIT),
    ],
)
def test_an_audit_waits_while_the_reference_is_about_to_be_synchronized(
    event: Event, options: dict[str, Any], training: dict[str, Any], expected: Decision
) -> None:
    assert decided(event, options, {"syncs_reference": True, **training}) is expected


@pytest.mark.parametrize("asks", [False, True])
def test_the_start_forgets_what_an_earlier_training_left(asks: bool) -> None:
    decision = decided(Event.TRAIN_BEGIN, {"before_training": asks}, {"step": 0}, pending=True)
    assert decision is (AUDIT if asks else NOTHING)
