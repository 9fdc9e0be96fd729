"""What a set of rules says of each run, against what became of it: alarms due and false, in time and late, and their lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scipy.stats import binomtest

from destabilization.rules import Raised, RuleSet, alarms
from destabilization.stored import StoredRun

IN_TIME = 2
"""Looks after the line within which an alarm of it counts as in time."""


@dataclass(frozen=True)
class Groups:
    """Runs by what became of them.

    Attributes:
        healthy: without a fault, and fine: an alarm is false.
        harmed: ruined or wasted, with a fault or without: an alarm is due.
        worn: a warning may be, and is not counted.
        unharmed: with a fault that did nothing: an alarm is neither false nor due.
    """

    healthy: list[StoredRun]
    harmed: list[StoredRun]
    worn: list[StoredRun]
    unharmed: list[StoredRun]

    @classmethod
    def of(cls, runs: Sequence[StoredRun]) -> Groups:
        """By measurement: a kind's name plays no part."""

        def of_fate(*fates: str) -> list[StoredRun]:
            return [run for run in runs if run.outcome.fate in fates]

        fine = of_fate("healthy")
        return cls(
            [run for run in fine if not run.faulty],
            of_fate("ruined", "wasted"),
            of_fate("worn"),
            [run for run in fine if run.faulty],
        )


@dataclass(frozen=True)
class Verdict:
    """What a rule set says of one run.

    Attributes:
        warned, failed: step of the first alarm of any level, and of the first error; None where there is none.
        lead: steps from the first alarm to the line; negative where it came later. None without either.
        in_time: the alarm came before the line or within two looks after it.
    """

    run: StoredRun
    raised: list[Raised]

    @property
    def warned(self) -> int | None:
        return min((raised.step for raised in self.raised), default=None)

    @property
    def failed(self) -> int | None:
        return min((raised.step for raised in self.raised if raised.level == "error"), default=None)

    @property
    def lead(self) -> int | None:
        since, warned = self.run.outcome.since, self.warned
        return None if since is None or warned is None else since - warned

    @property
    def lead_share(self) -> float | None:
        """The lead as a share of the run."""
        return None if self.lead is None else self.lead / self.run.steps

    @property
    def in_time(self) -> bool:
        since, warned = self.run.outcome.since, self.warned
        if since is None or warned is None:
            return False
        later = [step for step in self.run.looks if step > since]
        return warned <= (later[: IN_TIME + 1] or [self.run.steps])[-1]


def verdicts(runs: Sequence[StoredRun], rules: RuleSet, laxness: float = 1.0) -> list[Verdict]:
    """What a rule set says of each run."""
    return [Verdict(run, alarms(run, rules, laxness)) for run in runs]


def share(count: int, of: int) -> str:
    """Count, number and Wilson's 95 % interval; "none" of none.

    Example:
        >>> share(0, 60)
        '0 of 60 (0 to 6 %)'
    """
    if of == 0:
        return "none"
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return f"{count} of {of} ({100 * interval.low:.0f} to {100 * interval.high:.0f} %)"


def summary(groups: Groups, rules: RuleSet, laxness: float = 1.0) -> dict[str, Any]:
    """The figures of one rule set."""
    healthy, harmed = verdicts(groups.healthy, rules, laxness), verdicts(groups.harmed, rules, laxness)
    return {
        "rules": rules.name,
        "false_warnings": sum(verdict.warned is not None for verdict in healthy),
        "false_errors": sum(verdict.failed is not None for verdict in healthy),
        "healthy": len(healthy),
        "caught": sum(verdict.warned is not None for verdict in harmed),
        "caught_by_error": sum(verdict.failed is not None for verdict in harmed),
        "in_time": sum(verdict.in_time for verdict in harmed),
        "harmed": len(harmed),
        **median_leads(harmed),
        "missed": [verdict.run.name for verdict in harmed if verdict.warned is None],
        "disturbed": {
            verdict.run.name: sorted({raised.rule for raised in verdict.raised})
            for verdict in healthy
            if verdict.raised
        },
    }


def median_leads(said: Sequence[Verdict]) -> dict[str, float | None]:
    """The median lead in steps and as a share of the run, of the runs that were told of; None where none was."""
    leads = [verdict.lead for verdict in said if verdict.lead is not None]
    shares = [verdict.lead_share for verdict in said if verdict.lead_share is not None]
    return {
        "median_lead": median(leads) if leads else None,
        "median_lead_share": median(shares) if shares else None,
    }
