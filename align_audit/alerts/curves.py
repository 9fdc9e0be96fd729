"""The trainer's log as rules read it: its start and its end, whatever lies between.

A rule is asked at every step of a run that may have millions: it must not read all of the log each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from align_audit.record.training_log import LogRow, up_to

_START = 2000
"""Rows in which the start of a column is looked for: evaluations come late."""
_END = 400
"""Rows of the end that are looked at."""


@dataclass(frozen=True)
class TrainerLog:
    """Rows of one course, by step."""

    rows: Sequence[LogRow] = ()

    def until(self, step: int) -> TrainerLog:
        """Up to a step, with it."""
        return TrainerLog(up_to(self.rows, step))

    @property
    def step(self) -> int:
        """Of the last row; -1: there is none."""
        return self.rows[-1].step if self.rows else -1

    def latest(self, column: str) -> float | None:
        """The value logged last."""
        return next((row.logs[column] for row in reversed(self.rows[-_END:]) if column in row.logs), None)

    def last(self, column: str, count: int) -> list[float]:
        """The values logged last, oldest first; fewer where there are not so many."""
        return [row.logs[column] for row in self.rows[-_END:] if column in row.logs][-count:]

    def window(self, column: str, steps: int) -> list[float] | None:
        """What was logged over the last ``steps`` steps; None: nothing, or the column is not so old yet."""
        first = next((row.step for row in islice(self.rows, _START) if column in row.logs), None)
        values = [row.logs[column] for row in self.rows[-_END:] if column in row.logs and row.step > self.step - steps]
        return values if values and first is not None and self.step - first >= steps - 1 else None

    def recent(self, column: str, before: int | None = None) -> list[float]:
        """What was logged over the last rows (``before``: up to that step), oldest first, without what is not finite."""
        until = self.step if before is None else before
        return [
            value
            for row in self.rows[-_END:]
            if row.step <= until and math.isfinite(value := row.logs.get(column, math.nan))
        ]

    def start(self, column: str, steps: int) -> float:
        """The mean over the first ``steps`` steps of a column, NaN where it has none or it is no number."""
        first: int | None = None
        values: list[float] = []
        for row in islice(self.rows, _START):
            if column in row.logs:
                first = row.step if first is None else first
                if row.step >= first + steps:
                    break
                values.append(row.logs[column])
        return mean(values)

    def against_start(self, column: str, steps: int) -> tuple[float, float] | None:
        """A column's mean over the last ``steps`` steps and over its first; None before the two are apart.

        Of an evaluation's column (``eval_…``) the last value and the first, which are means over many pairs already.
        """
        if column.startswith("eval_"):
            values = [
                (row.step, row.logs[column])
                for row in (*islice(self.rows, _START), *self.rows[-_END:])
                if column in row.logs
            ]
            return (values[-1][1], values[0][1]) if values and values[-1][0] > values[0][0] else None
        first = next((row.step for row in islice(self.rows, _START) if column in row.logs), None)
        now = self.window(column, steps)
        if now is None or first is None or self.step - first < 2 * steps - 1:
            return None
        return mean(now), self.start(column, steps)


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN of none."""
    return sum(values) / len(values) if values else math.nan
