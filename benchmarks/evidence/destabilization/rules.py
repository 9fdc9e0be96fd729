"""A set of alert rules, as it is scored: what is known at a step goes in, the alarms that are open then come out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from align_audit.alerts.detectors import judge, suspect
from align_audit.config import AlertConfig
from align_audit.options.rules import LIMITS, Limit
from align_audit.record.audit_record import AuditRecord
from align_audit.record.training_log import LogRow
from destabilization.stored import StoredRun

Level = Literal["warning", "error"]


@dataclass(frozen=True)
class Raised:
    """An alarm of a run, when it was raised first."""

    step: int
    rule: str
    level: Level


Alarms = Callable[[StoredRun], list[Raised]]
"""All alarms of a run; each step is judged by what was known then."""


@dataclass(frozen=True)
class RuleSet:
    """Rules under a name.

    Attributes:
        at: the rules with limits that lie so many times as far from what is usual: 1 is how they come.
    """

    name: str
    at: Callable[[float], Alarms]


def alarms(run: StoredRun, rules: RuleSet, laxness: float = 1.0) -> list[Raised]:
    """The first alarm of each rule and level in a run, by step.

    A run with a fault is judged after the fault begins: before that it is its twin, which is judged by itself.
    """
    first: dict[tuple[str, Level], Raised] = {}
    for raised in sorted(rules.at(laxness)(run), key=lambda raised: (raised.step, raised.level, raised.rule)):
        if raised.step > (run.fault_step or 0):
            first.setdefault((raised.rule, raised.level), raised)
    return list(first.values())


LogRules = Callable[[Sequence[LogRow]], list[tuple[str, Level]]]
"""From the trainer's log so far, oldest row first, to the rules that speak at its newest row."""


def of_log(rules: LogRules) -> Alarms:
    """Alarms at each row of the trainer's log."""

    def alarms_of(run: StoredRun) -> list[Raised]:
        return [
            Raised(run.log[place - 1].step, rule, level)
            for place in range(1, len(run.log) + 1)
            for rule, level in rules(run.log[:place])
        ]

    return alarms_of


def moved(limit: Limit, laxness: float) -> float:
    """A limit so many times as far from what is usual, inside of what the option may be.

    A share of something is usual at 1, everything else at 0.

    Example:
        >>> moved(LIMITS["kl_warning"], 2.0) / LIMITS["kl_warning"].default
        2.0
        >>> moved(LIMITS["entropy_ratio_high"], 2.0) == 1 + 2 * (LIMITS["entropy_ratio_high"].default - 1)
        True
    """
    if limit.level is None or not limit.relative:
        return limit.default
    if limit.above >= 1:
        value = 1 + (limit.default - 1) * laxness
    elif limit.direction == "below" and limit.below <= 1:
        value = limit.default**laxness
    elif limit.direction == "below":
        value = limit.default / laxness
    else:
        value = limit.default * laxness
    edge = 1e-6
    return min(max(value, limit.above + edge), limit.below - edge)


def limits(laxness: float) -> AlertConfig:
    """The alert rules with all their limits moved together; 1: the defaults."""
    if laxness == 1:
        return AlertConfig()
    return AlertConfig(**{name: moved(limit, laxness) for name, limit in LIMITS.items()})


def called_for(run: StoredRun, config: AlertConfig) -> set[int]:
    """Steps of the looks that the trainer's log calls for, as it does in a run: where a rule of it begins to suspect for the
    first time. (Again it calls for one as the budget has room, and runs as short as these have none.)

    They are made at the next step of which there is an audit, up to three steps later than a run would make them.
    """
    audited = [record.step for record in run.health]
    suspected: set[str] = set()
    steps: set[int] = set()
    for step in sorted({row.step for row in run.log}):
        rules = {
            each.rule for each in suspect([row for row in run.log if row.step <= step], config, max_steps=run.steps)
        }
        if rules - suspected:
            steps |= set(audited[bisect_left(audited, step) :][:1])
        suspected |= rules
    return steps


def align_audit_rules(*, log: bool, full: bool, config: AlertConfig | None = None) -> Callable[[float], Alarms]:
    """The package's own rules, asked as in a run: each audit with its alerts is known to those after it.

    Args:
        log: they read the trainer's log up to the audit too, and it calls for looks.
        full: full audits are made at their steps, beside the looks.
        config: their options, whatever the laxness; None: the defaults, moved by it.
    """

    def at(laxness: float) -> Alarms:
        options = config or limits(laxness)

        def alarms_of(run: StoredRun) -> list[Raised]:
            steps = {0, *run.looks} | (called_for(run, options) if log else set())
            records = [record for record in run.health if record.step in steps] + (run.full if full else [])
            raised: list[Raised] = []
            earlier: list[AuditRecord] = []
            for record in sorted(records, key=lambda record: (record.step, record.kind == "full")):
                rows = [row for row in run.log if row.step <= record.step] if log else []
                alerts = judge(record, earlier, rows, options, max_steps=run.steps)
                earlier.append(record.model_copy(update={"alerts": alerts}))
                raised += [
                    Raised(record.step, alert.rule, alert.level)
                    for alert in alerts
                    if alert.level != "info" and alert.event != "resolved" and record.step > 0
                ]
            return raised

        return alarms_of

    return at


AUDIT_RULES = (
    RuleSet("align_audit, looks and log", align_audit_rules(log=True, full=False)),
    RuleSet("align_audit, looks alone", align_audit_rules(log=False, full=False)),
    RuleSet("align_audit, with full audits", align_audit_rules(log=True, full=True)),
)
