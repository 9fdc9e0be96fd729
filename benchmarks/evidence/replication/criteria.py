"""When a claim holds of the runs of a setup: a figure, a line, and what must be there for anything to be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from replication.destabilized import first_harm
from replication.figures import Figure
from replication.stored import Runs, StoredRun

Paper = Literal["AL", "SPINAL"]
Verdict = Literal["holds", "does not hold", "cannot be said"]


@dataclass(frozen=True)
class Criterion:
    """When a claim holds.

    Attributes:
        sentence: what is compared, and with which line.
        figure: the number, from the runs of one setup.
        above, below: the claim holds where the whole interval lies between them, and does not hold where all of it lies on the
            other side of one of them. Otherwise it cannot be said.
        missing: why nothing can be said of these runs, whatever the figure; None: something can.
    """

    sentence: str
    figure: Callable[[Runs], Figure]
    above: float | None = None
    below: float | None = None
    missing: Callable[[Runs], str | None] = lambda runs: None

    def judge(self, runs: Runs) -> Judged:
        """The verdict with its figure, or its reason."""
        why = self.missing(runs)
        figure = self.figure(runs) if why is None else Figure.unknown(why)
        if not (figure.low == figure.low and figure.high == figure.high):
            return Judged("cannot be said", figure, figure.reason or "not known")
        low, high = self.above, self.below
        if (low is not None and figure.high <= low) or (high is not None and figure.low >= high):
            return Judged("does not hold", figure)
        if (low is None or figure.low > low) and (high is None or figure.high < high):
            return Judged("holds", figure)
        return Judged("cannot be said", figure, "the interval includes the line")


@dataclass(frozen=True)
class Judged:
    """A verdict; ``reason`` says why nothing can be said."""

    verdict: Verdict
    figure: Figure
    reason: str | None = None


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, in our words."""

    name: str
    paper: Paper
    words: str
    stated: Criterion
    allowed: Criterion


# -- what must be there ----------------------------------------------------------------------------------------------------


def healthy(runs: Runs) -> list[StoredRun]:
    """The runs that claims are about."""
    return runs["healthy"]


def nothing_learned(runs: Runs) -> str | None:
    """Where the margin of other pairs has not moved up, there is no effect to place."""
    for run in healthy(runs):
        for record in run.last:
            if not record.margins.shift.low > 0:
                return f"the mean margin shift of seed {run.seed} includes 0"
    return None


def uncontrolled(*names: str) -> Callable[[Runs], str | None]:
    """Nothing learned, or a control failed that the figure rests on."""

    def why(runs: Runs) -> str | None:
        if (nothing := nothing_learned(runs)) is not None:
            return nothing
        for run in healthy(runs):
            for record in run.last:
                for name in names:
                    verdict: str = getattr(record.controls, name).verdict
                    if verdict != "passed":
                        words = f"{name} {verdict}".replace("_", " ")
                        return f"control {words} in seed {run.seed}"
        return None

    return why


def unpaired(runs: Runs) -> str | None:
    """What a null run shows as well is not alignment's; without two seeds of both there is no comparison."""
    both = {run.seed for run in runs["healthy"]} & {run.seed for run in runs["null"]}
    return None if len(both) > 1 else "two seeds with a null run are needed"


def no_harm(runs: Runs) -> str | None:
    """Nothing begins to destabilize where no ruined run was harmed."""
    unharmed = [run.seed for run in runs["ruined"] if first_harm(run) is None]
    if not runs["ruined"] or unharmed:
        return f"no harm was seen in the ruined run of seed {unharmed[0]}" if unharmed else "no ruined run"
    return unpaired(runs)
