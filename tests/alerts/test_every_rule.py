"""A walk over all rules: each opens on what it is for, gets as bad as it may, is over, and says what to do with names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from align_audit.alerts.advice import advise
from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME, NO_WAY_BACK, RULES, Rule
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.checkpoint_names import by_step
from align_audit.record.training_log import LogRow
from tests.alerts.test_judge import FIRES
from tests.alerts.test_log_windows import CALM, LATE
from tests.helpers.alert_cases import NAN, about, healthy, judged, log_sign, sign, with_margins, with_part
from tests.helpers.make_record import make_record

BEFORE, BAD, OVER, MAX_STEPS = (10, 20, 30, 40), (60, 70), (100, 110, 120), 120


def calm(step: int, kl: float = 0.05) -> AuditRecord:
    """A healthy audit, of which what baselines are made of is the same at all steps."""
    return with_margins(healthy(step), kl=about(kl))


def run_before(rule: Rule) -> list[AuditRecord]:
    usual = [calm(step, usual_kl(rule)) for step in BEFORE]
    # What was never learned has not fallen, which would be another rule's.
    usual = [unlearned(record) for record in usual] if rule.name == "nothing_learned" else usual
    return [make_record(0, progress=0.0, alerts=[]), *usual]


def usual_kl(rule: Rule) -> float:
    """Near its limit beside a witness, so that beyond it is no jump, which would be a third sign."""
    return 0.25 if rule.weight == "witness" else 0.05


def unlearned(record: AuditRecord) -> AuditRecord:
    return with_margins(record, shift=about(0.1, 0.5), accuracy=about(0.55, 0.1))


def moved_terminal(record: AuditRecord) -> AuditRecord:
    reference = record.spinal.reference
    policy = reference.model_copy(update={"contraction": [value + 0.5 for value in reference.contraction]})
    return with_part(record, "spinal", policy=policy)


def curves(record: AuditRecord, **changes: Any) -> AuditRecord:
    """The record with these values in all curves of the shift."""
    shift = {layer: curve.model_copy(update=changes) for layer, curve in record.low_rank["shift"].items()}
    return record.model_copy(update={"low_rank": {**record.low_rank, "shift": shift}})


MADE: dict[str, Callable[[AuditRecord], AuditRecord]] = {
    # Beyond its limit of a warning alone: KL, of the same family, would make the jump an error.
    "chosen_logp_falling": lambda record: with_margins(record, chosen_logp_change_per_token=about(-0.27)),
    "sudden_change": lambda record: with_margins(record, kl=about(0.3)),
    "rank_inflated": lambda record: curves(record, rank_95=40.0),
    "subspace_rotated": lambda record: curves(record, principal_angles=[1.4, 1.5, 1.5]),
    "terminal_jump": moved_terminal,
    "nothing_learned": unlearned,
}
"""What makes a rule fire where that is not in ``FIRES``, or would make others fire too."""

LOGGED = LATE | {
    "log_not_finite": {"loss": NAN},
    "log_gradient_spike": {"grad_norm": 50.0},
    "log_stuck": {"loss": math.log(2), "rewards/margins": 0.0},
}


def bad(rule: Rule, step: int) -> AuditRecord:
    """An audit that this rule is for. Beside a witness another rule sees something."""
    record = calm(step)
    if rule.name in MADE:
        record = MADE[rule.name](record)
    elif rule.source != "log":
        record = FIRES[rule.name][0]().model_copy(update={"step": step})
    return with_margins(record, kl=about(0.37)) if rule.weight == "witness" else record


def log_for(rule: Rule) -> list[LogRow]:
    late = LOGGED.get(rule.name, {})
    return [LogRow(step, CALM | (late if 44 <= step <= 70 else {})) for step in range(1, 121)]


def life_of(rule: Rule) -> list[Alert]:
    """The alert of its cause, record by record, over a run that goes wrong for two looks."""
    records = [
        *run_before(rule), *(bad(rule, step) for step in BAD), *(calm(step, usual_kl(rule)) for step in OVER),
    ]  # fmt: skip
    log = log_for(rule) if rule.source == "log" else []
    return [
        alert
        for record in judged(records, log=log, max_steps=MAX_STEPS)
        for alert in record.alerts
        if alert.cause == rule.cause
    ]


@pytest.fixture(scope="module")
def lives() -> dict[str, list[Alert]]:
    return {rule.name: life_of(rule) for rule in RULES}


EVERY = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def test_there_is_a_case_for_every_rule() -> None:
    assert MADE.keys() | FIRES.keys() | LOGGED.keys() == BY_NAME.keys()


@EVERY
def test_it_opens_gets_as_bad_as_it_may_and_is_over(rule: Rule, lives: dict[str, list[Alert]]) -> None:
    life = lives[rule.name]
    assert [alert.event for alert in life].count("opened") == 1
    opened, last = life[0], life[-1]
    assert opened.event == "opened"
    assert opened.since == opened.step == (70 if rule.patience > 1 and rule.weight == "alone" else 60)
    assert all(rule.name in (alert.rule, *alert.signals) for alert in life if alert.step in BAD)
    worst = "error" if rule.highest == "error" else "warning"
    seen = [alert for alert in life if alert.step in BAD]
    assert seen[-1].level == worst
    assert (seen[-1].event == "worse") == (len(seen) == 2 and worst == "error" != opened.level)
    assert (last.event, last.step) == ("resolved", 110), "the second look in a row that does not see it"
    assert last.message.startswith("It is over: at step 110 ")


def numbers_said(value: float) -> set[str]:
    """How a message may put a number."""
    forms = (".0f", ".1f", ".2f", ".4f", ".1g", ".2g", ".3g", ".0%", ".1%")
    return {f"{number:{form}}" for number in (value, abs(value)) for form in forms}


@EVERY
def test_its_message_has_the_value_and_the_limit_in_plain_sentences(rule: Rule) -> None:
    if rule.source == "log":
        seen = log_sign(rule.name, [row for row in log_for(rule) if row.step <= 70])
    else:
        seen = sign(rule.name, bad(rule, 60), judged(run_before(rule)), max_steps=MAX_STEPS)
    assert seen is not None
    said = seen.words
    assert said[0].isupper() and said.endswith(".") and "\n" not in said and "  " not in said and ".." not in said
    if math.isfinite(seen.value):
        assert any(number in said for number in numbers_said(seen.value)), (said, seen.value)
    told = [re.search(rf"(?<![\d.]){seen.value:{form}}", seen.message) for form in (".0%", ".1%")]
    if seen.limit is not None and any(told):
        assert f"{100 * seen.limit:.3g}%" in said, "value and limit are told alike"
    elif seen.limit is not None:
        assert not re.search(r"The limit is [\d.]+%", said), "100% of something else is no unit of the value"
    if seen.limit is not None:
        assert any(re.search(rf"(?<![\d.]){re.escape(number)}", said) for number in numbers_said(seen.limit)), said
    else:
        assert all(limit.level is None for limit in rule.limits) or rule.error_without_limit, (
            "it has a limit, and gives none"
        )


@EVERY
def test_a_step_at_which_it_was_seen_is_not_clean(rule: Rule) -> None:
    """A rule that is patient has seen it before it opens: that checkpoint is none to go back to."""
    config = AlertConfig(rules={rule.name: {"patience": 2}})
    log = log_for(rule) if rule.source == "log" else []
    before = [*run_before(rule), *(bad(rule, step) for step in BAD)]
    made = judged(before, config, log, max_steps=MAX_STEPS)
    (alert,) = [alert for alert in made[-1].alerts if alert.cause == rule.cause]
    (alert,) = advise([alert], made[:-1], log, checkpoints=by_step(["checkpoint-40", "checkpoint-60"]))
    assert alert.seen_since == 60
    if rule.cause not in NO_WAY_BACK:
        assert (alert.clean_step, alert.checkpoint) == (40, "checkpoint-40")


@EVERY
@pytest.mark.parametrize("checkpoints", [[], ["checkpoint-40"]])
def test_its_advice_names_a_step_or_says_why_not(
    rule: Rule, checkpoints: list[str], lives: dict[str, list[Alert]]
) -> None:
    before = judged(run_before(rule))
    (alert,) = advise([lives[rule.name][0]], before, checkpoints=by_step(checkpoints))
    assert len(alert.remedy) > 20
    if rule.cause in NO_WAY_BACK:
        assert alert.suggestion.endswith(NO_WAY_BACK[rule.cause])
        assert alert.command is None
        return
    assert "last clean audit was at step 40" in alert.suggestion
    assert ("go back to checkpoint-40" in alert.suggestion) == bool(checkpoints)
    assert (alert.command == "trainer.train(resume_from_checkpoint='checkpoint-40')") == bool(checkpoints)
    assert ("no checkpoint from then or before was kept" in alert.suggestion) == (not checkpoints)
