"""A run's clocks: what they call training, what audits, and what they make of a budget. Time is a number here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest

from align_audit.config import AuditConfig
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Due, Event, Training
from align_audit.record.audit_record import IN_TRAINING, NO_TRAINER, UNCOUNTED_PAIRS, AuditKind
from align_audit.record.numbers import why_unknown
from align_audit.writers.scalars import not_known
from tests.helpers.make_record import make_record

FULL = Due("full", "a checkpoint was saved", budgeted=True)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def begun(config: AuditConfig | None = None, step: int = 0, pairs_per_step: int | None = 8) -> tuple[Pace, Clock]:
    clock = Clock()
    pace = Pace(config or AuditConfig(), step, pairs_per_step=pairs_per_step, clock=clock)
    clock.now += 50.0  # what was done before training is no part of it
    pace.begin(Training(step, 1000))
    return pace, clock


def audit(pace: Pace, clock: Clock, kind: AuditKind, step: int, *seconds: float, writing: float = 0.0) -> None:
    """Probe sets that take so long each, and what it takes to write them."""
    with pace.timed(kind):
        for each in seconds:
            clock.now += each
            record = make_record(step, layers=4)
            cost = record.cost.model_copy(update={"seconds": each})
            pace.occasion(record.model_copy(update={"kind": kind, "cost": cost}), "because", Training(step, 1000))
        clock.now += writing


def test_time_is_training_or_audits() -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 1.0, 2.0, writing=0.5)
    clock.now += 60.0
    audit(pace, clock, "full", 30, 10.0, writing=4.0)
    spent = pace.spent(Training(30, 1000))
    assert (spent.steps, spent.training, spent.audits) == (30, 60.0, 17.5)
    assert (spent.health, spent.full, spent.layers) == (3.5, 14.0, 4)
    assert spent.share == 17.5 / 77.5


def test_a_record_says_what_was_spent_up_to_it_and_when_the_next_look_is() -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 1.0)
    clock.now += 40.0
    with pace.timed("health"):
        clock.now += 1.0
        record = make_record(5, layers=4)
        record = record.model_copy(update={"kind": "health", "cost": record.cost.model_copy(update={"seconds": 1.0})})
        occasion = pace.occasion(record, "a look at step 5 was planned", Training(5, 1000))
    assert occasion.reason == "a look at step 5 was planned"
    assert occasion.share_spent == 2.0 / 42.0
    assert occasion.training_pair_seconds == 40.0 / (5 * 8)
    assert occasion.next_step == pace.next_look == 10


def test_before_the_first_step_nothing_is_known_of_shares() -> None:
    pace, clock = begun()
    with pace.timed("health"):
        clock.now += 1.0
        occasion = pace.occasion(make_record(0), "before training", Training(0, 1000))
    assert (occasion.share_spent, occasion.training_pair_seconds, occasion.next_step) == (None, None, 5)


def test_an_audit_costs_so_many_training_pairs_and_so_much_of_the_run() -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 1.0)
    clock.now += 40.0
    with pace.timed("full"):
        clock.now += 5.0
        record = make_record(5, layers=4)
        record = record.model_copy(
            update={
                "cost": record.cost.model_copy(update={"seconds": 5.0}),
                "reasons": dict.fromkeys(IN_TRAINING, NO_TRAINER) | {"spinal": "switched off"},
            }
        )
        training = Training(5, 1000)
        priced = pace.priced(record, pace.occasion(record, "a checkpoint was saved", training), training)
    assert priced.cost.training_pairs == 5.0 / (40.0 / (5 * 8)) == 5.0
    assert priced.cost.share_of_run == 5.0 / (1.0 + 40.0 + 5.0)
    assert priced.occasion is not None
    assert priced.occasion.training_pair_seconds is not None
    assert priced.reasons == {"spinal": "switched off"}


def test_before_the_first_step_an_audit_has_no_price_and_says_why() -> None:
    pace, clock = begun()
    with pace.timed("health"):
        clock.now += 1.0
        record = make_record(0).model_copy(update={"reasons": dict.fromkeys(IN_TRAINING, NO_TRAINER)})
        training = Training(0, 1000)
        priced = pace.priced(record, pace.occasion(record, "before training", training), training)
    assert (priced.cost.training_pairs, priced.cost.share_of_run) == (None, None)
    assert why_unknown(priced, "cost.training_pairs") == NO_TRAINER
    assert not any(path in IN_TRAINING for path, _ in not_known(priced))


def test_evaluations_and_checkpoints_are_no_steps() -> None:
    """Also where an audit is made between them, and at the end of an epoch, which comes before its evaluation."""
    pace, clock = begun()
    pace.hear(Event.TRAIN_BEGIN)
    for step in (1, 2):
        clock.now += 3.0  # its pairs are loaded
        pace.hear(Event.STEP_BEGIN)
        clock.now += 17.0
        pace.hear(Event.STEP_END)
        audit(pace, clock, "health", step, 4.0, writing=1.0)
        if step == 2:
            pace.hear(Event.EPOCH_END)
        clock.now += 100.0
        pace.hear(Event.EVALUATE)
        audit(pace, clock, "full", step, 6.0)
        clock.now += 50.0
        pace.hear(Event.SAVE)
    with pace.timed("full"):
        occasion = pace.occasion(make_record(2, layers=4), "a checkpoint was saved", Training(2, 1000))
    assert occasion.training_pair_seconds == 2 * 20.0 / (2 * 8)
    assert pace.spent(Training(2, 1000)).training == 2 * 170.0, "the budget is a share of the whole run"


def test_what_an_audit_needs_before_it_begins_is_no_training() -> None:
    """Models are opened, and a reference is loaded, in the time of the audit's moment."""
    pace, clock = begun()
    clock.now += 40.0
    with pace.timed("full"):
        clock.now += 30.0
        record = make_record(5, layers=4)
        record = record.model_copy(update={"cost": record.cost.model_copy(update={"seconds": 10.0})})
        clock.now += 10.0
        occasion = pace.occasion(record, "a checkpoint was saved", Training(5, 1000))
    assert occasion.training_pair_seconds == 40.0 / (5 * 8)
    assert occasion.share_spent == 10.0 / 50.0


def test_where_nobody_says_what_a_step_is_made_of_the_share_is_known_and_the_pairs_are_not() -> None:
    pace, clock = begun(pairs_per_step=None)
    clock.now += 45.0
    with pace.timed("full"):
        clock.now += 5.0
        record = make_record(5).model_copy(update={"reasons": dict.fromkeys(IN_TRAINING, NO_TRAINER)})
        record = record.model_copy(update={"cost": record.cost.model_copy(update={"seconds": 5.0})})
        training = Training(5, 1000)
        priced = pace.priced(record, pace.occasion(record, "a checkpoint was saved", training), training)
    assert (priced.cost.training_pairs, priced.cost.share_of_run) == (None, 0.1)
    assert priced.reasons == {"cost.training_pairs": UNCOUNTED_PAIRS}


def test_a_full_audit_that_does_not_fit_is_made_small_and_says_so() -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 1.0)
    clock.now += 100.0
    at = Training(100, 1000)
    chosen = pace.choose(FULL, at)
    assert chosen is not None
    # Of a full audit only a guess is known: 16 times the last look, in a model of four layers.
    assert chosen.kind == "health"
    assert chosen.reason == (
        "a checkpoint was saved; a full audit takes about 16 s and does not fit the budget of 5.0% of the run yet"
    )
    clock.now += 400.0
    assert pace.choose(FULL, Training(500, 1000)) == FULL
    always = Due("full", "every 100 steps")
    assert pace.choose(always, at) == always


SAVED = replace(FULL, optional=True)


def test_a_checkpoint_is_left_out_while_a_look_does_not_fit_and_looked_at_once_it_does() -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 4.0)
    clock.now += 100.0  # 5 % beside them are 5.3 s, and beside 160 s 8.4 s
    assert pace.choose(SAVED, Training(100, 1000)) is None
    kept = pace.choose(FULL, Training(100, 1000))
    assert kept is not None
    assert kept.kind == "health"
    clock.now += 60.0
    made = pace.choose(SAVED, Training(160, 1000))
    assert made is not None
    assert made.kind == "health"
    assert made.reason.startswith("a checkpoint was saved; a full audit takes about 64 s and does not fit the budget")
    audit(pace, clock, "health", 160, 4.0)
    assert pace.choose(SAVED, Training(161, 1000)) is None


def test_without_a_budget_no_checkpoint_is_left_out() -> None:
    pace, clock = begun(AuditConfig(budget=None))
    audit(pace, clock, "health", 0, 400.0)
    clock.now += 1.0
    assert pace.choose(SAVED, Training(1, 1000)) == SAVED


@pytest.mark.parametrize("due", [FULL, SAVED], ids=["planned", "saved"])
@pytest.mark.parametrize("last", [{"step": 1000}, {"step": 100, "stopping": True}])
def test_on_the_last_step_nothing_is_put_off(last: dict[str, Any], due: Due) -> None:
    pace, clock = begun()
    audit(pace, clock, "health", 0, 100.0)
    clock.now += 100.0
    chosen = pace.choose(due, Training(**{"max_steps": 1000, **last}))
    assert chosen is not None
    assert chosen.kind == "health"
    assert chosen.reason.endswith("does not fit the budget of 5.0% of the run")


def test_without_a_budget_every_full_audit_is_one() -> None:
    pace, _ = begun(AuditConfig(budget=None))
    assert pace.choose(FULL, Training(0, 1000)) == FULL


def test_an_audit_that_breaks_has_cost_time_all_the_same() -> None:
    pace, clock = begun()
    clock.now += 10.0

    @pace.timed("full")
    def breaks() -> None:
        clock.now += 7.0
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        breaks()
    spent = pace.spent(Training(10, 1000))
    assert (spent.audits, spent.training, spent.full) == (7.0, 10.0, None)


def test_a_look_in_the_place_of_a_full_audit_that_broke_says_nothing_of_what_a_full_one_takes() -> None:
    pace, clock = begun()
    clock.now += 10.0
    with pace.timed("full"):
        clock.now += 0.2  # it broke
        clock.now += 3.0
        record = make_record(10, layers=4)
        cost = record.cost.model_copy(update={"seconds": 3.0})
        look = record.model_copy(update={"kind": "health", "cost": cost})
        pace.occasion(look, "the full audit broke", Training(10, 1000))
    spent = pace.spent(Training(10, 1000))
    assert (spent.health, spent.full) == (3.0, None)
    assert (spent.audits, spent.looks, spent.training) == pytest.approx((3.2, 3.0, 10.0))
    assert pace.guesses


def test_a_look_that_may_be_left_out_is_made_where_it_fits() -> None:
    pace, clock = begun()
    again = Due("health", "the training log: again", optional=True)
    with pace.timed("health"):
        clock.now += 4.0
    clock.now += 10.0
    assert pace.choose(again, Training(10, 1000)) is None
    assert pace.choose(replace(again, optional=False), Training(10, 1000)) == replace(again, optional=False)
    clock.now += 490.0
    assert pace.choose(again, Training(500, 1000)) == again


def test_a_resumed_run_has_clocks_of_its_own() -> None:
    pace, clock = begun(step=500)
    clock.now += 10.0
    assert pace.spent(Training(510, 1000)).steps == 10


@pytest.mark.parametrize("start", ["looked at", "audited before", "not audited"])
@pytest.mark.parametrize("step", [500, 505, 700, 100_000])
def test_a_resumed_run_is_looked_at_as_often_as_the_budget_allows_from_its_first_steps_on(
    start: str, step: int
) -> None:
    """Neither its steps nor its looks were timed yet: that is not left to the next doubling, nor to a checkpoint."""
    training = Training(step, 1_000_000)
    clock = Clock()
    pace = Pace(AuditConfig(schedule={"on_save": False}), step, clock=clock)
    pace.begin(training)
    if start == "looked at":
        audit(pace, clock, "health", step, 2.0)
    elif start == "audited before":
        pace.see(step)
    pace.plan(training)
    made = []
    for _ in range(6):
        assert pace.next_look is not None
        clock.now += 1.0 * (pace.next_look - training.step)
        training = Training(pace.next_look, 1_000_000)
        made.append(training.step)
        audit(pace, clock, "health", training.step, 2.0)
        pace.plan(training)
    assert made[0] == step + 5
    assert max(later - earlier for earlier, later in pairwise(made)) <= 5000, "200 looks in a run at most"
    tight = Pace(AuditConfig(budget=1e-6), step, clock=clock)
    tight.begin(Training(step, 1_000_000))
    assert tight.next_look == step + 5, "whatever it costs"


def test_a_doubling_that_comes_sooner_is_the_first_look_of_a_resumed_run() -> None:
    pace, _ = begun(step=638)
    assert pace.next_look == 640
