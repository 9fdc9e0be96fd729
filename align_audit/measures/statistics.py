"""Intervals over probe pairs (METHODS §2).

Groups of pairs that share a prompt are the only thing resampled (``groups``, one name a pair; None: every pair is a group of
its own), and all columns of a call see the same ones, so that differences between layers keep their correlation.

- Fewer than 8 groups: no interval.
- From 8 to 31: from the lower of the lower bounds to the upper of the upper ones of two intervals with the jackknife's
  standard error s (a group is left out at a time): Student's, estimate ± t · s with G − 1 degrees of freedom, and the
  studentized bootstrap's (Efron & Tibshirani 1993, ch. 12), whose t are those of resamples of the groups' influences. Where
  values are skewed Student's alone covers 90 % of the time, where they are not the other is the shorter.
- From 32: the bootstrap's, percentile or BCa, whose tails are widened as the percentile interval of a mean needs it
  (Hesterberg 2015, doi:10.1080/00031305.2015.1089789): Φ(−√(G/(G−1)) · t) in place of (1 − confidence)/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

from align_audit.measures.interval import Interval
from align_audit.measures.resampling import (
    BOOTSTRAP_FROM,
    Groups,
    column_means,
    influences,
    leave_one_out_means,
    resampled_means,
    studentized,
    widened_tail,
)

Array = np.ndarray
Method = Literal["percentile", "bca"]


def mean_interval(
    values: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    groups: Array | None = None,
) -> Interval:
    """Mean of ``values`` ``[N]`` with its bootstrap interval; see :func:`mean_intervals`.

    Example:
        >>> interval = mean_interval(np.arange(10.0))
        >>> [round(float(x), 2) for x in (interval.mean, interval.low, interval.high)]
        [4.5, 2.33, 6.68]
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"expected one value per pair, shape [N]; found shape {list(values.shape)}")
    return mean_intervals(values[:, None], resamples, confidence, method, seed, groups)[0]


def mean_intervals(
    values: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    groups: Array | None = None,
) -> list[Interval]:
    """Column means with bootstrap intervals over pairs, the same resampled pairs for every column.

    ``percentile``: widened (1 ∓ confidence)/2 quantiles of the resampled means. ``bca``: the same quantiles shifted by the
    bias correction z₀ and the jackknife acceleration a (Efron 1987). Fewer than 32 groups: Student's and the
    studentized bootstrap's, with either.

    Args:
        values: ``[N, L]``, in any unit; the result has the same.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        L intervals. A column with a value that is not finite is NaN throughout. With fewer than 8 groups the mean is
        kept and its bounds are NaN. A column whose values are all equal has low = high = mean, exactly.

    Raises:
        ValueError: wrong shape, method, confidence or number of resamples.

    Example:
        >>> [interval.low for interval in mean_intervals(np.zeros((8, 2)))]
        [0.0, 0.0]
    """
    values = per_pair_values(values)
    intervals = statistic_intervals(values, lambda means: means, resamples, confidence, method, seed, groups=groups)
    bad = (~np.isfinite(values)).sum(axis=0)
    n = len(values)
    return [
        Interval.unknown(f"{count} of {n} values are not finite") if count else interval
        for count, interval in zip(bad.tolist(), intervals, strict=True)
    ]


def share_interval(hits: Array, confidence: float = 0.95, groups: Array | None = None) -> Interval:
    """Share of pairs for which something holds, with Wilson's score interval (Wilson 1927, doi:10.2307/2276774).

    Next to 0 and 1 its outer bound comes from the Poisson distribution (Brown, Cai & DasGupta 2001, §4.1.1,
    doi:10.1214/ss/1009213286): with one, two or (from 51 pairs) three hits, or misses, Wilson's alone covers as little as 84 %.

    The bootstrap cannot do this near 0 or 1: 64 pairs that all agree resample to 1 whatever the truth (measured by
    ``benchmarks/evidence/interval_coverage.py``: an interval of [1, 1] in 72 % of draws where the truth is 0.99).

    Of pairs that share prompts the sample size is that of as many independent pairs as give the share the same variance
    over groups: at most N, at least N² / Σ size², which is what they are worth if a group's pairs all say the same.

    Args:
        hits: ``[N]``, 1 or True where it holds, 0 where not, NaN where that is not known.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        mean and bounds in [0, 1]; NaN with a reason where a value is not known or there are no pairs, and NaN bounds
        with fewer than 8 groups.

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
    together = Groups.of(groups, n)
    few = together.too_few()
    if few is not None:
        return Interval(float(hits.mean()), math.nan, math.nan, few) if n else Interval.unknown(few)
    share, z2 = float(hits.mean()), float(ndtri((1 + confidence) / 2)) ** 2
    worth = _independent(hits, share, together)
    center = (share + z2 / (2 * worth)) / (1 + z2 / worth)
    half = math.sqrt(z2 * (share * (1 - share) / worth + z2 / (4 * worth * worth))) / (1 + z2 / worth)
    low, high = center - half, center + half
    rare = (3 if worth > 50 else 2) + 1e-9  # (1 − 38/40) · 40 is 2, but for its last bits
    if 0.0 < share * worth <= rare:
        low = float(gammaincinv(share * worth, 1 - confidence)) / worth
    if 0.0 < (1 - share) * worth <= rare:
        high = 1.0 - float(gammaincinv((1 - share) * worth, 1 - confidence)) / worth
    return Interval(share, 0.0 if share == 0.0 else low, 1.0 if share == 1.0 else high)


def _independent(hits: Array, share: float, groups: Groups) -> float:
    """How many independent pairs give the share of ``hits`` the variance that it has over the groups."""
    n = len(hits)
    if groups.alone:
        return float(n)
    least = n**2 / float(np.square(groups.sizes).sum())
    spread = groups.sums((hits - share)[:, None])
    variance = float(np.square(spread).sum()) * groups.count / (groups.count - 1) / n**2
    return min(max(share * (1 - share) / variance, least), n) if variance > 0.0 else least


def ratio_interval(
    numerator: Array,
    denominator: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    denominator_name: str = "the denominator",
    groups: Array | None = None,
) -> Interval:
    """Σ numerator / Σ denominator over pairs, ``[N]`` each; see :func:`ratio_intervals`.

    Example:
        >>> ratio_interval(np.arange(1.0, 9.0), 2 * np.arange(1.0, 9.0)).high
        0.5
    """
    numerator = np.asarray(numerator, dtype=np.float64)
    if numerator.ndim != 1:
        raise ValueError(f"expected one numerator per pair, shape [N]; found shape {list(numerator.shape)}")
    return ratio_intervals(
        numerator[:, None], denominator, resamples, confidence, method, seed, denominator_name, groups
    )[0]


def ratio_intervals(
    numerators: Array,
    denominator: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
    denominator_name: str = "the denominator",
    groups: Array | None = None,
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
        >>> ratio_intervals(np.ones((8, 1)), np.array([-1.0, 1.0] * 4), denominator_name="margin shift")[0].reason
        'the 95% interval of mean margin shift, [-1.134, 1.134], includes 0'
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
        groups=groups,
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
    groups: Array | None = None,
) -> list[Interval]:
    """Bootstrap intervals of any function of column means: layer gains, additivity, fractions of effects.

    Args:
        per_pair: ``[N, C]``.
        statistic: column means ``[..., C]`` → K statistics ``[..., K]``, vectorized over the leading axes. It is called
            once on the means and once on all resampled means, leave-one-out means, or (``bca``) each of these. NumPy's
            floating-point warnings are off while it runs.
        guard: a column whose mean the statistic divides by: where the interval of that mean includes 0, or cannot be
            known, every result is NaN with that reason.

    Returns:
        K intervals; ``mean`` is the statistic of the column means. NaN, with a reason: where the statistic is not
        finite, and (the bounds only) with fewer than 8 groups or where a resample gives no finite value.

    Raises:
        ValueError: wrong shape, method, confidence, guard or number of resamples; or the statistic returns another
            shape than ``[..., K]``.

    Example:
        Gains from cumulative recoveries, which share their denominator (last column).

        >>> pairs = np.array([[1.0, 3.0, 4.0], [3.0, 5.0, 8.0], [2.0, 4.0, 6.0]] * 3)
        >>> gain = lambda m: (m[..., 1:2] - m[..., 0:1]) / m[..., 2:3]
        >>> interval = statistic_intervals(pairs, gain, guard=2)[0]
        >>> [round(float(x), 3) for x in (interval.mean, interval.low, interval.high)]
        [0.333, 0.247, 0.407]
    """
    values = per_pair_values(per_pair)
    n, columns = values.shape
    check_options(resamples, confidence, method)
    if guard is not None and not -columns <= guard < columns:
        raise ValueError(f"expected a guard among the {columns} columns, found {guard}")

    bad = (~np.isfinite(values)).sum(axis=0)
    usable = np.where(bad > 0, np.nan, values)
    means = column_means(usable)
    with np.errstate(all="ignore"):
        estimates = np.asarray(statistic(means), dtype=np.float64)
    if estimates.ndim != 1:
        raise ValueError(f"expected the statistic to map [..., C] to [..., K]; found {list(estimates.shape)} for [C]")
    if guard is not None:
        divisor = mean_interval(values[:, guard], resamples, confidence, method, seed, groups)
        reason = _no_denominator(divisor, confidence, guard_name)
        if reason is not None:
            return [Interval.unknown(reason)] * len(estimates)
    few = Groups.of(groups, n).too_few()
    if few is not None:
        return [Interval(float(e), math.nan, math.nan, few) if n else Interval.unknown(few) for e in estimates]
    return _intervals_around(estimates, statistic, usable, groups, resamples, confidence, method, seed, int(bad.sum()))


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


def _at_means(statistic: Callable[[Array], Array], count: int, name: str, means: Array) -> Array:
    """``[R, count]``: the statistic of R rows of column means; ``name`` is what an error calls these."""
    with np.errstate(all="ignore"):
        values = np.asarray(statistic(means), dtype=np.float64)
    if values.shape != (len(means), count):
        raise ValueError(
            f"expected the statistic to map {name} means {list(means.shape)} to [{len(means)}, {count}]; "
            f"found {list(values.shape)}"
        )
    return values


def _intervals_around(
    estimates: Array, statistic: Callable[[Array], Array], values: Array, groups: Array | None,
    resamples: int, confidence: float, method: Method, seed: int, bad: int,
) -> list[Interval]:  # fmt: skip
    """Around each estimate ``[K]`` its interval, from what the statistic is where groups are left out, or drawn again."""
    at_means = partial(_at_means, statistic, len(estimates))
    together, means = Groups.of(groups, len(values)), column_means(values)
    without = leave_one_out_means(values, means, groups)
    if together.count < BOOTSTRAP_FROM:
        jackknife = at_means("leave-one-out", without)
        with np.errstate(invalid="ignore"):
            influence = influences(jackknife)
        distances = studentized(np.where(np.isfinite(influence), influence, 0.0), resamples, seed)
        return [_student(float(e), jackknife[:, k], distances[:, k], confidence, bad) for k, e in enumerate(estimates)]
    bootstrap = at_means("resampled", resampled_means(values, means, resamples, seed, groups))
    jackknife = at_means("leave-one-out", without[:0] if method == "percentile" else without)
    tail = widened_tail(together.count, confidence)
    return [
        _bootstrapped(float(e), bootstrap[:, k], jackknife[:, k], tail, method, bad) for k, e in enumerate(estimates)
    ]


def _no_denominator(mean: Interval, confidence: float, name: str) -> str | None:
    """Why nothing can be divided by a mean with this interval, if so."""
    if math.isnan(mean.low) or math.isnan(mean.high):
        return f"the interval of mean {name} is unknown: {mean.reason}"
    if mean.low <= 0.0 <= mean.high:
        return f"the {100 * confidence:g}% interval of mean {name}, [{mean.low:.4g}, {mean.high:.4g}], includes 0"
    return None


def _student(estimate: float, jackknife: Array, distances: Array, confidence: float, bad: int) -> Interval:
    """The hull of estimate ± t · s and of estimate − t* · s, s² = (G − 1)/G · Σ (θ₋g − θ₋)², t* quantiles of ``distances``.

    Where a few groups differ and all others are equal, or nearly so, many resamples miss the few and have no spread, or next
    to none, and what they say is of the others alone. Infinite distances are left out, and t* counts as at most Student's t
    with one degree of freedom, the widest there is.
    """
    groups = len(jackknife)
    if not math.isfinite(estimate):
        return _not_finite(bad)
    if (jackknife == estimate).all():
        return Interval(estimate, estimate, estimate)
    lost = int((~np.isfinite(jackknife)).sum())
    if lost:
        reason = f"without {lost} of {groups} independent pairs, each for itself, there is no finite value"
        return Interval(estimate, math.nan, math.nan, reason)
    error = math.sqrt((groups - 1) / groups * float(np.square(jackknife - jackknife.mean()).sum()))
    tail = (1 - confidence) / 2
    reach = float(stdtrit(groups - 1, 1 - tail))
    told = distances[np.isfinite(distances)]
    quantiles = np.quantile(told, [1 - tail, tail], method="inverted_cdf") if len(told) else np.zeros(2)
    below, above = np.clip(quantiles * [1, -1], reach, float(stdtrit(1, 1 - tail)))
    return Interval(estimate, estimate - float(below) * error, estimate + float(above) * error)


def _bootstrapped(
    estimate: float, bootstrap: Array, jackknife: Array, tail: float, method: Method, bad: int
) -> Interval:
    if not math.isfinite(estimate):
        return _not_finite(bad)
    if (bootstrap == estimate).all():
        return Interval(estimate, estimate, estimate)
    lost = int((~np.isfinite(bootstrap)).sum())
    if lost:
        reason = f"{lost} of {len(bootstrap)} resamples give no finite value"
        return Interval(estimate, math.nan, math.nan, reason)
    tails = np.array([tail, 1 - tail])
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


def _not_finite(bad: int) -> Interval:
    because = f": {bad} of the values per pair are not" if bad else ""
    return Interval.unknown(f"the statistic is not finite{because}")
