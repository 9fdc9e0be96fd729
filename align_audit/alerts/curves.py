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

    def beside(self, column: str, wanted: str) -> float | None:
        """The value of another column in the row in which this one was logged last."""
        row = self._last_row(column)
        return None if row is None else row.logs.get(wanted)

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

    def first_rows(self, column: str, steps: int, least: int = 1) -> list[tuple[int, float]]:
        """Step and value of what was logged over the first ``steps`` steps of a column, and of ``least`` rows at least."""
        rows: list[tuple[int, float]] = []
        for row in islice(self.rows, _START):
            if column in row.logs:
                if len(rows) >= least and row.step >= rows[0][0] + steps:
                    break
                rows.append((row.step, row.logs[column]))
        return rows

    def against_start(self, column: str, steps: int, least: int = 1) -> tuple[list[float], list[float]] | None:
        """The values of a column over its last ``steps`` steps and over its first (``least`` rows at least); None before the
        two are apart.

        Of an evaluation's column (``eval_…``) the last one and the first, which are means over many pairs already.
        """
        if column.startswith(_EVALUATED):
            last = self._last_row(column)
            begin = next((row for row in islice(self.rows, _START) if column in row.logs), None)
            if last is None or begin is None or last.step <= begin.step:
                return None
            return [last.logs[column]], [begin.logs[column]]
        rows, first = self.window_rows(column, steps, least), self.first_rows(column, steps, least)
        if rows is None or not first or rows[-1][0] - first[0][0] < 2 * steps - 1 or rows[0][0] <= first[-1][0]:
            return None
        return [value for _, value in rows], [value for _, value in first]


def mean(values: Sequence[float]) -> float:
    """Their mean; NaN of none, and where one of them is not finite."""
    return sum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def upper_bound(values: Sequence[float]) -> float:
    """The upper end of Student's 95 % interval of their mean, two-sided; NaN of fewer than two, and where one is not finite.

    Example:
        >>> round(upper_bound([-0.3, -0.1, -0.2]), 3)
        0.048
    """
    return mean(values) + _student(len(values) - 1) * math.sqrt(_squared_error(values))


def are_apart(late: Sequence[float], early: Sequence[float], ratio: float) -> bool:
    """Whether the mean of late rows differs from that of early ones, times ``ratio``, by more than rows waver: Welch's test at
    95 %, two-sided. Of single values, nothing is known of that, and any difference counts.

    Example:
        >>> are_apart([-131.0, -133.0, -132.0], [-100.0, -101.0, -99.0], 1.3)
        False
        >>> are_apart([-151.0, -153.0, -152.0], [-100.0, -101.0, -99.0], 1.3)
        True
    """
    apart = abs(mean(late) - ratio * mean(early))
    if len(late) < 2 or len(early) < 2:
        return apart > 0
    errors = _squared_error(late), ratio**2 * _squared_error(early)
    squared = sum(errors)
    if squared == 0:
        return apart > 0
    degrees = squared**2 / (errors[0] ** 2 / (len(late) - 1) + errors[1] ** 2 / (len(early) - 1))
    return apart > _student(degrees) * math.sqrt(squared)


def _squared_error(values: Sequence[float]) -> float:
    """The square of the standard error of their mean; NaN of fewer than two."""
    middle, count = mean(values), len(values)
    return sum((value - middle) ** 2 for value in values) / (count - 1) / count if count > 1 else math.nan


def _student(degrees: float) -> float:
    """Standard errors from a mean to the end of its 95 % interval."""
    return float(stdtrit(degrees, 0.975))
