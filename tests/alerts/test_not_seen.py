"""What becomes of an alert that a look does not see: it is held where that measured nothing of it, and told in the past."""

from __future__ import annotations

from typing import Any

import pytest

from align_audit.alerts.detectors import judge
from align_audit.alerts.lifecycle import step
from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.open_alerts import open_alerts
from align_audit.record.stored_records import heads_of
from tests.helpers.alert_cases import (
    CONFIG,
    about,
    alerts,
    health,
    healthy,
    judged,
    on_set,
    run,
    with_margins,
    with_part,
    with_texts,
)

MADE = iter(range(10**6))


def later(record: AuditRecord) -> AuditRecord:
    """The record as one that was made after all others."""
    second = next(MADE)
    return with_part(
        record, "provenance", created=f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"
    )


def of(name: str, at: int, kl: float = 0.1) -> AuditRecord:
    return later(on_set(with_margins(healthy(at), kl=about(kl)), name))


def drift(records: list[AuditRecord], **known: Any) -> list[tuple[int, str, int]]:
    """Step of its last look, event and looks of the alert at each record that has one."""
    return [(a.step, a.event, a.looks) for r in judged(records, **known) for a in r.alerts if a.cause == "drift"]


# -- held ------------------------------------------------------------------------------------------------------------------


def test_another_set_is_no_look_at_what_a_set_was_seen_on() -> None:
    """Set b has it; at step 30 set a is audited first, and must not be the second look that does not see it."""
    records = [of("a", 10), of("b", 10, 0.5), of("a", 20), of("b", 20), of("a", 30), of("b", 30)]
    assert drift(records) == [
        (10, "opened", 1),
        (20, "open", 1),  # b was seen last at step 10, and that still holds
        (20, "open", 0),
        (20, "open", 0),  # held: its step has not moved
        (30, "resolved", 0),
    ]


def test_a_set_that_has_no_say_any_more_holds_nothing() -> None:
    records = [of("a", 10), of("b", 10, 0.5), *(of("a", at) for at in (20, 30, 40, 50, 60))]
    assert drift(records)[-1][1] == "resolved"


@pytest.mark.parametrize("rule", [rule for rule in BY_NAME.values() if rule.source in ("patching", "generations")])
def test_a_part_that_was_not_measured_again_is_not_seen_to_be_gone(rule: Any) -> None:
    """Two looks at it have to miss it, whatever lies between them."""
    opened = Alert(
        rule=rule.name, cause=rule.cause, level="warning", step=30, since=30, value=1.0, message="M.", suggestion="S"
    )  # fmt: skip
    before = [*map(later, run()), later(healthy(40)).model_copy(update={"alerts": [opened]})]
    lean = [health(healthy(at)).model_copy(update={"generations": None}) for at in (60, 70, 80)]
    records = [later(healthy(50)), *map(later, lean), later(healthy(90))]
    lives = []
    for record in records:
        found = alerts(record, before)
        lives += [(alert.step, alert.event) for alert in found]
        before.append(record.model_copy(update={"alerts": found}))
    assert lives == [(50, "open"), *[(50, "open")] * 3, (90, "resolved")]


# -- told ------------------------------------------------------------------------------------------------------------------


def opened_at(at: int, **changes: Any) -> Alert:
    values: dict[str, Any] = {
        "rule": "kl_out_of_bounds",
        "cause": "drift",
        "level": "warning",
        "value": 0.5,
        "suggestion": "",
    }
    return Alert(**(values | {"step": at, "since": at, "message": "KL is 0.5, above 0.35."} | changes))


NOT_NOW = {
    "unseen": lambda alert: step([alert], [], 20),
    "resolved": lambda alert: step(step([alert], [], 20), [], 30),
    "silent": lambda alert: step([alert], [], 20, held={"drift"}),
    "unmeasured": lambda alert: step([alert], [], 20, unmeasured={"drift"}),
    "seen where it was measured last": lambda alert: step([alert], [alert], 20),
    "silent, then unseen, then over": lambda alert: step(step(step([alert], [], 20, {"drift"}), [], 30), [], 40),
}


@pytest.mark.parametrize("case", NOT_NOW)
def test_what_is_not_seen_is_told_as_of_when_it_was(case: str) -> None:
    (alert,) = NOT_NOW[case](opened_at(10))
    assert not alert.message.startswith("KL is 0.5")
    assert alert.message.endswith(" At step 10 it said: KL is 0.5, above 0.35.")
    assert alert.message.count("it said") == 1
    assert ("It is over" in alert.message) == (alert.event == "resolved")
    assert (alert.observation, alert.observed_at) == ("KL is 0.5, above 0.35.", 10)
    (again,) = step([alert.model_copy(update={"event": "open"})], [opened_at(50, message="KL is 0.6.")], 50)
    assert (again.message, again.observation, again.observed_at) == ("KL is 0.6.", "", None)


def test_of_earlier_versions_it_is_not_known_when() -> None:
    (alert,) = step([opened_at(10, looks=0)], [], 20)
    assert alert.message.endswith("Earlier it said: KL is 0.5, above 0.35.")


def test_a_run_tells_what_is_over() -> None:
    last = judged([*run(), with_margins(healthy(40), kl=about(0.5)), healthy(50), healthy(60)])[-1]
    (alert,) = last.alerts
    assert alert.message.startswith(
        "It is over: at step 60 a second look in a row did not see it. At step 40 it said: KL("
    )
    stored = AuditRecord.from_json(last.to_json())
    assert stored.alerts[0] == alert
    assert open_alerts(heads_of([stored])) == []


# -- silence ---------------------------------------------------------------------------------------------------------------

RUINED = with_margins(healthy(), kl=about(5.0), token_accuracy=about(0.05))
SILENCING = {
    "reference_changed": with_part(RUINED, "provenance", reference_hash="beef"),
    "reference_mismatch": with_part(RUINED, "reference_check", verdict="failed", reason="it is another model"),
    "non_finite": with_margins(RUINED, policy=Estimate.unknown("2 of 64 values are not finite")),
}


@pytest.mark.parametrize("rule", SILENCING)
def test_an_error_of_the_measurement_silences_what_is_measured_with_it(rule: str) -> None:
    assert [alert.rule for alert in alerts(SILENCING[rule])] == [rule]


@pytest.mark.parametrize("rule", SILENCING)
def test_a_warning_silences_nothing(rule: str) -> None:
    config = AlertConfig(rules={rule: {"level": "warning"}})
    raised = {alert.cause: alert.level for alert in alerts(SILENCING[rule], config=config)}
    assert raised.pop(BY_NAME[rule].cause) == "warning"
    assert raised == {"drift": "error"}


def test_an_error_that_is_not_patient_yet_silences_nothing() -> None:
    config = AlertConfig(rules={"reference_changed": {"patience": 2}})
    assert [alert.cause for alert in alerts(SILENCING["reference_changed"], config=config)] == ["drift"]


def test_numbers_that_the_log_shows_are_seen_while_the_reference_is_silent() -> None:
    """Silence is of what is measured against the reference: an alert of a NaN loss is not resolved by it."""
    from tests.helpers.alert_cases import log_of

    log = log_of(range(1, 200), loss=float("nan"))
    moved = SILENCING["reference_changed"]
    records = judged(
        [
            *run(),
            *(
                with_part(moved, "provenance", created=f"{at}").model_copy(update={"step": at})
                for at in (100, 110, 120)
            ),
        ],
        log=log,
    )
    for record in records[-3:]:
        assert {alert.cause for alert in record.alerts if alert.event != "resolved"} == {"numbers", "reference"}


# -- not known ---------------------------------------------------------------------------------------------------------


def test_what_agrees_and_is_not_known_any_more_is_not_over() -> None:
    """KL leads and calms down; the repetition beside it was far beyond its limit when it was last known."""

    def at(step: int, kl: float, repetition: float | None) -> AuditRecord:
        texts = Estimate.unknown("memory") if repetition is None else about(repetition)
        return later(with_texts(with_margins(healthy(step), kl=about(kl)), repetition=texts))

    held = [(40, 0.5, 0.6), (50, 0.05, None), (60, 0.05, None), (70, 0.05, None)]
    assert [event for _, event, _ in drift([*run(), *(at(*each) for each in held)])] == [
        "opened",
        "open",
        "open",
        "open",
    ]
    over = [(40, 0.5, 0.6), (50, 0.05, 0.0), (60, 0.05, 0.0)]
    assert [event for _, event, _ in drift([*run(), *(at(*each) for each in over)])][-1] == "resolved"


def test_a_set_whose_audits_break_is_not_over_its_alert() -> None:
    records = [
        *(of(name, at, kl) for at in (10, 20) for name, kl in (("a", 0.1), ("b", 0.5))),
        *map(alone, (30, 40, 50, 60)),
    ]
    assert drift(records)[-1][1] == "resolved", "it was left out"
    done: list[AuditRecord] = []
    for record in records:
        broken = {"b": record.step} if record.step > 20 else {}
        done.append(record.model_copy(update={"alerts": judge(record, done, (), CONFIG, broken=broken)}))
    assert [alert.event for alert in done[-1].alerts] == ["open"]


def alone(step: int) -> AuditRecord:
    return of("a", step)


@pytest.mark.parametrize("unknown", ["kl", "shift", "check"])
def test_a_look_that_cannot_tell_is_no_look_in_a_row(unknown: str) -> None:
    """Patience counts the looks that say something: else what only every second one can tell is never heard."""
    bad: dict[str, Any] = {"kl": {"kl": about(2.5)}, "shift": {"shift": about(-3.0)}, "check": {}}[unknown]
    nothing: dict[str, Any] = {name: Estimate.unknown("memory") for name in bad}
    rules: dict[str, Any] = {
        "kl": {"sudden_change": "off"},
        "shift": {},
        "check": {"mine": {"check": needs_patching, "patience": 2, "level": "error"}},
    }[unknown]
    records = [
        later(with_margins(healthy(40 + 10 * place), **bad) if place % 2 == 0 else without(40 + 10 * place, nothing))
        for place in range(6)
    ]
    made = judged([*run(), *records], AlertConfig(rules=rules))
    assert any(alert.level == "error" for alert in made[-1].alerts)


def needs_patching(history: Any) -> str | None:
    return "planted" if history.record.patching.additivity.mean > 0.1 else None


def without(step: int, nothing: dict[str, Any]) -> AuditRecord:
    return health(with_margins(healthy(step), **nothing))
