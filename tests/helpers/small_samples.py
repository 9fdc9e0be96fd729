"""Intervals and p-values of 8 to 31 groups, by plain loops: Student's and the studentized bootstrap's, the wider of both.

Nothing is shared with ``align_audit`` but the draws, of NumPy's generator made from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def jackknife_error(without: Sequence[float]) -> float:
    """Standard error of a statistic from its values without each group in turn."""
    count, center = len(without), math.fsum(without) / len(without)
    return math.sqrt((count - 1) / count * math.fsum((value - center) ** 2 for value in without))


def studentized_draws(without: Sequence[float], resamples: int, seed: int) -> list[float]:
    """t of each resample of the groups' influences, ascending: their mean over the error of that mean within the resample."""
    count, center = len(without), math.fsum(without) / len(without)
    influence = [(count - 1) * (center - value) for value in without]
    drawn = []
    for row in np.random.default_rng(seed).integers(0, count, size=(resamples, count)):
        values = [influence[group] for group in row]
        mean, error = math.fsum(values) / count, np.std(values, ddof=1) / math.sqrt(count)
        drawn.append(
            0.0 if mean == 0.0 else float(mean / error) if len(set(row)) > 1 else math.copysign(math.inf, mean)
        )
    return sorted(drawn)


def hull(estimate: float, without: Sequence[float], confidence: float, resamples: int, seed: int) -> list[float]:
    """Lower and upper bound; no t counts as more than Student's with one degree of freedom."""
    tail, error = (1 - confidence) / 2, jackknife_error(without)
    drawn = [t for t in studentized_draws(without, resamples, seed) if math.isfinite(t)]
    t, most = stats.t.ppf(1 - tail, len(without) - 1), stats.t.ppf(1 - tail, 1)
    upper_t = drawn[math.ceil(round((1 - tail) * len(drawn), 6)) - 1]
    lower_t = drawn[math.ceil(round(tail * len(drawn), 6)) - 1]
    return [estimate - min(max(t, upper_t), most) * error, estimate + min(max(t, -lower_t), most) * error]


def p_value(mean: float, without: Sequence[float], resamples: int, seed: int) -> float:
    """Two-sided, of a mean of 0."""
    t = mean / jackknife_error(without)
    drawn = studentized_draws(without, resamples, seed)
    fewer = min(sum(value <= t for value in drawn), sum(value >= t for value in drawn))
    return max(2 * stats.t.sf(abs(t), len(without) - 1), min(1.0, 2 * (1 + fewer) / (1 + resamples)))


def without_each(values: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """Means of values [N] without each group in turn, groups ascending."""
    groups = np.arange(len(values)) if groups is None else groups
    return [float(np.mean(values[groups != group])) for group in np.unique(groups)]
