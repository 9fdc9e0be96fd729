"""Intervals over probe pairs (METHODS §2).

Pairs are the only thing resampled: all columns of a call see the same resampled pairs, so that differences between
layers keep their correlation. Every random draw comes from a local generator made from ``seed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
from scipy.special import ndtr, ndtri

Array = np.ndarray
Method = Literal["percentile", "bca"]


class Value(NamedTuple):
    """A number without an interval; NaN with a ``reason`` when it cannot be known."""

    value: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Self:
        """NaN, for that reason."""
        return cls(math.nan, reason)


@dataclass(frozen=True)
class Interval:
    """An estimate over pairs with its confidence interval; what is NaN in it is explained by ``reason``."""

    mean: float
    low: float
    high: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Self:
        """NaN, for that reason."""
        return cls(math.nan, math.nan, math.nan, reason)


def resample_indices(n: int, resamples: int, seed: int) -> Array:
    """Bootstrap draws of ``n`` pairs with replacement.

    Returns:
        int64 ``[resamples, n]``, entries in [0, n). The same for the same arguments, whatever else drew numbers before.

    Raises:
        ValueError: ``n`` or ``resamples`` is below 1.

    Example:
        >>> resample_indices(4, 2, seed=0).tolist()
        [[3, 2, 2, 1], [1, 0, 0, 0]]
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"expected at least 1 pair and 1 resample, found n={n}, resamples={resamples}")
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def mean_interval(
    values: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` ``[N]`` with its bootstrap interval; see :func:`mean_intervals`.

    Example:
        >>> interval = mean_interval(np.arange(10.0))
        >>> [round(float(x), 2) for x in (interval.mean, interval.low, interval.high)]
        [4.5, 2.7, 6.4]
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"expected one value per pair, shape [N]; found shape {list(values.shape)}")
    return mean_intervals(values[:, None], resamples, confidence, method, seed)[0]


def mean_intervals(
    values: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> list[Interval]:
    """Column means with bootstrap intervals over pairs, the same resampled pairs for every column.

    ``percentile``: the (1 ∓ confidence)/2 quantiles of the resampled means. ``bca``: the same quantiles shifted by the
    bias correction z₀ and the jackknife acceleration a (Efron 1987).

    Args:
        values: ``[N, L]``, in any unit; the result has the same.

    Returns:
        L intervals. A column with a value that is not finite is NaN throughout. With fewer than 2 pairs the mean is
        kept and its bounds are NaN. A column whose values are all equal has low = high = mean, exactly.

    Raises:
        ValueError: wrong shape, method, confidence or number of resamples.

    Example:
        >>> [interval.low for interval in mean_intervals(np.zeros((8, 2)))]
        [0.0, 0.0]
    """
    values = per_pair_values(values)
    intervals = statistic_intervals(values, lambda means: means, resamples, confidence, method, seed)
    bad = (~np.isfinite(values)).sum(axis=0)
    n = len(values)
    return [
        Interval.unknown(f"{count} of {n} values are not finite") if count else interval
        for count, interval in zip(bad.tolist(), intervals, strict=True)
    ]


def share_interval(hits: Array, confidence: float = 0.95) -> Interval:
    """Share of pairs for which something holds, with Wilson's score interval (Wilson 1927, doi:10.2307/2276774).

    The bootstrap cannot do this near 0 or 1: 64 pairs that all agree resample to 1 whatever the truth (measured by
    ``benchmarks/evidence/interval_coverage.py``: an interval of [1, 1] in 72 % of draws where the truth is 0.99).

    Args:
        hits: ``[N]``, 1 or True where it holds, 0 where not, NaN where that is not known.

    Returns:
        mean and bounds in [0, 1]; NaN with a reason where a value is not known or there are no pairs, and NaN bounds
        with one pair.

    Raises:
        ValueError: not one-dimensional, or a value that is neither 0, 1 nor NaN.

    Example:
        >>> interval = share_interval(np.ones(64))
        >>> [round(float(x), 3) for x in (interval.mean, interval.low, interval.high)]
        [1.0, 0.943, 1.0]
    """
    hits = np.asarray(hits, dtype=np.float64)
    bad = ~np.isfinite(hits)
    if hits.ndim != 1 or not np.isin(hits[~bad], (0.0, 1.0)).all():
        raise ValueError(f"expected 0, 1 or NaN for each pair, shape [N]; found shape {list(hits.shape)}")
    check_options(confidence=confidence)
    n = len(hits)
    if bad.any():
        return Interval.unknown(f"{int(bad.sum())} of {n} values are not finite")
    if n < 2:
        few = f"an interval needs at least 2 pairs, found {n}"
        return Interval(float(hits[0]), math.nan, math.nan, few) if n else Interval.unknown(few)
    share, z2 = float(hits.mean()), float(ndtri((1 + confidence) / 2)) ** 2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, 0.0 if share == 0.0 else center - half, 1.0 if share == 1.0 else center + half)


def ratio_interval(
    numerator: Array,
    denominator: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    denominator_name: str = "the denominator",
) -> Interval:
    """Σ numerator / Σ denominator over pairs, ``[N]`` each; see :func:`ratio_intervals`.

    Example:
        >>> ratio_interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])).high
        0.5
    """
    numerator = np.asarray(numerator, dtype=np.float64)
    if numerator.ndim != 1:
        raise ValueError(f"expected one numerator per pair, shape [N]; found shape {list(numerator.shape)}")
    return ratio_intervals(
        numerator[:, None], denominator, resamples, confidence, method, seed, denominator_name=denominator_name
    )[0]


def ratio_intervals(
    numerators: Array,
    denominator: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    denominator_name: str = "the denominator",
) -> list[Interval]:
    """Ratios of sums Σᵢ numeratorᵢ / Σᵢ denominatorᵢ with bootstrap intervals (METHODS §1, recovery).

    A pair enters numerator and denominator together. Where the interval of the mean denominator includes 0, or cannot
    be known, the ratio means nothing: NaN with that reason.

    Args:
        numerators: ``[N, L]``.
        denominator: ``[N]``.
        denominator_name: how the reason calls it, ``"margin shift"`` say.

    Returns:
        L intervals, without unit.

    Raises:
        ValueError: wrong shapes, or as :func:`mean_intervals`.

    Example:
        >>> ratio_intervals(np.ones((3, 1)), np.array([-1.0, 0.0, 1.0]), denominator_name="margin shift")[0].reason
        'the 95% interval of mean margin shift, [-1, 1], includes 0'
    """
    numerators = per_pair_values(numerators)
    denominator = np.asarray(denominator, dtype=np.float64)
    if denominator.shape != (len(numerators),):
        raise ValueError(
            f"expected one denominator per pair, shape [{len(numerators)}]; found shape {list(denominator.shape)}"
        )
    intervals = statistic_intervals(
        np.column_stack([numerators, denominator]),
        lambda means: means[..., :-1] / means[..., -1:],
        resamples,
        confidence,
        method,
        seed,
        guard=-1,
        guard_name=denominator_name,
    )
    bad = (~np.isfinite(numerators)).sum(axis=0)
    n = len(numerators)
    return [
        Interval.unknown(f"{count} of {n} numerators are not finite") if count and np.isfinite(denominator).all() else i
        for count, i in zip(bad.tolist(), intervals, strict=True)
    ]


def statistic_intervals(
    per_pair: Array,
    statistic: Callable[[Array], Array],
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    guard: int | None = None,
    guard_name: str = "the denominator",
) -> list[Interval]:
    """Bootstrap intervals of any function of column means: layer gains, additivity, fractions of effects.

    Args:
        per_pair: ``[N, C]``.
        statistic: column means ``[..., C]`` → K statistics ``[..., K]``, vectorized over the leading axes. It is called
            once on the means, once on all resampled means and, for ``bca``, once on the leave-one-out means. NumPy's
            floating-point warnings are off while it runs.
        guard: a column whose mean the statistic divides by: where the interval of that mean includes 0, or cannot be
            known, every result is NaN with that reason.

    Returns:
        K intervals; ``mean`` is the statistic of the column means. NaN, with a reason: where the statistic is not
        finite, and (the bounds only) with fewer than 2 pairs or where a resample gives no finite value.

    Raises:
        ValueError: wrong shape, method, confidence, guard or number of resamples; or the statistic returns another
            shape than ``[..., K]``.

    Example:
        Gains from cumulative recoveries, which share their denominator (last column).

        >>> pairs = np.array([[1.0, 3.0, 4.0], [3.0, 5.0, 8.0], [2.0, 4.0, 6.0]])
        >>> gain = lambda m: (m[..., 1:2] - m[..., 0:1]) / m[..., 2:3]
        >>> interval = statistic_intervals(pairs, gain, guard=2)[0]
        >>> [round(float(x), 3) for x in (interval.mean, interval.low, interval.high)]
        [0.333, 0.25, 0.5]
    """
    values = per_pair_values(per_pair)
    n, columns = values.shape
    check_options(resamples, confidence, method)
    if guard is not None and not -columns <= guard < columns:
        raise ValueError(f"expected a guard among the {columns} columns, found {guard}")

    bad = (~np.isfinite(values)).sum(axis=0)
    values = np.where(bad > 0, np.nan, values)
    means = column_means(values)
    with np.errstate(all="ignore"):
        estimates = np.asarray(statistic(means), dtype=np.float64)
    if estimates.ndim != 1:
        raise ValueError(f"expected the statistic to map [..., C] to [..., K]; found {list(estimates.shape)} for [C]")

    if guard is not None:
        if bad[guard]:
            divisor = Interval.unknown(f"{bad[guard]} of {n} values are not finite")
        else:
            divisor = mean_interval(values[:, guard], resamples, confidence, method, seed)
        reason = _no_denominator(divisor, confidence, guard_name)
        if reason is not None:
            return [Interval.unknown(reason)] * len(estimates)
    if n < 2:
        few = f"an interval needs at least 2 pairs, found {n}"
        return [Interval(float(e), math.nan, math.nan, few) if n else Interval.unknown(few) for e in estimates]

    resampled = resampled_means(values, means, resamples, seed)
    leave_one_out = values[:0]
    if method == "bca":
        # Around the mean, so that columns of equal values stay exactly equal.
        leave_one_out = means - (values - means) / (n - 1)
    with np.errstate(all="ignore"):
        bootstrap = np.asarray(statistic(resampled), dtype=np.float64)
        jackknife = np.asarray(statistic(leave_one_out), dtype=np.float64)
    if bootstrap.shape != (resamples, len(estimates)):
        raise ValueError(
            f"expected the statistic to map [{resamples}, {columns}] to [{resamples}, {len(estimates)}]; "
            f"found {list(bootstrap.shape)}"
        )
    return [
        _interval(float(estimates[k]), bootstrap[:, k], jackknife[:, k], confidence, method, int(bad.sum()))
        for k in range(len(estimates))
    ]


def per_pair_values(values: Array) -> Array:
    """``values`` as float64 ``[N, C]``, a row per pair.

    Raises:
        ValueError: they have another number of dimensions.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"expected one row of values per pair, shape [N, columns]; found shape {list(values.shape)}")
    return values


def check_options(resamples: int = 1, confidence: float = 0.95, method: str = "percentile") -> None:
    """Refuse what no bootstrap interval can be made with.

    Raises:
        ValueError: fewer than 1 resample, a confidence outside (0, 1), or no method of that name.
    """
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, found {resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"expected a confidence between 0 and 1, such as 0.95; found {confidence}")
    if method not in ("percentile", "bca"):
        raise ValueError(f"expected method 'percentile' or 'bca', found {method!r}")


def column_means(values: Array) -> Array:
    """Column means ``[C]``, exactly the common value where all values of a column are equal; NaN without rows."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    equal = (values == values[0]).all(axis=0)
    means: Array = np.where(equal, values[0], values.mean(axis=0))
    return means


def resampled_means(values: Array, means: Array, resamples: int, seed: int) -> Array:
    """Column means of bootstrap resamples ``[resamples, C]``, as one product with the counts of every pair.

    Args:
        values: ``[N, C]``, N ≥ 1.
        means: ``[C]``, of :func:`column_means`, which a column of equal values keeps in every resample, exactly.
    """
    n = len(values)
    indices = resample_indices(n, resamples, seed)
    flat = (indices + n * np.arange(resamples)[:, None]).ravel()
    counts = np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)
    resampled: Array = counts @ values / n
    equal = (values == values[0]).all(axis=0)
    resampled[:, equal] = means[equal]
    return resampled


def _no_denominator(mean: Interval, confidence: float, name: str) -> str | None:
    """Why nothing can be divided by a mean with this interval, if so."""
    if math.isnan(mean.low) or math.isnan(mean.high):
        return f"the interval of mean {name} is unknown: {mean.reason}"
    if mean.low <= 0.0 <= mean.high:
        return f"the {100 * confidence:g}% interval of mean {name}, [{mean.low:.4g}, {mean.high:.4g}], includes 0"
    return None


def _interval(
    estimate: float, bootstrap: Array, jackknife: Array, confidence: float, method: Method, bad: int
) -> Interval:
    if not math.isfinite(estimate):
        because = f": {bad} of the values per pair are not" if bad else ""
        return Interval.unknown(f"the statistic is not finite{because}")
    if (bootstrap == estimate).all():
        return Interval(estimate, estimate, estimate)
    lost = int((~np.isfinite(bootstrap)).sum())
    if lost:
        reason = f"{lost} of {len(bootstrap)} resamples give no finite value"
        return Interval(estimate, math.nan, math.nan, reason)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        # Efron 1987; ties with the estimate count half.
        below = ((bootstrap < estimate).sum() + (bootstrap <= estimate).sum()) / (2 * len(bootstrap))
        influence = jackknife.mean() - jackknife
        spread = (influence**2).sum() ** 1.5
        if not 0.0 < below < 1.0 or not (np.isfinite(spread) and spread > 0.0):
            reason = "BCa is undefined here: all resamples lie on one side, or leaving one pair out changes nothing"
            return Interval(estimate, math.nan, math.nan, reason)
        z0 = ndtri(below)
        acceleration = (influence**3).sum() / (6 * spread)
        shifted = z0 + ndtri(tails)
        tails = ndtr(z0 + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(bootstrap, tails)
    return Interval(estimate, float(low), float(high))
