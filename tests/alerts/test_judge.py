"""What becomes of the signs of a run: one alert a cause, errors by agreement, lives over looks, kinds and probe sets."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from align_audit.alerts.detectors import DETECTORS, LOG_DETECTORS, judge
from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME, CAUSES, RULES
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import (
    CONFIG,
    NAN,
    about,
    alerts,
    health,
    healthy,
    judged,
    log_of,
    on_set,
    run,
    signs,
    with_margins,
    with_part,
    with_texts,
)
from tests.helpers.make_record import make_record, make_run

Life = list[tuple[str, str, int]]


def life(records: list[AuditRecord], cause: str = "drift", **known: Any) -> Life:
    """Event, level and looks of a cause's alert at each record of a run; none where none is open."""
    return [
        (alert.event, alert.level, alert.looks)
        for record in judged(records, **known)
        for alert in record.alerts
        if alert.cause == cause
    ]


def at_kl(step: int, kl: float) -> AuditRecord:
    return with_margins(healthy(step), kl=about(kl))


# -- the rules as a whole --------------------------------------------------------------------------------------------------


def test_names_are_stable_and_fit_where_they_are_shown() -> None:
    """Trackers key on these names: renaming one breaks what users built on it."""
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert names[:8] == [
        "non_finite", "reference_mismatch", "reference_changed", "chosen_logp_falling", "kl_out_of_bounds",
        "entropy_out_of_bounds", "token_accuracy_collapsed", "sudden_change",
    ]  # fmt: skip
    assert {"accuracy_falling", "additivity_collapsed", "coherence_collapsed"} < set(names)
    assert all(len(name) <= 63 and re.fullmatch(r"[a-z_]+", name) for name in names)


def test_every_rule_has_what_computes_it_and_a_cause_that_is_told() -> None:
    assert {**DETECTORS, **LOG_DETECTORS}.keys() == BY_NAME.keys()
    assert not DETECTORS.keys() & LOG_DETECTORS.keys()
    assert {rule.cause for rule in RULES} == set(CAUSES)
    assert all(detector.__doc__ for detector in (*DETECTORS.values(), *LOG_DETECTORS.values()))
    assert all((rule.source == "log") == (rule.name in LOG_DETECTORS) for rule in RULES)


def test_a_healthy_run_raises_nothing() -> None:
    for seed in range(5):
        records = [record.model_copy(update={"alerts": []}) for record in make_run("healthy", audits=8, seed=seed)]
        assert [record.alerts for record in judged(records)] == [[]] * 8


def test_a_destabilizing_run_opens_one_alert_that_gets_worse() -> None:
    records = judged(make_run("destabilizing", audits=11))
    counts = [len(record.alerts) for record in records]
    assert counts[:5] == [0] * 5
    drift = [alert for record in records for alert in record.alerts if alert.cause == "drift"]
    assert [alert.event for alert in drift].count("opened") == 1
    assert drift[-1].level == "error"
    assert {"kl_out_of_bounds", "token_accuracy_collapsed"} <= {drift[-1].rule, *drift[-1].signals} - {
        "chosen_logp_falling"
    }
    assert drift[-1].since == drift[0].step
    assert drift[-1].looks == len(drift)


FIRES: dict[str, tuple[Callable[[], AuditRecord], str | None]] = {
    "non_finite": (
        lambda: with_margins(healthy(), policy=Estimate.unknown("2 of 64 values are not finite")),
        "error",
    ),
    "reference_mismatch": (
        lambda: with_part(healthy(), "reference_check", verdict="failed", reason="the margin shift is 3.2 nats already"),
        "error",
    ),
    "reference_changed": (lambda: with_part(healthy(), "provenance", reference_hash="f00d" * 4), "error"),
    "chosen_logp_falling": (lambda: with_margins(healthy(), chosen_logp_change_per_token=about(-0.8)), "warning"),
    "kl_out_of_bounds": (lambda: with_margins(healthy(), kl=about(2.5)), "warning"),
    "entropy_out_of_bounds": (lambda: with_margins(healthy(), entropy=about(0.2)), "warning"),
    "token_accuracy_collapsed": (lambda: with_margins(healthy(), token_accuracy=about(0.05)), "warning"),
    "repetition": (lambda: with_texts(healthy(), repetition=about(0.8)), "warning"),
    "length_exploited": (lambda: with_texts(healthy(), length=about(60.0)), "warning"),
    "surprising_text": (lambda: with_texts(healthy(), surprise=about(4.0)), "warning"),
    "additivity_high": (lambda: with_part(healthy(), "patching", additivity=about(1.7)), "warning"),
    "additivity_collapsed": (lambda: with_part(healthy(), "patching", additivity=about(0.2)), "warning"),
    "coherence_collapsed": (lambda: with_part(healthy(), "spinal", coherence=0.05), None),
    "gradient_left_terminal": (
        lambda: with_part(healthy(), "spinal", gradient_concentration=about(0.05)),
        None,
    ),
    "localization_moved": (lambda: with_part(healthy(), "localization", center_of_mass=0.01), None),
    "accuracy_falling": (lambda: with_margins(healthy(), accuracy=about(0.3)), "warning"),
    "margin_reversed": (lambda: with_margins(healthy(), shift=about(-3.0)), None),
    "never_started": (lambda: with_part(healthy(), "reference_check", same_weights=True), None),
}  # fmt: skip
"""What makes a rule fire alone at one look, and the level that this gives."""


@pytest.mark.parametrize("name", FIRES)
def test_the_rule_fires_alone_and_says_what_it_saw(name: str) -> None:
    make, level = FIRES[name]
    record = make()
    (seen,) = signs(record).values()
    assert seen.rule.name == name
    assert re.search(r"\d", seen.message), seen.message
    assert seen.message[0].isupper()
    assert seen.message[-1] == "."
    assert len(seen.suggestion) > 20
    assert seen.suggestion[-1] != "."
    found = alerts(record)
    assert [(alert.rule, alert.level, alert.step, alert.event) for alert in found] == (
        [(name, level, record.step, "opened")] if level else []
    )
    stored = AuditRecord.from_json(record.model_copy(update={"alerts": found}).to_json()).alerts
    assert [alert.message for alert in stored] == [alert.message for alert in found]
    assert alerts(healthy()) == []


def test_alerts_can_be_switched_off() -> None:
    assert alerts(at_kl(100, 2.5), config=AlertConfig(enabled=False)) == []


@pytest.mark.parametrize("name", FIRES)
def test_each_rule_can_be_switched_off(name: str) -> None:
    record, config = FIRES[name][0](), AlertConfig(rules={name: "off"})
    assert alerts(record, config=config) == []


def blank(record: AuditRecord) -> AuditRecord:
    """The same record with NaN for every number that can be one."""
    unknown = Estimate.unknown("unknown")

    def emptied(part: Any) -> Any:
        changes: dict[str, Any] = {}
        for name, value in part:
            if isinstance(value, Estimate):
                changes[name] = unknown
            elif isinstance(value, float):
                changes[name] = NAN
            elif isinstance(value, list) and value and isinstance(value[0], Estimate):
                changes[name] = [unknown] * len(value)
            elif isinstance(value, list) and value and isinstance(value[0], float):
                changes[name] = [NAN] * len(value)
        return part.model_copy(update=changes)

    parts = {
        name: emptied(getattr(record, name))
        for name in ("margins", "patching", "spinal", "localization", "generations")
    }
    parts["patching"] = parts["patching"].model_copy(update={"peak_layer": None})
    parts["low_rank"] = {
        basis: {layer: emptied(curve) for layer, curve in curves.items()} for basis, curves in record.low_rank.items()
    }
    return record.model_copy(update=parts)


@pytest.mark.parametrize("audits", [0, 1, 4])
@pytest.mark.parametrize("before_too", [False, True])
def test_nan_raises_nothing_but_non_finite(audits: int, before_too: bool) -> None:
    before = [record.model_copy(update={"generations": healthy().generations}) for record in run(audits)]
    if before_too:
        before = [blank(record) for record in before]
    found = alerts(blank(healthy()), before)
    assert [(alert.rule, alert.level) for alert in found] == [("non_finite", "error")]
    assert all(math.isnan(alert.value) for alert in found)
    assert alerts(healthy(), [blank(record) for record in before]) == []


def test_parts_that_were_switched_off_raise_nothing() -> None:
    before = [*run(), *(record.model_copy(update={"patching": None, "spinal": None}) for record in run())]
    record = make_record(100, patching=False, localization=False, low_rank=False, spinal=False)
    assert alerts(record, before) == []
    assert [a.rule for a in alerts(with_margins(record, kl=about(1.5)), before)] == ["kl_out_of_bounds"]


# -- agreement -------------------------------------------------------------------------------------------------------------


def test_one_noisy_sign_is_no_error_and_the_same_at_two_looks_is() -> None:
    assert life([*run(), at_kl(40, 2.5)]) == [("opened", "warning", 1)]
    assert life([*run(), at_kl(40, 2.5), at_kl(50, 2.5)]) == [("opened", "warning", 1), ("worse", "error", 2)]
    assert life([*run(), at_kl(40, 0.5), at_kl(50, 0.5)]) == [("opened", "warning", 1), ("open", "warning", 2)]


def test_a_falling_chosen_log_probability_alone_is_never_an_error() -> None:
    fallen = [with_margins(healthy(step), chosen_logp_change_per_token=about(-5.0)) for step in (40, 50, 60, 70)]
    assert {level for _, level, _ in life([*run(), *fallen])} == {"warning"}
    # KL is of the same family: both follow from the same log-probabilities.
    both = [with_margins(record, kl=about(0.5)) for record in fallen]
    assert {level for _, level, _ in life([*run(), *both])} == {"warning"}
    agreeing = with_margins(fallen[0], token_accuracy=about(0.25))
    (alert,) = alerts(agreeing)
    assert (alert.level, alert.rule, alert.signals) == ("error", "chosen_logp_falling", ["token_accuracy_collapsed"])
    assert "It agrees with token_accuracy_collapsed (0.25)." in alert.message


def test_several_weak_signs_make_an_error_and_two_do_not() -> None:
    two = with_margins(healthy(), kl=about(0.4), entropy=about(0.9))
    three = with_texts(two, repetition=about(0.4))
    assert [alert.level for alert in alerts(two)] == ["warning"]
    (alert,) = alerts(three)
    assert (alert.level, alert.rule, alert.signals) == (
        "error",
        "kl_out_of_bounds",
        ["entropy_out_of_bounds", "repetition"],
    )
    assert [alert.level for alert in alerts(three, config=AlertConfig(agreeing_families=4))] == ["warning"]


def test_witnesses_open_nothing_and_strengthen_what_is_seen() -> None:
    jagged = with_part(with_part(healthy(), "spinal", coherence=0.05), "localization", center_of_mass=0.01)
    assert set(signs(jagged)) == {"coherence_collapsed", "localization_moved"}
    assert alerts(jagged) == []
    (alert,) = alerts(with_margins(jagged, kl=about(0.8)))
    assert (alert.level, alert.signals) == ("error", ["localization_moved", "coherence_collapsed"])


def test_agreement_does_not_wait_for_patience() -> None:
    reversed_margin = with_margins(healthy(), shift=about(-3.0))
    assert alerts(reversed_margin) == []
    (alert,) = alerts(with_margins(reversed_margin, accuracy=about(0.3)))
    assert (alert.cause, alert.level) == ("preference", "error")
    turned = [with_margins(healthy(step), shift=about(-3.0)) for step in (40, 50)]
    assert life([*run(), *turned], "preference") == [("opened", "error", 1)]


def test_a_rule_may_be_kept_from_errors_and_made_more_patient() -> None:
    records = [*run(), *(at_kl(step, 2.5) for step in (40, 50, 60))]
    assert {level for _, level, _ in life(records, config=AlertConfig(rules={"kl": {"level": "warning"}}))} == {
        "warning"
    }
    patient = AlertConfig(rules={"kl": {"patience": 3}})
    assert life(records, config=patient) == [("opened", "error", 1)]
    assert life(records[:-1], config=patient) == []


def test_after_an_error_of_the_reference_what_is_measured_against_it_is_silent() -> None:
    ruined = with_margins(healthy(), kl=about(5.0), token_accuracy=about(0.05))
    moved = with_part(ruined, "provenance", reference_hash="beef")
    assert [alert.cause for alert in alerts(moved)] == ["reference"]
    opened = judged([*run(), with_margins(healthy(40), kl=about(5.0), token_accuracy=about(0.05))])
    assert [(alert.cause, alert.event) for alert in alerts(moved, opened)] == [
        ("reference", "opened"),
        ("drift", "open"),
    ]


def test_the_worst_come_first() -> None:
    record = with_margins(healthy(), kl=about(2.5), accuracy=about(0.3), shift=about(-3.0))
    assert [(alert.level, alert.cause) for alert in alerts(record)] == [("error", "preference"), ("warning", "drift")]


# -- life ------------------------------------------------------------------------------------------------------------------


def test_an_alert_is_resolved_when_two_looks_do_not_see_it() -> None:
    records = [*run(), at_kl(40, 0.5), healthy(50), healthy(60), healthy(70)]
    assert life(records) == [("opened", "warning", 1), ("open", "warning", 0), ("resolved", "warning", 0)]
    again = [*run(), at_kl(40, 0.5), healthy(50), at_kl(60, 0.5)]
    assert life(again) == [("opened", "warning", 1), ("open", "warning", 0), ("open", "warning", 1)]


def test_an_open_alert_clears_only_well_behind_its_limit() -> None:
    near, far = 0.32, 0.25
    assert life([*run(), at_kl(40, near)]) == []
    assert life([*run(), at_kl(40, 0.5), at_kl(50, near), at_kl(60, near)])[-1] == ("open", "warning", 3)
    assert life([*run(), at_kl(40, 0.5), at_kl(50, far), at_kl(60, far)])[-1] == ("resolved", "warning", 0)
    assert life([*run(), at_kl(40, 0.5), at_kl(50, near), at_kl(60, near)], config=AlertConfig(hysteresis=1.0))[-1] == (
        "resolved", "warning", 0,
    )  # fmt: skip


def test_an_error_stays_one_until_it_is_resolved() -> None:
    records = [*run(), at_kl(40, 2.5), at_kl(50, 2.5), at_kl(60, 0.4), healthy(70), healthy(80)]
    assert [level for _, level, _ in life(records)] == ["warning", "error", "error", "error", "error"]
    assert [event for event, _, _ in life(records)] == ["opened", "worse", "open", "open", "resolved"]


def test_what_was_just_resolved_has_to_be_seen_once_more() -> None:
    flapping = [*run(), at_kl(40, 0.5), healthy(50), healthy(60), at_kl(70, 0.5)]
    assert len(life(flapping)) == 3
    assert len(life(flapping, config=AlertConfig(cooldown=0))) == 4
    assert life([*flapping, at_kl(80, 0.5)])[-1] == ("opened", "warning", 1)
    later = [*flapping[:-1], *(healthy(step) for step in (70, 80, 90)), at_kl(100, 0.5)]
    assert life(later)[-1] == ("opened", "warning", 1)


def test_health_and_full_audits_of_one_step_are_one_look() -> None:
    first = at_kl(40, 0.5)
    assert life([*run(), health(first), first]) == [("opened", "warning", 1), ("open", "warning", 1)]
    strong = at_kl(40, 2.5)
    assert life([*run(), health(strong), strong]) == [("opened", "warning", 1), ("open", "warning", 1)]
    assert life([*run(), health(strong), strong, health(at_kl(50, 2.5))])[-1] == ("worse", "error", 2)


def test_what_a_health_audit_does_not_measure_it_does_not_clear() -> None:
    inside = with_part(healthy(40), "patching", additivity=about(1.7))
    records = [*run(), inside, health(healthy(50)), health(healthy(60))]
    assert life(records) == [("opened", "warning", 1), ("open", "warning", 1), ("open", "warning", 1)]
    assert life([*records, healthy(70), healthy(80)])[-1] == ("resolved", "warning", 0)
    assert life([health(healthy(step)) for step in (10, 20)]) == []


def test_alerts_of_a_run_that_was_resumed_are_those_of_its_new_course() -> None:
    def made(record: AuditRecord, minute: int) -> AuditRecord:
        return with_part(
            record, "provenance", created=f"2026-01-01T00:{minute:02d}:00+00:00", policy_hash=f"at {minute}"
        )

    left = judged([made(healthy(10), 1), made(at_kl(20, 0.5), 2), made(at_kl(30, 2.5), 3), made(at_kl(40, 2.5), 4)])
    assert left[-1].alerts[0].level == "error"
    resumed = made(healthy(20), 5)
    course = [*left, resumed]
    assert alerts(made(healthy(50), 6), course) == []
    assert alerts(made(healthy(50), 6), left) != []


def test_records_of_earlier_versions_are_gone_on_from() -> None:
    old = Alert(rule="kl_out_of_bounds", level="error", step=30, value=2.5, message="", suggestion="")
    failed = old.model_copy(update={"rule": "control_failed"})
    before = [*run(2), healthy(30).model_copy(update={"alerts": [old, failed]})]
    (alert,) = alerts(at_kl(40, 2.5), before)
    assert (alert.cause, alert.event, alert.level, alert.since) == ("drift", "open", "error", 30)


# -- probe sets ------------------------------------------------------------------------------------------------------------


def sets_of(step: int, first: float, second: float) -> list[AuditRecord]:
    return [on_set(at_kl(step, kl), name) for name, kl in (("a", first), ("b", second))]


def one_by_one(records: list[AuditRecord]) -> list[AuditRecord]:
    """Made in this order, a second apart."""
    return [
        with_part(record, "provenance", created=f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}+00:00")
        for second, record in enumerate(records)
    ]


def test_one_cause_is_one_alert_across_probe_sets() -> None:
    before = judged([on_set(record, name) for record in run() for name in ("a", "b")])
    first, second = judged([*before, *sets_of(40, 0.5, 0.6)])[-2:]
    assert [(alert.event, alert.probe_name) for alert in first.alerts] == [("opened", "a")]
    assert [(alert.event, alert.since) for alert in second.alerts] == [("open", 40)]
    assert second.alerts[0].message.startswith("On the probes ")


def test_an_alert_stays_open_as_long_as_any_set_sees_it() -> None:
    records = [*sets_of(10, 0.5, 0.1), *sets_of(20, 0.1, 0.5), *sets_of(30, 0.1, 0.1), *sets_of(40, 0.1, 0.1)]
    # At step 40 the audit of a is no look at what b was seen on: only that of b is the second one that does not see it.
    assert [event for event, _, _ in life(one_by_one(records))] == ["opened", *["open"] * 6, "resolved"]


def test_the_order_of_the_sets_does_not_matter() -> None:
    kls = [(0.1, 0.1), (0.5, 0.1), (2.5, 0.4), (0.4, 2.5), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1)]
    runs = [
        judged(
            one_by_one(
                [record for step, kl in enumerate(kls, start=1) for record in sets_of(10 * step, *kl)[::direction]]
            )
        )
        for direction in (1, -1)
    ]
    for record, other in zip(runs[0][1::2], runs[1][1::2], strict=True):  # after both sets of a step
        assert [(a.cause, a.level, a.since, a.event == "resolved") for a in record.alerts if a.event != "resolved"] == [
            (a.cause, a.level, a.since, a.event == "resolved") for a in other.alerts if a.event != "resolved"
        ]


def test_judging_is_pure_and_takes_the_records_before_in_any_order() -> None:
    rng = random.Random(0)
    log = log_of(range(1, 60), loss=0.5, grad_norm=1.0)
    for _ in range(20):
        kls = [(10 * step, rng.choice([0.1, 0.3, 0.5, 2.5]), rng.choice([0.1, 0.5, 2.5])) for step in range(1, 6)]
        *before, record = judged(
            [part for step, first, second in kls for part in sets_of(step, first, second)], log=log
        )
        stored = [part.to_json() for part in before]
        expected = judge(record, before, log, CONFIG)
        for order in itertools.islice(itertools.permutations(before), 1, 400, 40):
            assert judge(record, list(order), log, CONFIG) == expected
        assert [part.to_json() for part in before] == stored
        assert judge(record, before, log, CONFIG) == expected == record.alerts
