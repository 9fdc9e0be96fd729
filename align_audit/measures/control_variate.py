"""Exact effects of some pairs and a cheap proxy on all of them: the mean effect, unbiased, from a fraction of the work.

First-order attribution costs one backward pass for all layers, an exact patched effect one forward per layer. Alone
attribution misleads (late in training its mean is half the exact one); as a control variate it only narrows the
interval of exact values. Which pairs are exact is decided by :func:`subset_order`, without looking at any value: the
guarantees here rest on that. Sources: regression estimators, Cochran, *Sampling Techniques* (1977), ch. 7; unbiased
ones by leaving out, Mickey (1959), doi:10.1080/01621459.1959.10501497; effective degrees of freedom, Satterthwaite
(1946), doi:10.2307/3002019.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from align_audit.measures.statistics import Interval, mean_intervals

Array = np.ndarray

MINIMUM_EXACT = 8
"""Fewest exact pairs from which a slope is fitted; below, the plain mean."""

_ROUNDING = 1e-12
"""A spread this small against the values, or a leave-one-out spread this small against the whole, counts as none."""


@dataclass(frozen=True)
class ControlVariate:
    """One layer's mean exact effect over all pairs, and what the proxy contributed to it.

    ``interval.reason`` says why an interval is unknown, ``reason`` why the proxy was not used (the interval may be
    known all the same: it is then the plain one of the exact pairs).
    """

    interval: Interval
    correlation: float
    """Of exact and proxy over the exact pairs (Pearson; with several proxies the multiple correlation, ≥ 0); NaN where
    either does not vary."""
    explained: float
    """Share of the variance of the exact effect that the proxy predicts out of sample: 1 − s²ᵣ / s²ₑ. Below
    correlation², and below 0 where the proxy only adds noise."""
    coefficient: float
    """Least-squares slope of exact on proxy over the exact pairs (of several: on the first); 0 where none is used."""
    exact_pairs: int
    pairs: int
    equivalent_pairs: float
    """Exact pairs whose plain mean has the same variance: 1 / ((1 − explained) / n + explained / N), at most N."""
    reason: str | None = None


def control_variate_means(
    exact: Array,
    proxy: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[ControlVariate]:
    """Mean exact effect per layer from n exact pairs and N ≥ n proxies, with an interval.

    With S the n exact pairs, U the N − n others, E exact and A proxy values, every exact pair is corrected with the
    least-squares slope of the *other* exact pairs (leave one out):

        estimate = mean_S E − (1 − n/N) · (1/n) Σ_{i∈S} b₋ᵢ (Aᵢ − mean_U A),
        b₋ᵢ = (Sxy − c dᵢ yᵢ) / (Sxx − c dᵢ²),  c = n/(n − 1),  d = A − mean_S A,  y = E − mean_S E,
        Sxy = Σ d y,  Sxx = Σ d².

    With K proxies b and d are vectors, Sxx a matrix, and products inner ones. With one fixed slope this is the usual
    mean_S E − b (mean_S A − mean_all A). *Unbiased exactly*, whatever the relation of E and A: given the other exact
    pairs, pair i is as likely any one pair of U ∪ {i}, so Aᵢ − mean_U A has mean 0 and b₋ᵢ does not depend on it.
    Averaged over all subsets of n of the N pairs the estimate is the mean of all N exact values. (The slope of all n
    pairs instead is biased where the relation bends: by a third of a standard error at n = 8 in
    ``benchmarks/evidence/control_variate.py``.)

    Interval: estimate ± t_ν √V, with

        V = s²ᵣ/n + s²_bA/N,   s²ᵣ = Σ_{i∈S} (yᵢ − b₋ᵢ dᵢ)² / (n − 1 − K),   s²_bA the variance of b·A over all N pairs,

    b the slope of all exact pairs. The first term is what n pairs leave unknown, cross-fitted so that it pays for the
    slope; the second what N pairs do. ν is Satterthwaite's: 2V² over the variances of the two terms, 2(s²ᵣ/n)²/(n − 1 − K)
    and, with x the second term and κ the kurtosis of b·A, x² (2/(N − 1) + max(κ − 3, 0)/N) + 4 x s²ᵣ/(nN); at
    least n − 1 − K.

    Every slope costs exact pairs: with fewer than 8 + 2(K − 1) of them the K proxies are averaged into one.

    A percentile bootstrap of 8 normal values covers 88 % where it says 95 %. This covers 92–98 % in the
    benchmark's grid (n = 8 … 32, N = 64 … 128, ρ = 0.5 … 0.999; normal, t₅ and lognormal effects of skewness 1.75), except
    90–92 % where such a skewed proxy also bends and ρ ≤ 0.9, and 83–94 % at skewness 6: few very skewed
    values show too little of their tail, and the bootstrap of as many equivalent exact pairs does no better (76–92 %).

    Where all N pairs are exact the result is that of :func:`~align_audit.measures.statistics.mean_intervals`, the plain
    percentile bootstrap, bit for bit. Where the proxy cannot be used (see ``reason``) it is the plain mean of the exact
    pairs with their t interval of n − 1 degrees of freedom.

    Args:
        exact: ``[N, L]``, NaN where not measured; the subset may differ between layers, in size too. A simple random
            subset of the pairs, chosen without looking at ``exact``.
        proxy: ``[N, L]``, or ``[N, L, K]`` for K of them; any unit: they are only used through their slopes.
        resamples, seed: of the bootstrap, where all pairs are exact.
        confidence: of the interval, in (0, 1).

    Returns:
        L results in the unit of ``exact``. An interval is NaN, with a reason, where no pair is exact or a measured value
        is infinite; with one exact pair the mean is kept and the bounds are NaN. Equal exact values have low = high =
        mean, exactly.

    Raises:
        ValueError: wrong or different shapes, no pairs, confidence or resamples out of range.

    Example:
        Eight of twelve pairs are exact, and the effect is half the proxy: the slope is 0.5 and the four others, with
        larger proxies, raise the mean from 2.25 to half the mean of all proxies.

        >>> proxy = np.arange(1.0, 13.0)[:, None]
        >>> exact = np.where(proxy <= 8, 0.5 * proxy, np.nan)
        >>> (result,) = control_variate_means(exact, proxy)
        >>> [round(x, 3) for x in (result.interval.mean, result.coefficient, result.equivalent_pairs)]
        [3.25, 0.5, 12.0]
    """
    exact, proxies = np.asarray(exact, dtype=np.float64), np.asarray(proxy, dtype=np.float64)
    if exact.ndim != 2 or proxies.ndim not in (2, 3) or exact.shape != proxies.shape[:2] or not exact.shape[0]:
        raise ValueError(
            "expected exact values [N, L] with N at least 1, and proxies of the same shape or [N, L, K]; "
            f"found {list(exact.shape)} and {list(proxies.shape)}"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"expected a confidence between 0 and 1, such as 0.95; found {confidence}")
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, found {resamples}")
    pairs, layers = exact.shape
    proxies = proxies.reshape(pairs, layers, -1)
    measured = ~np.isnan(exact)
    n = measured.sum(axis=0)
    infinite = np.isinf(exact).sum(axis=0)
    unknown_proxies = (~np.isfinite(proxies)).any(axis=2).sum(axis=0)
    width = np.where(n >= MINIMUM_EXACT + 2 * (proxies.shape[2] - 1), proxies.shape[2], 1)
    """Slopes that are fitted at each layer."""

    # Working units: values of order 1, around the first one, so that nothing overflows and equal values are exactly 0.
    e, e_origin, e_scale = _standardized(exact, measured & (infinite == 0))
    a, _, a_scale = _standardized(proxies, np.broadcast_to((unknown_proxies == 0)[:, None], proxies.shape))
    if proxies.shape[2] > 1:
        # Averaged in their own unit, each by its share of the largest scale.
        share = a_scale / a_scale.max(axis=1, keepdims=True)
        one = (a * share).mean(axis=2) / np.maximum(share.mean(axis=1), _ROUNDING)
        a = np.where((width == 1)[:, None], 0.0, a)
        a[:, :, 0] = np.where(width == 1, one, a[:, :, 0])

    count = np.maximum(n, 1)
    inside = measured[:, :, None]
    e_mean, a_mean = e.sum(axis=0) / count, (a * inside).sum(axis=0) / count[:, None]
    y, d = np.where(measured, e - e_mean, 0.0), np.where(inside, a - a_mean, 0.0)
    # Sums and not products of matrices, whose last bits depend on how many layers there are.
    sxx, sxy = (d[:, :, :, None] * d[:, :, None, :]).sum(axis=0), (d * y[:, :, None]).sum(axis=0)
    syy, spread_of_proxies = (y * y).sum(axis=0), np.trace(sxx, axis1=1, axis2=2)
    usable = (n >= MINIMUM_EXACT) & (spread_of_proxies > _ROUNDING) & (unknown_proxies == 0) & (infinite == 0)
    fitted = _solve(sxx, sxy, np.full(layers, _ROUNDING))
    slope = fitted * usable[:, None]
    correction = (count / np.maximum(n - 1, 1))[:, None]
    without = sxx - correction[:, :, None] * d[:, :, :, None] * d[:, :, None, :]
    slopes = _solve(without, sxy - correction * d * y[:, :, None], _ROUNDING * spread_of_proxies)
    slopes = slopes * (measured & usable)[:, :, None]

    others = (a * ~inside).sum(axis=0) / np.maximum(pairs - n, 1)[:, None]
    shifts = (slopes * np.where(inside, a - others, 0.0)).sum(axis=(0, 2)) / count
    estimates = e_origin + e_scale * (e_mean - (1 - n / pairs) * shifts)

    freedom = np.maximum(n - 1 - np.where(usable, width, 0), 1)
    residual = ((y - (slopes * d).sum(axis=2)) ** 2).sum(axis=0) / freedom
    total = syy / np.maximum(n - 1, 1)
    predicted = ((a - a.mean(axis=0)) * slope).sum(axis=2)
    square = (predicted**2).sum(axis=0)
    kurtosis = _ratio(pairs * (predicted**4).sum(axis=0), square**2, square > _ROUNDING)
    first, second = residual / count, square / max(pairs - 1, 1) / pairs
    variance = first + second
    spread = 2 * first**2 / freedom
    spread = spread + second**2 * (2 / max(pairs - 1, 1) + np.maximum(kurtosis - 3, 0) / pairs)
    spread = spread + 4 * second * first / pairs
    nu = np.maximum(_ratio(2 * variance**2, spread, spread > 0.0), freedom)
    half = e_scale * np.sqrt(variance) * stdtrit(nu, (1 + confidence) / 2)

    varies = (n >= 2) & (spread_of_proxies > _ROUNDING) & (syy > 0.0) & (unknown_proxies == 0) & (infinite == 0)
    multiple = np.sqrt(np.maximum(_ratio((fitted * sxy).sum(axis=1), syy, varies), 0.0))
    sign = np.where(width == 1, np.sign(sxy[:, 0]), 1.0)
    correlation = np.where(varies, np.clip(sign * multiple, -1.0, 1.0), np.nan)
    explained = np.where(usable, 1 - _ratio(residual, total, total > 0.0), 0.0)
    explained = np.where(total > 0.0, explained, 0.0)
    equivalent = _ratio(np.ones(layers), (1 - explained) / count + explained / pairs, n > 0)

    complete = n == pairs
    # On all columns at once: a product over fewer columns may differ in its last bits.
    plain = mean_intervals(exact, resamples, confidence, seed=seed) if complete.any() else []
    results = []
    for layer in range(layers):
        found = int(n[layer])
        if complete[layer]:
            interval = plain[layer]
        elif infinite[layer]:
            interval = Interval.unknown(f"{infinite[layer]} of {found} exact values are infinite")
        elif found < 2:
            few = f"an interval needs at least 2 exact pairs, found {found}"
            interval = Interval(float(estimates[layer]), math.nan, math.nan, few) if found else Interval.unknown(few)
        else:
            mean, reach = float(estimates[layer]), float(half[layer])
            interval = Interval(mean, mean - reach, mean + reach)
        reason = None
        if unknown_proxies[layer]:
            reason = f"proxy not used: {unknown_proxies[layer]} of {pairs} proxies are not finite"
        elif found < min(MINIMUM_EXACT, pairs):
            reason = f"proxy not used: a slope needs at least {MINIMUM_EXACT} exact pairs, found {found}"
        elif spread_of_proxies[layer] <= _ROUNDING:
            reason = f"proxy not used: it does not vary over the {found} exact pairs"
        results.append(
            ControlVariate(
                interval=interval,
                correlation=float(correlation[layer]),
                explained=float(explained[layer]),
                coefficient=float(slope[layer, 0] * e_scale[layer] / a_scale[layer, 0]),
                exact_pairs=found,
                pairs=pairs,
                equivalent_pairs=float(pairs if found == pairs else equivalent[layer]),
                reason=reason,
            )
        )
    return results


def beside_attribution(attribution: Array, known: Array, exact_pairs: int) -> Array:
    """Proxies of patched effects: attribution, and beside it what is known of every pair anyway, as the margin shift.

    The effect of the last layers' streams is nearly the whole shift, however far the attribution strays; its slope is
    fitted as the others are, so it costs one exact pair's worth of freedom. Left out where there are too few exact pairs to fit
    one more slope, or where it is not finite.

    Args:
        attribution: ``[N, L, K]``.
        known: ``[N]``, any unit.

    Returns:
        ``[N, L, K + 1]``, or ``attribution``.

    Example:
        >>> beside_attribution(np.zeros((96, 5, 2)), np.ones(96), 24).shape
        (96, 5, 3)
        >>> beside_attribution(np.zeros((96, 5, 2)), np.ones(96), 10).shape
        (96, 5, 2)
    """
    pairs, layers, points = attribution.shape
    if exact_pairs < MINIMUM_EXACT + 2 * points or not np.isfinite(known).all():
        return attribution
    return np.concatenate([attribution, np.broadcast_to(known[:, None, None], (pairs, layers, 1))], axis=2)


def exact_pairs_needed(correlation: float, pairs: int, equivalent: float) -> int:
    """Least number of exact pairs whose combined estimate has the variance of ``equivalent`` plain exact pairs.

    n = (1 − ρ²) / (1/equivalent − ρ²/pairs), rounded up, from :data:`MINIMUM_EXACT` to ``pairs``. It takes the slope as
    known; fitting it costs variance: with normal effects a quarter at n = 8 and ρ = 0.5 (there nothing is gained), 4 % at
    n = 16, more where the relation bends. Ask for a little more when n is small.

    Args:
        correlation: ρ of exact and proxy, in [−1, 1]; NaN counts as 0 (no gain known).
        pairs: N, those that have a proxy.
        equivalent: exact pairs to match, positive; may exceed ``pairs``.

    Returns:
        n in [min(8, pairs), pairs]. Where ``pairs`` ≤ ``equivalent`` · ρ² no n suffices (even n = pairs has the variance
        of ``pairs``), and where the formula asks for more than there are: ``pairs``, never infinity.

    Raises:
        ValueError: ρ outside [−1, 1], ``pairs`` below 1, ``equivalent`` not positive.

    Example:
        (1 − 0.81) / (1/48 − 0.81/96) = 15.3.

        >>> exact_pairs_needed(0.9, pairs=96, equivalent=48)
        16
    """
    if abs(correlation) > 1.0:
        raise ValueError(f"expected a correlation in [-1, 1], found {correlation}")
    if pairs < 1 or not equivalent > 0.0:
        raise ValueError(f"expected at least 1 pair and a positive equivalent; found {pairs} and {equivalent}")
    square = 0.0 if math.isnan(correlation) else correlation**2
    room = 1 / equivalent - square / pairs
    if room <= 0.0 or (1 - square) / room >= pairs:
        return pairs
    # A hair below, so that rounding does not ask for one pair more than the formula.
    return min(max(math.ceil((1 - square) / room - 1e-9), MINIMUM_EXACT), pairs)


def exact_pairs_needed_safely(correlation: float, pilot: int, pairs: int, equivalent: float, level: float = 0.9) -> int:
    """:func:`exact_pairs_needed` for a correlation estimated on ``pilot`` exact pairs: at its lower confidence bound.

    ρ_low = max(0, tanh(artanh|r| − z / √(pilot − 3))), z the ``level`` quantile of the normal distribution: a one-sided bound
    by Fisher's z (1921), right for roughly normal pairs. With probability ``level`` the returned n suffices; the price is
    more exact pairs than needed on average. Fewer than 4 pilot pairs tell nothing: ρ_low = 0. Where a pilot chooses n and
    then counts among the n pairs, the estimate is unbiased only approximately: by up to a tenth of a standard error
    with skewed effects (``benchmarks/evidence/control_variate.py``). A correlation from an earlier audit has no such cost.

    Raises:
        ValueError: as :func:`exact_pairs_needed`, or ``level`` outside (0, 1), or a negative ``pilot``.

    Example:
        r = 0.9 on 12 pairs is at least 0.78 with 90 % confidence.

        >>> exact_pairs_needed_safely(0.9, pilot=12, pairs=96, equivalent=48)
        28
    """
    if not 0.0 < level < 1.0 or pilot < 0:
        raise ValueError(f"expected a level between 0 and 1 and a pilot of 0 or more pairs; found {level} and {pilot}")
    if abs(correlation) > 1.0:
        raise ValueError(f"expected a correlation in [-1, 1], found {correlation}")
    if pilot < 4 or math.isnan(correlation):
        return exact_pairs_needed(0.0, pairs, equivalent)
    size = min(abs(correlation), 1 - 1e-15)
    low = math.tanh(math.atanh(size) - float(ndtri(level)) / math.sqrt(pilot - 3))
    return exact_pairs_needed(min(max(0.0, low), size), pairs, equivalent)


def subset_order(pair_ids: Sequence[int] | Sequence[str], seed: int = 0) -> Array:
    """A random order of the pairs; the first n are the exact ones, at every layer and for every n.

    Pairs are sorted by the BLAKE2b hash of (seed, identity): no measured value, no position and no other pair enters, so
    a prefix is a simple random subset, a longer prefix contains the shorter, and a pair keeps its rank against another
    when pairs are added, dropped or reordered. Pairs with the same identity keep their order, next to each other.

    Returns:
        int64 ``[N]``, a permutation of 0 … N − 1: positions in ``pair_ids``.

    Example:
        >>> subset_order([10, 11, 12, 13, 14], seed=0).tolist()
        [1, 3, 2, 4, 0]
        >>> subset_order([14, 12, 10], seed=0).tolist()
        [1, 0, 2]
    """
    keys = [hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=16).digest() for identity in pair_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _standardized(values: Array, known: Array) -> tuple[Array, Array, Array]:
    """(values − origin) / scale with 0 where not known, origin ``[L]`` (the first known value), scale ``[L]`` > 0.

    Where the known values differ by rounding only they become 0 throughout.
    """
    first = np.take_along_axis(values, known.argmax(axis=0)[None], axis=0)[0]
    origin = np.where(known.any(axis=0), first, 0.0)
    moved = np.where(known, values, origin) - origin
    scale = np.abs(moved).max(axis=0)
    varies = scale > _ROUNDING * np.abs(origin)
    scale = np.where(varies, scale, 1.0)
    return np.where(varies, moved / scale, 0.0), origin, scale


def _solve(matrix: Array, vector: Array, floor: Array) -> Array:
    """matrix⁻¹ vector for symmetric ``[..., K, K]`` and ``[..., K]``; directions whose eigenvalue is no more than ``floor``
    ``[...]`` are left out."""
    if matrix.shape[-1] == 1:
        return _ratio(vector, matrix[..., 0], matrix[..., 0] > np.broadcast_to(floor, matrix.shape[:-2])[..., None])
    values, vectors = np.linalg.eigh(matrix)
    along = np.einsum("...kj,...k->...j", vectors, vector)
    kept = values > np.broadcast_to(floor, matrix.shape[:-2])[..., None]
    return np.einsum("...kj,...j->...k", vectors, _ratio(along, values, kept))


def _ratio(numerator: Array, denominator: Array, where: Array) -> Array:
    """numerator / denominator where asked, 0 elsewhere, without warnings."""
    return np.where(where, numerator, 0.0) / np.where(where, denominator, 1.0)
