"""Looks that are not alike: several at one step, some that know less than others, and evaluations far apart."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.detectors import suspect
from align_audit.alerts.history import FURTHEST
from align_audit.config import AlertConfig
from align_audit.options.rules import RULES, Rule
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.training_log import LogRow
from tests.helpers.alert_cases import (
    about,
    alerts,
    health,
    healthy,
    judged,
    log_of,
    log_sign,
    on_set,
    run,
    with_margins,
    with_part,
    with_texts,
)


def in_order(records: list[AuditRecord]) -> list[AuditRecord]:
    """The records as made one after the other."""
    return [
        with_part(record, "provenance", created=f"2026-01-01T{second // 60:02}:{second % 60:02}:00Z")
        for second, record in enumerate(records)
    ]


# -- several looks at one step ---------------------------------------------------------------------------------------------

AT_ONE_STEP: dict[str, Callable[[AuditRecord], list[AuditRecord]]] = {
    "one look": lambda record: [record],
    "two sets": lambda record: [on_set(record, "a"), on_set(record, "b")],
    "three sets": lambda record: [on_set(record, name) for name in "abc"],
    "a look, then a full audit": lambda record: [health(record), record],
}


@pytest.mark.parametrize("cooldown", [0, 1, 3])
@pytest.mark.parametrize("looks", AT_ONE_STEP)
def test_a_cause_cools_down_for_so_many_steps_however_many_looks_each_has(looks: str, cooldown: int) -> None:
    config = AlertConfig(cooldown=cooldown, rules={"jump": {"signal": "cost.seconds", "above": 1e9}, "sudden": "off"})
    for after in range(1, 6):
        kl = [0.5, 0.1, 0.1, *[0.1] * (after - 1), 0.5]
        at = [
            with_margins(healthy(10 * (place + 1)), kl=about(value), chosen_logp_change_per_token=about(-0.05))
            for place, value in enumerate(kl)
        ]
        made = judged(in_order([each for record in at for each in AT_ONE_STEP[looks](record)]), config)
        events = [(alert.step, alert.event) for record in made for alert in record.alerts if alert.event != "open"]
        assert events[:2] == [(10, "opened"), (30, "resolved")]
        assert (len(events) > 2) == (after > cooldown), (after, events)


# -- what was seen at another step is told as of then ----------------------------------------------------------------------


def told(records: list[AuditRecord]) -> Alert:
    (alert,) = [alert for alert in judged(in_order(records))[-1].alerts if alert.cause == "drift"]
    return alert


def without_texts(record: AuditRecord) -> AuditRecord:
    return health(record).model_copy(update={"generations": None})


def test_a_sign_of_another_step_is_told_with_its_step() -> None:
    before = with_texts(healthy(10), repetition=about(0.7))
    after = without_texts(with_margins(healthy(20), kl=about(0.5)))
    alert = told([before, after])
    assert (alert.rule, alert.step, alert.level) == ("repetition", 20, "error")
    assert alert.message.startswith("At step 10: Of the 4-grams")
    assert alert.message.endswith("It agrees with kl_out_of_bounds (0.5 at step 20).")


def test_one_that_leads_now_says_when_what_agrees_was_seen() -> None:
    before = with_texts(healthy(10), repetition=about(0.4))
    after = without_texts(with_margins(healthy(20), kl=about(2.0)))
    alert = told([before, after])
    assert alert.message.startswith("KL(policy ‖ reference) is 2.00")
    assert alert.message.endswith("It agrees with repetition (0.4 at step 10).")


def test_of_two_sets_the_one_that_was_looked_at_before_is_told_with_its_step() -> None:
    ruined = with_margins(healthy(10), kl=about(2.0))
    first = [on_set(healthy(10), "a"), on_set(ruined, "b")]
    alert = told([*first, on_set(with_margins(healthy(20), kl=about(0.5)), "a")])
    assert (alert.probe_name, alert.step) == ("b", 20)
    assert alert.message.startswith("At step 10: On the probes 'b': KL(policy ‖ reference) is 2.00")


def test_a_sign_without_a_number_is_told_without_one() -> None:
    wrong = with_part(healthy(40), "provenance", reference_hash="beef")
    wrong = with_part(wrong, "reference_check", verdict="failed", reason="it is another model")
    (alert,) = alerts(wrong)
    assert alert.message.endswith("It agrees with reference_changed.")


# -- what is not known clears nothing --------------------------------------------------------------------------------------

_JUDGED_BY_NUMBERS = [
    rule for rule in RULES if rule.source != "log" and rule.weight != "certain" and rule.reads != ("margins.shift",)
]


def forget(value: Any, path: list[str]) -> Any:
    """Plain values, with what lies at a path not known."""
    if not path:
        if isinstance(value, dict):
            return json.loads(Estimate.unknown("nobody knows").model_dump_json())
        return [forget(each, []) for each in value] if isinstance(value, list) else "NaN"
    names = list(value) if path[0] == "*" else [path[0]]
    return value | {name: forget(value[name], path[1:]) for name in names}


def without(record: AuditRecord, rule: Rule) -> AuditRecord:
    """The record in which nothing is known of the first number that a rule reads."""
    values = forget(json.loads(record.to_json()), rule.reads[0].split("."))
    return AuditRecord.from_json(json.dumps(values))


def went_on(rule: Rule, records: list[AuditRecord], config: AlertConfig) -> list[str]:
    """What happens to the open alert of a rule at these records."""
    opened = Alert(
        rule=rule.name, cause=rule.cause, level="warning", step=30, since=30, value=1.0, message="M.", suggestion="S"
    )  # fmt: skip
    done = in_order([*run(), healthy(40), *records])
    before = [*done[:4], done[4].model_copy(update={"alerts": [opened]})]
    events = []
    for record in done[5:]:
        found = alerts(record, before, config)
        events += [alert.event for alert in found if alert.cause == rule.cause] or ["none"]
        before.append(record.model_copy(update={"alerts": found}))
    return events


@pytest.mark.parametrize("rule", _JUDGED_BY_NUMBERS, ids=lambda rule: rule.name)
def test_a_number_that_is_not_known_does_not_clear_what_it_raised(rule: Rule) -> None:
    config = AlertConfig()
    unknown = [without(healthy(at), rule) for at in (50, 60, 70)]
    assert went_on(rule, [*unknown, healthy(80), healthy(90)], config) == [*["open"] * 4, "resolved"]
    assert went_on(rule, [healthy(50), healthy(60)], config) == ["open", "resolved"]


def test_what_no_look_of_late_knows_holds_nothing() -> None:
    rule = next(rule for rule in RULES if rule.name == "additivity_high")
    never = [without(healthy(50 + 10 * place), rule) for place in range(FURTHEST + 2)]
    events = went_on(rule, never, AlertConfig())
    assert events.count("resolved") == 1
    assert events.index("resolved") >= FURTHEST - 1


@pytest.mark.parametrize("rule", _JUDGED_BY_NUMBERS, ids=lambda rule: rule.name)
def test_a_rule_that_was_switched_off_holds_nothing(rule: Rule) -> None:
    config = AlertConfig(rules={rule.name: "off"})
    lean = [without_texts(healthy(at)) for at in (50, 60)]
    assert went_on(rule, lean, config) == ["open", "resolved"]


@pytest.mark.parametrize("broken", [ValueError("no"), 7, "", ["no"]], ids=repr)
def test_a_function_that_breaks_or_says_nonsense_does_not_clear_what_it_said(broken: Any) -> None:
    def check(history: Any) -> Any:
        if history.step in (20, 30, 40) and isinstance(broken, Exception):
            raise broken
        return broken if history.step in (20, 30, 40) else "Bad." if history.step == 10 else None

    made = judged(in_order([healthy(at) for at in range(10, 80, 10)]), AlertConfig(rules={"mine": check}))
    events = [alert.event for record in made for alert in record.alerts if alert.rule == "mine"]
    assert events == ["opened", "open", "open", "open", "open", "resolved"]


# -- evaluations far apart -------------------------------------------------------------------------------------------------

_EVALUATED = {
    "eval_entropy": ("log_entropy", 2.0, 0.5),
    "eval_logps/chosen": ("log_chosen_falling", -100.0, -150.0),
    "eval_mean_token_accuracy": ("log_token_accuracy", 0.6, 0.2),
}


@pytest.mark.parametrize("every", [7, 400, 900, 1500])
@pytest.mark.parametrize("column", _EVALUATED)
def test_an_evaluation_counts_until_the_next_one_however_many_rows_come_between(column: str, every: int) -> None:
    rule, usual, bad = _EVALUATED[column]
    since = -(-2500 // every) * every
    rows: list[LogRow] = []
    for step in range(1, since + 2 * every):
        rows.append(LogRow(step, {"loss": 0.5}))
        if step % every == 0:
            rows.append(LogRow(step, {column: usual if step < since else bad}))
        if step % 50 == 0 or step % every == 0:
            log = TrainerLog(rows)
            assert log.latest(column) == (None if step < every else usual if step < since else bad)
            assert (log_sign(rule, rows) is not None) == (step >= since), step


def test_a_start_that_is_no_number_is_no_start() -> None:
    for (column, (rule, _, bad)), start in itertools.product(_EVALUATED.items(), (float("inf"), float("-inf"))):
        assert log_sign(rule, [LogRow(1, {column: start}), LogRow(2, {column: bad})]) is None


def test_of_a_long_log_no_more_is_looked_at() -> None:
    read = 0

    class Row(LogRow):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            nonlocal read
            read += name == "logs"
            return super().__getattribute__(name)

    rows: Any = [Row(step, {"loss": 0.5, "grad_norm": 1.0}) for step in range(300_000)]
    assert suspect(rows, AlertConfig()) == []
    assert read < 100_000


# -- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", [0.3, 0.49, 0.5, 0.55, 0.65])
def test_less_than_chance_is_said_of_less_than_chance(accuracy: float) -> None:
    """The limit may be set, or eased while the alert is open, above one half."""
    log = log_of(range(1, 100), rewards__accuracies=accuracy, rewards__margins=-0.1)
    seen = log_sign("log_accuracy", log, AlertConfig(log_accuracy_low=0.7))
    assert seen is not None
    assert ("less than chance" in seen.message) == (accuracy < 0.5)
    assert re.search(rf"{accuracy:.0%}", seen.message)


@pytest.mark.parametrize("needed", [2, 3])
def test_how_often_it_was_so_is_told_as_far_as_it_was_looked_back(needed: int) -> None:
    """It may have been so for longer, and the message denies that at no look."""
    records = [with_margins(healthy(10 * (place + 4)), kl=about(0.8)) for place in range(6)]
    made = judged(in_order([*run(), *records]), AlertConfig(error_looks=needed, rules={"sudden": "off"}))[4:]
    for looks, record in enumerate(made, start=1):
        (alert,) = record.alerts
        assert alert.looks == looks
        said = f"It was so at the last {needed} looks."
        assert (said in alert.message) == (alert.level == "error") == (looks >= needed)
