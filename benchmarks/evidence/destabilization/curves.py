"""Recall and lead against false alarms: each set of rules with all its limits moved together, from strict to lax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from destabilization.kinds import Split
from destabilization.rivals import LAXNESS, rival_rules
from destabilization.rules import AUDIT_RULES, RuleSet
from destabilization.stored import load
from destabilization.verdicts import Groups, summary

Point = dict[str, Any]
"""The figures of a set of rules at one laxness."""
KEPT = ("false_warnings", "healthy", "caught", "in_time", "harmed", "median_lead", "median_lead_share")


class Dials:
    """The sets of rules that have limits to move, and the runs of a split that they judge."""

    def __init__(self, split: Split, data: Path) -> None:
        self.split, self.data = split, data
        self.runs = load(split, data)
        self.groups = Groups.of(self.runs)
        self.rivals = rival_rules(Groups.of(load("tuning", data)).healthy)
        self.sets: dict[str, RuleSet] = {each.name: each for each in [*AUDIT_RULES, *self.rivals]}

    def point(self, name: str, laxness: float) -> Point:
        """The figures of a set at one laxness."""
        figures = summary(self.groups, self.sets[name], laxness)
        return {"laxness": laxness} | {kept: figures[kept] for kept in KEPT}


def curves(dials: Dials, jobs: int = 1, laxness: Sequence[float] = LAXNESS) -> dict[str, list[Point]]:
    """The figures of each set of rules at each laxness, strictest first.

    Args:
        jobs: processes that work on it. Each reads the stored runs for itself.
    """
    tasks = [(name, at) for name in dials.sets for at in laxness]
    if jobs == 1:
        points = [dials.point(*task) for task in tasks]
    else:
        place = (dials.split, dials.data)
        with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin, initargs=place) as pool:
            points = list(pool.map(_point, *zip(*tasks, strict=True)))
    drawn: dict[str, list[Point]] = {name: [] for name in dials.sets}
    for (name, _), point in zip(tasks, points, strict=True):
        drawn[name].append(point)
    return drawn


_dials: Dials
"""Of a process that works on curves."""


def _begin(split: Split, data: Path) -> None:
    global _dials
    _dials = Dials(split, data)


def _point(name: str, laxness: float) -> Point:
    return _dials.point(name, laxness)


def best_at(points: Sequence[dict[str, Any]], rate: float) -> dict[str, Any] | None:
    """The point that catches most in time among those with at most that share of false alarms."""
    allowed = [point for point in points if point["false_warnings"] <= rate * point["healthy"]]
    return max(
        allowed,
        key=lambda point: (
            point["in_time"],
            point["caught"],
            -math.inf if point["median_lead_share"] is None else point["median_lead_share"],
        ),
        default=None,
    )
