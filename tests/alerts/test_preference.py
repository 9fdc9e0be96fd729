"""Preference lost, turned round, or never learned: both sides of the limits, NaN, the first audit."""

from __future__ import annotations

import pytest

from align_audit.alerts.curves import TrainerLog
from align_audit.config import AlertConfig
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import (
    NAN,
    about,
    healthy,
    judged,
    log_of,
    on_set,
    run,
    sign,
    with_margins,
    with_part,
    without_interval,
)
from tests.helpers.make_record import make_record


@pytest.mark.parametrize(
    ("now", "level", "threshold"),
    [(0.85, None, None), (0.78, "warning", 0.8), (0.66, "warning", 0.8), (0.64, "error", 0.65)],
)
def test_accuracy_against_its_best(now: float, level: str | None, threshold: float | None) -> None:
    before = [with_margins(healthy(step), accuracy=about(value)) for step, value in ((10, 0.7), (20, 0.9), (30, 0.8))]
    seen = sign("accuracy_falling", with_margins(healthy(), accuracy=about(now)), before)
    assert (seen and seen.level) == level
    if level:
        assert (seen.value, seen.baseline) == (now, 0.9)
        assert seen.limit == pytest.approx(threshold)
        assert f"{now:.0%}, down from 90% at step 20" in seen.message
        assert "accuracy was best at step 20" in seen.suggestion


def test_accuracy_before_training_is_no_best() -> None:
    before = [with_margins(make_record(0, progress=0.0), accuracy=about(0.99))]
    assert sign("accuracy_falling", with_margins(healthy(), accuracy=about(0.5)), before) is None


def test_accuracy_needs_intervals_that_are_apart() -> None:
    before = [with_margins(healthy(10), accuracy=Estimate(mean=0.9, low=0.7, high=1.0))]
    assert sign("accuracy_falling", with_margins(healthy(), accuracy=about(0.71)), before) is None
    assert sign("accuracy_falling", with_margins(healthy(), accuracy=about(0.68)), before) is not None


def at_shift(step: int, mean: float, half: float = 0.5) -> AuditRecord:
    return with_margins(healthy(step), shift=about(mean, half))


@pytest.mark.parametrize(("mean", "level"), [(-0.6, "error"), (-0.4, None), (0.4, None)])
def test_a_shift_whose_interval_lies_below_0(mean: float, level: str | None) -> None:
    seen = sign("margin_reversed", at_shift(20, mean), [])
    assert (seen and seen.level) == level
    if seen:
        assert (seen.value, seen.limit) == (mean, 0.0)


def test_a_shift_below_half_its_best() -> None:
    before = [at_shift(10, 4.0), at_shift(20, 8.0), at_shift(30, 6.0)]
    seen = sign("margin_reversed", at_shift(40, 3.9), before)
    assert (seen.level, seen.baseline, seen.limit) == ("warning", 8.0, 4.0)
    assert "down from 8.00 at step 20" in seen.message
    assert sign("margin_reversed", at_shift(40, 4.1), before) is None
    assert sign("margin_reversed", at_shift(40, 3.9, 4.0), before) is None, "the intervals meet"
    assert sign("margin_reversed", at_shift(40, 0.6), [at_shift(10, 8.0, 9.0)]) is None, "a best that is none"
    moved = [with_part(record, "provenance", reference_hash="synchronized") for record in before]
    assert sign("margin_reversed", at_shift(40, 3.9), moved) is None, "shifts against another reference"


@pytest.mark.parametrize("shift", [without_interval(-5.0), Estimate(mean=NAN, low=NAN, high=NAN)])
def test_a_shift_without_an_interval_is_no_reversal(shift: Estimate) -> None:
    assert sign("margin_reversed", with_margins(healthy(), shift=shift), [at_shift(10, 8.0)]) is None


def still(step: int, kl: float = 0.0, shift: Estimate | None = None) -> AuditRecord:
    return with_margins(healthy(step), kl=about(kl, 0.0), shift=about(0.0, 0.1) if shift is None else shift)


def test_weights_that_have_not_moved() -> None:
    same = with_part(healthy(60), "reference_check", same_weights=True)
    assert sign("never_started", same, []).level == "error"
    assert sign("never_started", with_part(healthy(10), "reference_check", same_weights=True), []).level == "warning"
    assert sign("never_started", make_record(0, progress=0.0), []) is None, "before training they are equal"


def test_a_reference_that_was_just_synchronized_is_the_policy_and_no_sign_of_standing_still() -> None:
    """With a mixup of 1 it is so at every synchronization, as long as training moves the policy in between."""
    synchronized = with_part(healthy(60), "reference_check", same_weights=True, last_sync_step=60)
    assert sign("never_started", synchronized, [healthy(40)]) is None
    assert sign("never_started", synchronized, [still(20), still(40)]).level == "error", "it never was anything else"


@pytest.mark.parametrize(
    ("record", "fires"),
    [
        (still(60), True),
        (still(40), False),  # too early
        (still(60, kl=0.9e-4), True),
        (still(60, kl=1.1e-4), False),
        (still(60, shift=about(0.3, 0.1)), False),
        (still(60, shift=without_interval(0.0)), True),
        (still(60, kl=NAN), False),
        (still(60, shift=about(NAN)), False),
    ],
)
def test_a_policy_that_says_what_its_reference_says(record: AuditRecord, fires: bool) -> None:
    seen = sign("never_started", record, run())
    assert (seen is not None) == fires
    if seen:
        assert seen.level == "warning"
        assert "After 60 steps" in seen.message


def test_when_to_look_is_a_share_of_the_run_where_its_length_is_known() -> None:
    assert sign("never_started", still(16), [], max_steps=64) is not None
    assert sign("never_started", still(15), [], max_steps=64) is None
    assert sign("never_started", still(60), [], max_steps=1000) is None
    assert sign("never_started", still(60), [], AlertConfig(never_started_steps=61)) is None


def unlearned(
    step: int, shift: Estimate | None = None, accuracy: Estimate | None = None, kl: float = 0.01
) -> AuditRecord:
    return with_margins(
        healthy(step),
        kl=about(kl, 0.001),
        shift=about(0.1, 0.5) if shift is None else shift,
        accuracy=about(0.55, 0.1) if accuracy is None else accuracy,
    )


@pytest.mark.parametrize(
    ("record", "fires"),
    [
        (unlearned(100), True),
        (unlearned(99), False),  # too early
        (unlearned(100, shift=about(0.24, 0.5)), True),
        (unlearned(100, shift=about(0.26, 0.5)), False),  # learning is slow
        (unlearned(100, shift=about(-0.4, 0.5)), True),
        (unlearned(100, shift=about(-0.6, 0.5)), False),  # reversed: another rule's
        (unlearned(100, accuracy=about(0.64, 0.1)), True),
        (unlearned(100, accuracy=about(0.55, 0.21)), False),  # few pairs say nothing of what is not there
        (unlearned(100, shift=without_interval(0.0)), False),
        (unlearned(100, accuracy=without_interval(0.5)), False),
        (unlearned(100, shift=about(0.0, 0.0)), False),
        (unlearned(100, kl=0.9e-4), False),  # never started
        (unlearned(100, kl=NAN), False),
        (with_part(unlearned(100), "reference_check", same_weights=True), False),
        (with_part(unlearned(100), "reference_check", last_sync_step=60), False),  # of what was learned since
        (unlearned(100, kl=0.36), False),  # it leaves its language: drift
        (with_margins(unlearned(100), chosen_logp_change_per_token=about(-0.26)), False),
    ],
)
def test_a_policy_that_moves_and_learns_nothing_of_the_preference(record: AuditRecord, fires: bool) -> None:
    seen = sign("nothing_learned", record, [])
    assert (seen is not None) == fires
    if seen:
        assert (seen.level, seen.value, seen.limit) == ("warning", record.margins.accuracy.mean, 0.75)
        assert "After 100 steps the policy has moved" in seen.message


def test_half_of_the_run_is_when_something_should_be_seen() -> None:
    assert sign("nothing_learned", unlearned(32), [], max_steps=64) is not None
    assert sign("nothing_learned", unlearned(31), [], max_steps=64) is None
    assert sign("nothing_learned", unlearned(100), [], max_steps=1000) is None
    assert sign("nothing_learned", unlearned(60), [], AlertConfig(nothing_learned_steps=60)) is not None


def test_nothing_is_learned_where_every_probe_set_says_so_twice() -> None:
    """Preferences of something else need not move: a set of them alone says nothing."""

    def rules(*other: AuditRecord) -> list[list[str]]:
        both = [(unlearned(step), on_set(record, "other")) for step, record in zip((40, 50), other, strict=True)]
        done = judged([record for pair in both for record in pair], max_steps=64)
        return [[alert.rule for alert in record.alerts] for record in done]

    assert rules(unlearned(40), unlearned(50)) == [[], [], [], ["nothing_learned"]]
    assert rules(healthy(40), healthy(50)) == [[], [], [], []]
    assert rules(unlearned(40), healthy(50)) == [[], [], [], []]


@pytest.mark.parametrize(
    ("columns", "fires"),
    [({"loss": 0.7}, False), ({"loss": 0.7, "rewards__margins": 0.1}, True), ({"rewards__accuracies": 0.5}, True)],
)
def test_a_trainer_of_something_else_teaches_no_preference(columns: dict[str, float], fires: bool) -> None:
    log = TrainerLog(log_of(range(1, 101), **columns))
    assert (sign("nothing_learned", unlearned(100), [], log=log) is not None) == fires


def test_what_was_learned_and_lost_is_no_nothing() -> None:
    """Whose advice is another: there is a checkpoint to go back to."""
    better = [with_margins(healthy(step), shift=about(4.0, 0.5), accuracy=about(0.95, 0.04)) for step in (10, 20, 30)]
    done = judged([*better, unlearned(40), unlearned(50)], max_steps=64)
    assert {alert.cause for alert in done[-1].alerts} == {"preference"}
    assert sign("nothing_learned", unlearned(40), [unlearned(10, accuracy=about(0.8, 0.1))], max_steps=64) is None
    by_chance = [unlearned(10, shift=about(0.05, 0.04), accuracy=about(0.6, 0.1))]
    assert sign("nothing_learned", unlearned(40), by_chance, max_steps=64) is not None


def both_sets(*looks: tuple[AuditRecord, AuditRecord]) -> list[list[str]]:
    """What is open after each look of the two sets, one after the other."""
    records = [record for one, other in looks for record in (on_set(one, "one"), on_set(other, "other"))]
    # At one step the later audit has the last word.
    records = [
        with_part(record, "provenance", created=f"2026-01-01T00:00:{second:02d}+00:00")
        for second, record in enumerate(records)
    ]
    done = judged(records, max_steps=64)
    return [[alert.rule for alert in record.alerts if alert.event != "resolved"] for record in done]


def test_a_set_that_cannot_tell_is_not_asked() -> None:
    few = {step: unlearned(step, without_interval(3.0), without_interval(0.75)) for step in (40, 50)}
    assert both_sets((unlearned(40), few[40]), (unlearned(50), few[50])) == [
        [],
        [],
        ["nothing_learned"],
        ["nothing_learned"],
    ]


def test_a_set_that_is_not_audited_any_more_has_its_say_where_it_saw_a_shift() -> None:
    far = (40, 50, 60, 70, 80)
    for last, told in ((healthy(10), False), (unlearned(10), True)):
        records = [on_set(last, "other"), *(on_set(unlearned(step), "one") for step in far)]
        open_at_end = [alert.rule for alert in judged(records, max_steps=64)[-1].alerts]
        assert (open_at_end == ["nothing_learned"]) == told


def test_one_look_of_one_set_resolves_nothing() -> None:
    """What the other sets have not been asked again is not over; and a shift at the edge is one alert."""
    still, edge, well = unlearned, about(0.28, 0.5), healthy
    opened = [(still(step), still(step)) for step in (40, 50)]
    slow = still(60, shift=about(0.45, 0.5))
    wavers = [*opened, (still(60), slow), (still(70), still(70))]
    assert both_sets(*wavers)[3:] == [["nothing_learned"]] * 5
    over = [*opened, (well(60), well(60)), (well(70), well(70))]
    assert both_sets(*over)[3:] == [
        ["nothing_learned"],
        ["nothing_learned"],
        ["nothing_learned"],
        ["nothing_learned"],
        [],
    ]
    assert sign("nothing_learned", still(100, shift=edge), []) is None
    eased = frozenset({"nothing_learned_accuracy"})
    assert sign("nothing_learned", still(100, shift=edge), [], eased=eased) is not None


def test_never_started_and_nothing_learned_are_never_seen_at_once() -> None:
    """One says that it has not moved, the other one that it has: together they would be an error."""
    for kl in (0.5e-4, 0.9e-4, 1.1e-4, 1.3e-4):
        for eased in (frozenset(), frozenset({"never_started_kl"})):
            record = unlearned(100, kl=kl)
            record = with_margins(record, kl=about(kl, 0.0))
            seen = [rule for rule in ("never_started", "nothing_learned") if sign(rule, record, [], eased=eased)]
            assert len(seen) == 1
