"""The trainer's log as rules read it: its start and its end, whatever lies between.

A rule is asked at every step of a run that may have millions: it must not read all of the log each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from scipy.special import stdtrit

from align_audit.record.training_log import LogRow, up_to

_START = 2000
"""Rows in which the start of a column is looked for: evaluations come late."""
_END = 400
"""Rows of the end that are looked at."""
_EVALUATED = "eval_"
"""What columns of an evaluation begin with."""
_END_OF_EVALUATIONS = 10_000
"""Rows of the end in which the last value of an evaluation is looked for: many rows of training come between two of them."""


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
        row = self._last_row(column)
        return None if row is None else row.logs[column]

    def last(self, column: str, count: int) -> list[float]:
        """The values logged last, oldest first; fewer where there are not so many."""
        return [row.logs[column] for row in self.rows[-_END:] if column in row.logs][-count:]

    def window(self, column: str, steps: int, least: int = 1) -> list[float] | None:
        """What was logged over the last ``steps`` steps: the values of :meth:`window_rows`."""
        rows = self.window_rows(column, steps, least)
        return None if rows is None else [value for _, value in rows]

    def window_rows(self, column: str, steps: int, least: int = 1) -> list[tuple[int, float]] | None:
        """Step and value of what was logged over the last ``steps`` steps, oldest first.

        They are counted back from the column's own last row: what other rows come between, of an evaluation say, must not
        change what is in the window.

        Args:
            least: so many rows belong to it at least, however rarely the column is logged.

        Returns:
            None: nothing was logged, the column is not so old yet, or it is not logged any more.
        """
        rows = [(row.step, row.logs[column]) for row in self.rows[-_END:] if column in row.logs]
        first = self._first_step(column)
        if len(rows) < least or first is None:
            return None
        last = rows[-1][0]
        apart = last - rows[-2][0] if len(rows) > 1 else 0
        if last - first < steps - 1 or self.step - last > max(steps, apart):
            return None
        within = sum(step > last - steps for step, _ in rows)
        return rows[-max(within, least) :]

    def _last_row(self, column: str) -> LogRow | None:
        """That a column was logged in last, as far as that is looked for."""
        back = _END_OF_EVALUATIONS if column.startswith(_EVALUATED) else _END
        return next((row for row in islice(reversed(self.rows), back) if column in row.logs), None)

    def _first_step(self, column: str) -> int | None:
        """At which a column was logged first, as far as that is looked for."""
        return next((row.step for row in islice(self.rows, _START) if column in row.logs), None)

    def recent(self, column: str, until: int | None = None) -> list[float]:
        """What was logged over the last rows (``until``: up to that step), oldest first, without what is not finite."""
        last = self.step if until is None else until
        return [
            value
            for row in self.rows[-_END:]
            if row.step <= last and math.isfinite(value := row.logs.get(column, math.nan))
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
        if column.startswith(_EVALUATED):
            last = self._last_row(column)
            begin = next((row for row in islice(self.rows, _START) if column in row.logs), None)
            if last is None or begin is None or last.step <= begin.step:
                return None
            return last.logs[column], begin.logs[column]
        first, rows = self._first_step(column), self.window_rows(column, steps)
        if rows is None or first is None or rows[-1][0] - first < 2 * steps - 1:
            return None
        return mean([value for _, value in rows]), self.start(column, steps)


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN of none, and where one of them is not finite."""
    return sum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def upper_bound(values: Sequence[float], confidence: float = 0.95) -> float:
    """The upper end of Student's interval of their mean, two-sided; NaN of fewer than two, and where one is not finite.

    Example:
        >>> round(upper_bound([-0.3, -0.1, -0.2]), 3)
        0.048
    """
    middle, count = mean(values), len(values)
    if count < 2 or not math.isfinite(middle):
        return math.nan
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (count - 1) / count)
    return middle + float(stdtrit(count - 1, (1 + confidence) / 2)) * spread
