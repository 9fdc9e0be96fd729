"""Whether an effect over probe pairs is more than chance: p-values, false discoveries and agreement (METHODS §2).

Random draws come from a local generator made from ``seed``.
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtr

from align_audit.measures.interval import Value
from align_audit.measures.resampling import (
    BOOTSTRAP_FROM,
    Groups,
    column_means,
    influences,
    leave_one_out_means,
    resampled_means,
    standard_errors,
    studentized,
)
from align_audit.measures.statistics import check_options, per_pair_values

Array = np.ndarray


def mean_p_values(values: Array, resamples: int = 1000, seed: int = 0, groups: Array | None = None) -> Array:
    """Two-sided p-values of mean ≠ 0, the counterpart of the intervals (METHODS §2).

    From 32 groups p = min(1, 2 · (1 + min(#{m* ≤ 0}, #{m* ≥ 0})) / (1 + resamples)) over resampled means m*; the +1 counts the
    data themselves, so that p is never 0. Of 8 to 31 groups the larger of Student's, with the jackknife's standard error, and
    of the studentized bootstrap's, p = min(1, 2 · (1 + min(#{t* ≤ t}, #{t* ≥ t})) / (1 + resamples)).

    Args:
        values: ``[N, L]``.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        float64 ``[L]`` in [0, 1]; 1 where all values are 0. NaN for a column with fewer than 8 groups or a value that is not
        finite.

    Raises:
        ValueError: wrong shape or number of resamples.

    Example:
        >>> mean_p_values(np.array([[1.0, -1.0], [2.0, 1.0], [1.5, 0.0], [1.0, 0.0]] * 8), resamples=99).tolist()
        [0.02, 1.0]
    """
    values = per_pair_values(values)
    check_options(resamples)
    together = Groups.of(groups, len(values))
    if together.too_few() is not None:
        return np.full(values.shape[1], np.nan)
    finite = np.isfinite(values).all(axis=0)
    values = np.where(finite, values, 0.0)
    means = column_means(values)
    if together.count >= BOOTSTRAP_FROM:
        resampled = resampled_means(values, means, resamples, seed, groups)
        fewer = np.minimum((resampled <= 0).sum(axis=0), (resampled >= 0).sum(axis=0))
        return np.where(finite, np.minimum(1.0, 2.0 * (1 + fewer) / (1 + resamples)), np.nan)
    error = standard_errors(values, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(means == 0.0, 0.0, means / error)
    without = leave_one_out_means(values, means, groups)
    drawn = studentized(influences(without), resamples, seed)
    fewer = np.minimum((drawn <= t).sum(axis=0), (drawn >= t).sum(axis=0))
    student = 2.0 * stdtr(together.count - 1, -np.abs(t))
    resampled_p = np.where(t == 0.0, 1.0, np.minimum(1.0, 2.0 * (1 + fewer) / (1 + resamples)))
    return np.where(finite, np.maximum(student, resampled_p), np.nan)


def benjamini_hochberg(p: Array) -> Array:
    """P-values adjusted for the false discovery rate over layers (Benjamini & Hochberg 1995).

    Sorted ascending, p_(j) becomes min over k ≥ j of p_(k) · m / k, at most 1. NaNs stay NaN and do not count in m.

    Args:
        p: ``[L]``.

    Raises:
        ValueError: wrong shape, or a value outside [0, 1].

    Example:
        >>> benjamini_hochberg(np.array([0.01, 0.04, np.nan, 0.03])).round(3).tolist()
        [0.03, 0.04, nan, 0.04]
    """
    p = np.asarray(p, dtype=np.float64)
    finite = np.isfinite(p)
    if p.ndim != 1 or np.any(np.isinf(p)) or np.any((p[finite] < 0) | (p[finite] > 1)):
        raise ValueError(f"expected p-values in [0, 1] or NaN, shape [L]; found {p.tolist()}")
    adjusted = np.full(p.shape, np.nan)
    if finite.any():
        from scipy.stats import false_discovery_control  # takes longer to load than all else that is read here

        adjusted[finite] = false_discovery_control(p[finite])
    return adjusted


def split_half_agreement(values: Array, repeats: int = 100, seed: int = 0, groups: Array | None = None) -> Value:
    """Share of random half splits of the pairs whose halves have their largest column mean in the same layer.

    Args:
        values: ``[N, L]``, block transplants say. The halves have ⌊G/2⌋ and ⌈G/2⌉ of G groups.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        A share in [0, 1]; a half in which several layers tie for the largest mean agrees with none. By chance alone
        about 1/L. NaN with a reason: fewer than 4 groups, one layer, a value that is not finite, no single peak over
        all pairs (identical models).

    Raises:
        ValueError: wrong shape, or ``repeats`` below 1.

    Example:
        >>> split_half_agreement(np.array([[0.0, 2.0, 1.0]] * 6)).value
        1.0
    """
    values = per_pair_values(values)
    together = Groups.of(groups, len(values))
    n, layers = together.count, values.shape[1]
    if repeats < 1:
        raise ValueError(f"expected at least 1 split, found repeats={repeats}")
    if n < 4:
        return Value.unknown(f"half splits need at least 4 independent pairs, found {n}")
    if layers < 2:
        return Value.unknown(f"a peak among layers needs at least 2 of them, found {layers}")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        return Value.unknown(f"{bad} of {values.size} values are not finite")
    if _peak(column_means(values)) is None:
        return Value.unknown("no peak to agree on: several layers share the largest mean")
    generator = np.random.default_rng(seed)
    agreements = 0
    for _ in range(repeats):
        order = generator.permutation(n)
        halves = together.rows(order[: n // 2]), together.rows(order[n // 2 :])
        first, second = (_peak(column_means(values[half])) for half in halves)
        agreements += first is not None and first == second
    return Value(agreements / repeats)


def _peak(means: Array) -> int | None:
    """The one column with the largest mean; None where several share it."""
    peak = int(np.argmax(means))
    return peak if (means == means[peak]).sum() == 1 else None
