"""When a run is looked at, and how: the one place that says at which steps the truth is measured and audits are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from destabilization.kinds import FIRST_SEED, STEPS, Case

TRUTH_EVERY = 4
"""Steps between two measurements of the ground truth: twice as dense as audits."""
FIRST_LOOKS = (5, 10, 20, 40, 80, 160)
"""Where the schedule of health audits looks, whatever the budget."""
FULL = (5, 16, 32, 48)
"""Steps of full audits: the last looks before 10, 25, 50 and 75 % of the run, from which is told what the inside adds."""
FULL_OF_LONG = (16, 40, 80, 120)
"""The same of the longer runs."""


@dataclass(frozen=True)
class Looks:
    """The audits of a run.

    Attributes:
        every: steps between two health audits, beside the first looks.
        pairs: probe pairs.
        steps: of the run.
    """

    every: int
    pairs: int
    steps: int = STEPS

    @property
    def scheduled(self) -> tuple[int, ...]:
        """Steps of health audits that the schedule asks for, with the one before the first step."""
        first = {step for step in FIRST_LOOKS if step <= self.steps}
        return tuple(sorted({0, *first, *range(self.every, self.steps + 1, self.every), self.steps}))

    @property
    def full(self) -> tuple[int, ...]:
        """Steps of full audits."""
        return FULL if self.steps == STEPS else FULL_OF_LONG


def truth_steps(case: Case) -> tuple[int, ...]:
    """Steps at which the ground truth is measured, from 0 on."""
    return tuple(range(0, case.steps + 1, TRUTH_EVERY))


PAIRS = (24, 64, 8)
"""Probe pairs of the scoring split."""


def looks(case: Case) -> Looks:
    """Tuning: every 8 steps on 24 pairs. Scoring: every 6 steps, on 24, 64 or 8 pairs.

    The pairs go on from seed to seed, and one further every third seed: the models that a fault meets repeat every third
    seed too, so that in nine seeds it meets each model on each number of pairs.
    """
    if case.split == "tuning":
        return Looks(every=8, pairs=24, steps=case.steps)
    seed = case.seed - FIRST_SEED["scoring"]
    return Looks(every=6, pairs=PAIRS[(seed + seed // 3) % 3], steps=case.steps)


def kept_steps(case: Case) -> frozenset[int]:
    """Steps whose weights a run keeps, and of which it has a health audit.

    What is no look of the schedule is there for looks that the trainer's log calls for: in a run they come at once, here at
    the next step that was kept.
    """
    return frozenset({*truth_steps(case), *looks(case).scheduled, *looks(case).full})


def audit_options(case: Case, *, full: bool) -> dict[str, Any]:
    """``AuditConfig.from_dict`` of an audit: as the defaults say, but for what takes time and tells rules nothing."""
    options: dict[str, Any] = {
        "max_pairs": looks(case).pairs,
        "progress": False,
        "tensorboard": "off",
        "strict": True,
    }
    if not full:
        return options
    return options | {
        "patching": {"noise_draws": 1},
        "localization": {"selection_resamples": 20, "permutations": 5},
        "low_rank": {"bases": ["shift"], "ranks": [1, 2, 4, 8, 16], "random_draws": 0},
    }
