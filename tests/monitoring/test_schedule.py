"""When an audit is made, and how much of it, by event and state of training: decisions alone, without any training."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from align_audit.monitoring.schedule import (
    Due,
    Event,
    Spent,
    Training,
    afforded,
    affords_escalation,
    affords_full,
    affords_look,
    decide,
    look_after,
)
from align_audit.options.schedule import ScheduleConfig

NEVER: dict[str, Any] = {"before_training": False, "on_save": False, "on_evaluate": False, "on_last_step": False}
BUDGETED = ScheduleConfig(last_step_seconds=0.0)
"""Nothing but looks is made whatever the budget."""
PENDING = Due("health", "left due", later=True)


def decided(
    event: Event,
    options: dict[str, Any],
    training: dict[str, Any],
    pending: Due | None = None,
    next_look: int | None = None,
    audited_at: int = 0,
) -> Due | None:
    """With only these options on, at step 4 of 10 where ``training`` does not say otherwise."""
    at = Training(**{"step": 4, "max_steps": 10, **training})
    return decide(event, at, ScheduleConfig(**{**NEVER, **options}), pending, next_look, audited_at)


@pytest.mark.parametrize(
    ("step", "next_look", "audited_at", "options", "left_out"),
    [
        (500, 640, 320, {}, False),
        (480, 640, 320, {}, False),
        (479, 640, 320, {}, True),
        (500, 640, 480, {}, True),  # the way to it has only begun
        (500, None, 320, {}, True),
        (500, 640, 320, {"health": False}, True),
        (70, 80, 40, {}, True),  # one of those at the start
        (150, 160, 80, {}, False),
        (70, 80, 40, {"first_health": 1}, False),
    ],
)
def test_a_checkpoint_shortly_before_a_look_is_never_left_out(
    step: int, next_look: int | None, audited_at: int, options: dict[str, Any], left_out: bool
) -> None:
    at = {"step": step, "max_steps": 1000}
    due = decided(Event.SAVE, {"on_save": True, **options}, at, next_look=next_look, audited_at=audited_at)
    assert due is not None
    assert (due.kind, due.budgeted, due.optional) == ("full", True, left_out)


def now(due: Due | None) -> bool | None:
    """Whether an audit is made now (True) or later (False); None where none is asked for."""
    return None if due is None else not due.later


@pytest.mark.parametrize("pending", [None, PENDING])
@pytest.mark.parametrize("event", list(Event))
def test_with_everything_off_only_what_is_pending_is_audited(event: Event, pending: Due | None) -> None:
    waits_no_longer = set(Event) - {Event.TRAIN_BEGIN, Event.TRAIN_END}
    expected = True if pending and event in waits_no_longer else None
    assert now(decided(event, {}, {}, pending)) is expected


@pytest.mark.parametrize(
    ("option", "event"),
    [("before_training", Event.TRAIN_BEGIN), ("on_save", Event.SAVE), ("on_evaluate", Event.EVALUATE)],
)
def test_an_option_asks_at_its_own_event_alone(option: str, event: Event) -> None:
    assert [each for each in Event if decided(each, {option: True}, {}) is not None] == [event]


@pytest.mark.parametrize("event", [Event.EVALUATE, Event.SAVE])
def test_an_event_that_asks_for_more_takes_what_is_pending_with_it(event: Event) -> None:
    due = decided(event, {"on_save": True, "on_evaluate": True}, {}, PENDING)
    assert due is not None
    assert (due.kind, due.later) == ("full", False)


def test_what_is_pending_and_larger_is_not_made_smaller() -> None:
    """A full audit that was asked for whatever it costs, at a save that asks for one within the budget."""
    due = decided(Event.SAVE, {"on_save": True}, {}, Due("full", "every 4 steps", later=True))
    assert due == Due("full", "every 4 steps")


@pytest.mark.parametrize(
    ("event", "options", "training", "look"),
    [
        (Event.STEP_END, {}, {}, 4),
        (Event.STEP_END, {"every_n_steps": 4}, {}, None),
        (Event.STEP_END, {"on_last_step": True}, {"step": 10}, None),
        (Event.EPOCH_END, {"on_last_step": True}, {"stopping": True}, None),
        (Event.EVALUATE, {"on_evaluate": True}, {}, None),
    ],
)
def test_what_waits_for_a_save_is_not_left_out_with_it(
    event: Event, options: dict[str, Any], training: dict[str, Any], look: int | None
) -> None:
    options = {"on_save": True, **options}
    waiting = decided(event, options, {"saving": True, **training}, next_look=look)
    assert waiting is not None
    assert (waiting.later, waiting.optional) == (True, False)
    for pending, optional in ((None, True), (waiting, False)):
        saved = decided(Event.SAVE, options, training, pending)
        assert saved is not None
        assert saved.optional is optional


@pytest.mark.parametrize("pending", [PENDING, Due("health", "the training log: loss is NaN", later=True)])
def test_a_look_that_is_due_is_not_left_out_with_a_save(pending: Due) -> None:
    saved = decided(Event.SAVE, {"on_save": True}, {}, pending)
    assert saved == Due("full", "a checkpoint was saved", budgeted=True)


def test_what_may_be_left_out_both_times_may_be_left_out() -> None:
    asked = Due("full", "a checkpoint was saved", budgeted=True, optional=True)
    assert asked.with_pending(asked) == asked


@pytest.mark.parametrize(("step", "expected"), [(1, None), (2, None), (3, True), (4, None), (6, True), (10, None)])
def test_every_third_step(step: int, expected: bool | None) -> None:
    due = decided(Event.STEP_END, {"every_n_steps": 3}, {"step": step})
    assert now(due) is expected
    assert due is None or (due.kind, due.budgeted) == ("full", False)


@pytest.mark.parametrize(
    ("event", "training", "expected"),
    [
        (Event.STEP_END, {"step": 9}, None),
        # What is logged and evaluated of it is still to come.
        (Event.STEP_END, {"step": 10}, False),
        (Event.STEP_END, {"step": 9, "stopping": True}, False),
        (Event.EPOCH_END, {"step": 10}, None),
        (Event.EPOCH_END, {"step": 9, "stopping": True}, True),
        (Event.EPOCH_END, {"step": 10, "stopping": True, "evaluating": True}, False),
        (Event.TRAIN_END, {"step": 9}, True),
        (Event.TRAIN_END, {"step": 10, "best_loaded": True}, None),
        (Event.STEP_END, {"step": 10, "best_loaded": True}, False),
        (Event.EPOCH_END, {"step": 10, "stopping": True, "best_loaded": True}, True),
        (Event.SAVE, {"step": 10, "stopping": True}, None),
        (Event.EVALUATE, {"step": 10, "stopping": True}, None),
        # Early stopping: of an evaluation after the epoch's end, say, nothing else follows where the best checkpoint is loaded.
        (Event.EVALUATE, {"step": 9, "stopping": True}, True),
    ],
)
def test_the_last_step_is_whichever_event_can_tell(
    event: Event, training: dict[str, Any], expected: bool | None
) -> None:
    assert now(decided(event, {"on_last_step": True}, training)) is expected


@pytest.mark.parametrize(("options", "expected"), [({}, True), ({"on_last_step": True}, False)])
def test_only_an_audit_of_the_last_step_waits_for_the_end_of_its_epoch(options: dict[str, Any], expected: bool) -> None:
    """Where that asks for one, so that nothing is lost with a trainer that says nothing of epochs."""
    options = {"every_n_steps": 2, **options}
    waiting = decided(Event.STEP_END, options, {"step": 10})
    assert now(waiting) is expected
    assert now(decided(Event.STEP_END, options, {"step": 8})) is True
    if not expected:
        made = decided(Event.EPOCH_END, options, {"step": 10, "stopping": True}, waiting)
        assert made == Due("full", "every 2 steps")


@pytest.mark.parametrize(
    ("event", "options", "training", "expected"),
    [
        (Event.STEP_END, {"every_n_steps": 2}, {}, False),
        (Event.STEP_END, {"on_last_step": True}, {"step": 10}, False),
        (Event.STEP_END, {"every_n_steps": 3}, {}, None),
        # By now the reference was synchronized.
        (Event.SAVE, {"on_save": True}, {}, True),
        (Event.EVALUATE, {"on_evaluate": True}, {}, True),
        (Event.TRAIN_END, {"on_last_step": True}, {"step": 10}, True),
    ],
)
def test_an_audit_waits_while_the_reference_is_about_to_be_synchronized(
    event: Event, options: dict[str, Any], training: dict[str, Any], expected: bool | None
) -> None:
    assert now(decided(event, options, {"syncs_reference": True, **training})) is expected


@pytest.mark.parametrize(
    ("event", "to_come", "options", "waits"),
    [
        (Event.STEP_END, "saving", {"on_save": True}, True),
        (Event.STEP_END, "evaluating", {"on_evaluate": True}, True),
        (Event.STEP_END, "evaluating", {"on_save": True}, False),
        (Event.EPOCH_END, "saving", {"on_save": True}, True),
        (Event.EPOCH_END, "evaluating", {"on_evaluate": True}, True),
        (Event.EVALUATE, "saving", {"on_save": True}, True),
        (Event.EVALUATE, "saving", {"on_save": True, "on_evaluate": True}, True),
        (Event.EVALUATE, "saving", {}, False),
        (Event.EVALUATE, "evaluating", {"on_evaluate": True}, False),
        (Event.SAVE, "saving", {"on_save": True}, False),
        # Whoever was to save or evaluate did not: what waited is made before the next step.
        (Event.STEP_BEGIN, "saving", {"on_save": True}, False),
    ],
)
def test_a_look_waits_for_an_event_of_its_step_that_may_ask_for_more(
    event: Event, to_come: str, options: dict[str, Any], waits: bool
) -> None:
    due = decided(event, options, {to_come: True}, PENDING, next_look=4)
    assert now(due) is not waits
    # What is then made is one audit of these weights, and the larger one.
    saved = decided(Event.SAVE, {"on_save": True}, {}, due)
    assert saved is not None
    assert (saved.kind, saved.later) == ("full", False)


def test_a_look_of_a_step_that_is_evaluated_and_saved_is_made_at_the_save() -> None:
    options, due, made = {"on_save": True, "on_evaluate": True}, None, []
    for event, to_come in ((Event.STEP_END, {"evaluating": True}), (Event.EVALUATE, {}), (Event.SAVE, {})):
        due = decided(event, options, {"saving": event is not Event.SAVE, **to_come}, due, next_look=4)
        assert due is not None
        made += [] if due.later else [(event, due.kind, due.reason)]
    assert made == [(Event.SAVE, "full", "the trainer evaluated")]


def test_a_run_that_goes_on_is_not_before_training() -> None:
    due = decided(Event.TRAIN_BEGIN, {"before_training": True}, {"step": 500})
    assert due == Due("full", "before training goes on from step 500", budgeted=True)


@pytest.mark.parametrize("asks", [False, True])
def test_the_start_forgets_what_an_earlier_training_left(asks: bool) -> None:
    due = decided(Event.TRAIN_BEGIN, {"before_training": asks}, {"step": 0}, PENDING)
    assert due == (Due("full", "before training", budgeted=True) if asks else None)


# -- looks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [(3, None), (4, "health"), (6, "health")])
def test_a_look_comes_at_its_step_or_after_it(step: int, expected: str | None) -> None:
    """After it: where an audit broke, or the trainer made no event at that step."""
    due = decided(Event.STEP_END, {}, {"step": step}, next_look=4)
    assert (due and due.kind) == expected


def test_a_look_at_a_saved_step_waits_for_the_save() -> None:
    options, at = {"on_save": True}, {"step": 4, "saving": True}
    look = decided(Event.STEP_END, options, at, next_look=4)
    assert look is not None
    assert (look.kind, look.later) == ("health", True)
    saved = decided(Event.SAVE, options, at, look)
    assert saved is not None
    assert (saved.kind, saved.later) == ("full", False)
    # Somebody called the save off: the look is made at the next event.
    assert now(decided(Event.STEP_BEGIN, options, at, look)) is True
    # Nobody audits saves: the look is made at once.
    assert now(decided(Event.STEP_END, {}, at, next_look=4)) is True


def looks(
    steps: int, seconds_per_step: float, health: float, full: float | None, **options: Any
) -> tuple[list[int], float]:
    """Steps of the looks of a run that is otherwise left alone, and the share of the time that they took."""
    schedule, budget = ScheduleConfig(**{"on_save": False, **options}), 0.05
    audits = health
    spent = Spent(0, 0.0, audits, looks=audits, health=health, full=full)
    step, made = 0, [0]
    while (at := look_after(spent, Training(step, steps), schedule, budget)) is not None:
        assert at > step
        step = at
        made.append(step)
        audits += health
        spent = Spent(step, step * seconds_per_step, audits, looks=audits, health=health, full=full)
    return made, audits / (audits + steps * seconds_per_step)


def test_looks_double_where_they_cost_more_than_the_budget() -> None:
    made, share = looks(1000, 0.01, health=2.0, full=None)
    assert made == [0, 5, 10, 20, 40, 80, 160, 320, 640]
    assert share > 0.5, "the least that is made whatever it costs"


def test_looks_take_what_the_budget_leaves_beside_the_last_audit() -> None:
    made, share = looks(1000, 1.0, health=1.0, full=20.0)
    assert set(made) > {5, 10, 20, 40, 80}
    assert 0.02 < share < 0.05
    # The doublings have spent some of it in advance; from there on looks come evenly.
    assert max(later - earlier for earlier, later in itertools.pairwise(made)) < 90
    assert len([at for at in made if at > 250]) > 20
    without, more = looks(1000, 1.0, health=1.0, full=20.0, on_last_step=False)
    assert len(without) > len(made)
    assert share < more <= 0.05


def test_looks_leave_half_of_the_budget_to_checkpoints_that_can_be_audited_in_full() -> None:
    _, alone = looks(1000, 1.0, health=1.0, full=20.0, on_last_step=False)
    _, beside = looks(1000, 1.0, health=1.0, full=20.0, on_last_step=False, on_save=True)
    _, no_room = looks(1000, 1.0, health=1.0, full=60.0, on_last_step=False, on_save=True)
    assert alone == pytest.approx(0.05, abs=0.002)
    assert beside == pytest.approx(0.025, abs=0.002)
    assert no_room == alone, "what never fits is not waited for"


def test_cheap_looks_are_not_made_without_end() -> None:
    made, share = looks(10_000, 1.0, health=0.001, full=1.0)
    assert len(made) <= 210
    assert share < 0.001
    assert max(later - earlier for earlier, later in itertools.pairwise(made)) <= 50


@pytest.mark.parametrize("steps", [170, 300, 333, 500, 1000, 4000])
@pytest.mark.parametrize("health", [0.01, 0.2, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("full", [None, 5.0, 30.0, 500.0])
def test_the_audit_of_the_last_step_stands_in_the_place_of_a_look_shortly_before_it(
    steps: int, health: float, full: float | None
) -> None:
    """And has its room in the budget, whether it is a full one or a look."""
    made, _ = looks(steps, 1.0, health=health, full=full)
    doublings = {5 * 2**power for power in range(12)}
    between = steps - made[-1], made[-1] - made[-2]
    assert made[-1] in doublings or between[0] >= between[1] / 2
    least = sorted({0, *(at for at in doublings if at < steps)})
    cost = health * (len(made) + 1)
    if len(made) > len(least):  # some were made of what the budget left, which is kept then
        assert cost / (cost + steps) <= 0.05


def test_no_looks_where_they_are_switched_off_and_none_past_the_end() -> None:
    assert look_after(Spent(), Training(0, 100), ScheduleConfig(health=False), 0.05) is None
    assert look_after(Spent(), Training(0, 5), ScheduleConfig(), 0.05) is None, "the last step is audited anyway"
    assert look_after(Spent(), Training(0, 5), ScheduleConfig(on_last_step=False), 0.05) == 5
    assert look_after(Spent(), Training(0, 4), ScheduleConfig(), 0.05) is None


def test_a_resumed_run_spends_by_its_own_clock() -> None:
    """Its first steps say how long a step takes; what was audited before is not its own."""
    spent = Spent(20, training=20.0, audits=0.4, health=0.2)
    at = look_after(spent, Training(520, 1000), ScheduleConfig(on_last_step=False), 0.05)
    assert at == 525


def test_without_a_budget_looks_come_as_often_as_they_may() -> None:
    spent = Spent(10, training=1.0, audits=50.0, health=5.0)
    assert look_after(spent, Training(10, 1000), ScheduleConfig(), None) == 15


# -- full audits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "step", "expected"),
    [
        # Nothing is known before the first step, nor before the first audit.
        (Spent(), 0, False),
        (Spent(100, training=100.0), 100, False),
        # 5 % beside 1,000 s are 52.6 s.
        (Spent(500, training=500.0, audits=1.0, health=0.5, full=20.0), 500, True),
        (Spent(500, training=500.0, audits=10.0, health=0.5, full=20.0), 500, False),
        # Now it would fit, but then none would at the end, where one fits without it.
        (Spent(600, training=600.0, audits=1.0, health=0.5, full=27.0), 600, False),
        (Spent(1000, training=1000.0, audits=1.0, health=0.5, full=27.0), 1000, True),
        # Of a first one only a guess is known, by what a health audit took: 0.5 s (4 + 3·12) = 20 s.
        (Spent(500, training=500.0, audits=1.0, health=0.5, layers=12), 500, True),
        (Spent(500, training=500.0, audits=1.0, health=0.8, layers=12), 500, False),
        # Unless its work is counted: 0.8 s · 25 = 20 s, 0.8 s · 40 = 32 s.
        (Spent(500, training=500.0, audits=1.0, health=0.8, layers=12, per_look=25.0), 500, True),
        (Spent(500, training=500.0, audits=1.0, health=0.8, layers=1, per_look=40.0), 500, False),
    ],
)
def test_a_full_audit_is_made_where_the_budget_has_room_now_and_at_the_end(
    spent: Spent, step: int, expected: bool
) -> None:
    assert affords_full(spent, Training(step, 1000), BUDGETED, 0.05) is expected
    assert affords_full(spent, Training(step, 1000), BUDGETED, None), "without a budget there is always room"


def test_a_run_that_is_stopped_has_no_later_end_to_save_for() -> None:
    spent = Spent(600, training=600.0, audits=1.0, health=0.5, full=27.0)
    assert not affords_full(spent, Training(600, 1000), BUDGETED, 0.05)
    assert affords_full(spent, Training(600, 1000, stopping=True), BUDGETED, 0.05)


@pytest.mark.parametrize(
    ("full", "changes", "expected"),
    [
        (59.0, {}, True),
        (61.0, {}, False),
        (61.0, {"last_step_seconds": 61.0}, True),
        (0.1, {"last_step_seconds": 0.0}, False),
        (59.0, {"on_last_step": False}, False),
    ],
)
def test_the_last_step_is_audited_in_full_where_that_takes_no_longer_than_a_minute(
    full: float, changes: dict[str, Any], expected: bool
) -> None:
    schedule = ScheduleConfig(**changes)
    spent = Spent(4, training=0.1, audits=0.2, health=0.1, full=full)
    assert affords_full(spent, Training(4, 4), schedule, 0.05) is expected
    assert not affords_full(replace(spent, steps=3), Training(3, 4), schedule, 0.05), "a step before the last"
    guessed = Spent(4, training=0.1, audits=0.2, health=full / 13, layers=3)
    assert affords_full(guessed, Training(4, 4), schedule, 0.05) is expected, "as many times a look as it is taken for"


# -- what may be left out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        # 5 % beside 100 s are 5.3 s, and 52.6 s beside all 1,000; looks may take half where full audits fit, the rest else.
        (Spent(100, training=100.0, audits=1.0, looks=1.0, health=1.0, full=100.0), True),
        (Spent(100, training=100.0, audits=4.2, looks=4.2, health=1.0, full=100.0), True),
        (Spent(100, training=100.0, audits=4.3, looks=4.3, health=1.0, full=100.0), False),
        (Spent(100, training=100.0, audits=2.6, looks=2.6, health=1.0, full=10.0), True),
        (Spent(100, training=100.0, audits=2.7, looks=2.7, health=1.0, full=10.0), False),
        # A full audit that was made whatever it cost is paid for first.
        (Spent(100, training=100.0, audits=20.0, looks=1.0, health=1.0, full=19.0), False),
        # One that will not fit any more is not waited for.
        (Spent(500, training=500.0, audits=25.0, looks=25.0, health=1.0, full=30.0), True),
        # The last step's is left its time: 52.6 s less 26 s.
        (Spent(900, training=900.0, audits=25.0, looks=25.0, health=1.0, full=26.0), False),
        (Spent(900, training=900.0, audits=23.0, looks=23.0, health=1.0, full=26.0), True),
        # None was timed: only what was spent counts, also by audits that broke.
        (Spent(), False),
        (Spent(1, training=1.0), True),
        (Spent(100, training=100.0, audits=6.0), False),
    ],
)
def test_a_look_is_made_at_a_checkpoint_where_looks_have_kept_to_their_part(spent: Spent, expected: bool) -> None:
    at = Training(spent.steps, 1000)
    assert affords_look(spent, at, BUDGETED, 0.05) is expected
    due = Due("full", "a checkpoint was saved", budgeted=True, optional=True)
    tight = replace(spent, full=1000.0) if spent.full is not None else spent
    made = afforded(due, tight, at, BUDGETED, 0.05)
    assert made in (None, "health")
    assert afforded(replace(due, optional=False), tight, at, BUDGETED, 0.05) == "health"


@pytest.mark.parametrize("training", [Training(1000, 1000), Training(100, 1000, stopping=True)])
def test_on_the_last_step_and_without_a_budget_nothing_is_left_out(training: Training) -> None:
    spent = Spent(100, training=100.0, audits=80.0, looks=80.0, health=20.0, full=300.0)
    due = Due("full", "a checkpoint was saved", budgeted=True, optional=True)
    assert afforded(due, spent, Training(100, 1000), BUDGETED, 0.05) is None
    assert afforded(due, spent, training, BUDGETED, 0.05) == "health"
    assert afforded(due, spent, Training(100, 1000), BUDGETED, None) == "full"
    assert affords_look(spent, Training(100, 1000), BUDGETED, None)


@pytest.mark.parametrize(
    ("full", "audits", "budget", "expected"),
    [
        (60.0, 1000.0, 0.05, True),  # a minute
        (61.0, 0.0, 0.05, False),
        (61.0, 0.0, 0.1, True),  # 111 s of a run of a thousand
        (61.0, 60.0, 0.1, False),
        (1000.0, 0.0, None, True),
    ],
)
def test_a_warning_is_worth_a_full_audit_that_is_short_or_fits_the_budget_of_the_run(
    full: float, audits: float, budget: float | None, expected: bool
) -> None:
    spent = Spent(100, training=100.0, audits=audits, health=1.0, full=full)
    assert affords_escalation(spent, Training(100, 1000), ScheduleConfig(), budget) is expected


@pytest.mark.parametrize(("full", "expected"), [(60.0, True), (61.0, False)])
def test_a_warning_before_the_first_own_step_is_worth_a_short_full_audit_only(full: float, expected: bool) -> None:
    """Of a run that was resumed nobody knows yet what it has room for."""
    spent = Spent(health=1.0, full=full)
    assert affords_escalation(spent, Training(500, 1000), ScheduleConfig(), 0.05) is expected


def test_the_share_is_of_all_the_time() -> None:
    assert Spent().share is None
    assert Spent(10, training=95.0, audits=5.0).share == 0.05
