"""A set of alert rules, as it is scored: from what is known at a step to the alarms that are open then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from align_audit.alerts.detectors import evaluate
from align_audit.config import AlertConfig
from align_audit.record.audit_record import AuditRecord
from destabilization.stored import LogRow, StoredRun

Level = Literal["warning", "error"]


@dataclass(frozen=True)
class Alarm:
    """What a rule says at the last step it was shown."""

    rule: str
    level: Level


Judge = Callable[[Sequence[AuditRecord], Sequence[LogRow]], list[Alarm]]
"""From the records and the log so far, oldest first, to the alarms of the newest of them."""


@dataclass(frozen=True)
class RuleSet:
    """Rules under a name.

    Attributes:
        at: the rules with limits that lie so many times as far from what is usual: 1 is how they come.
        reads: ``log``: judged at each step of training. ``audits``: at each look.
        inside: full audits are among the records that it is shown.
    """

    name: str
    at: Callable[[float], Judge]
    reads: Literal["log", "audits"]
    inside: bool = False


@dataclass(frozen=True)
class Raised:
    """An alarm of a run, when it was raised first."""

    step: int
    rule: str
    level: Level


def alarms(run: StoredRun, rules: RuleSet, laxness: float = 1.0) -> list[Raised]:
    """The first alarm of each rule and level in a run, by step.

    A run with a fault is judged after the fault begins: before that it is its twin, which is judged by itself.
    """
    judge = rules.at(laxness)
    records = run.records if rules.inside else run.health
    steps = run.looks if rules.reads == "audits" else sorted({row.step for row in run.log})
    first: dict[tuple[str, Level], Raised] = {}
    for step in (step for step in steps if step > (run.fault_step or 0)):
        seen = [record for record in records if record.step <= step]
        log = [row for row in run.log if row.step <= step]
        for alarm in judge(seen, log):
            first.setdefault((alarm.rule, alarm.level), Raised(step, alarm.rule, alarm.level))
    return sorted(first.values(), key=lambda raised: (raised.step, raised.level, raised.rule))


def limits(laxness: float) -> AlertConfig:
    """The limits of the alert rules, so many times as far from what a healthy run shows as the defaults are."""
    default = AlertConfig()
    ratio = {
        "entropy_ratio_low": default.entropy_ratio_low**laxness,
        "entropy_ratio_high": default.entropy_ratio_high**laxness,
        "token_accuracy_ratio_error": default.token_accuracy_ratio_error**laxness,
    }
    distance = {
        name: getattr(default, name) * laxness
        for name in ("chosen_drop_warning", "chosen_drop_error", "kl_warning", "kl_error")
    }
    share = {
        name: min(getattr(default, name) * laxness, 0.999) for name in ("accuracy_drop_warning", "accuracy_drop_error")
    }
    return AlertConfig(**ratio, **distance, **share)


def align_audit_rules(laxness: float) -> Judge:
    """The package's own rules. Info is no alarm. A full audit of the same step as a health audit is judged with it."""
    config = limits(laxness)

    def judge(records: Sequence[AuditRecord], log: Sequence[LogRow]) -> list[Alarm]:
        if not records:
            return []
        newest = [record for record in records if record.step == records[-1].step]
        raised = []
        for record in newest:
            earlier = [other for other in records if other.step < record.step]
            raised += [
                Alarm(alert.rule, alert.level) for alert in evaluate(record, earlier, config) if alert.level != "info"
            ]
        return raised

    return judge


AUDIT_RULES = (
    RuleSet("align_audit, health audits", align_audit_rules, "audits"),
    RuleSet("align_audit, with full audits", align_audit_rules, "audits", inside=True),
)
