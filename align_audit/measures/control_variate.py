"""Exact effects of some pairs and a cheap proxy on all of them: the mean effect, unbiased, from a fraction of the work.

First-order attribution costs one backward pass for all layers, an exact patched effect one forward per layer. Alone
attribution misleads (late in training its mean is half the exact one); as a control variate it only narrows the
interval of exact values. Which pairs are exact is decided by :func:`~align_audit.measures.draws.subset_order`, without
looking at any value: the guarantees here rest on that.

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

Pairs that share a prompt do not vary independently of each other: each of the two terms is multiplied by how much more
the sums over groups vary than independent pairs' would (at least 1), n in the degrees of freedom is the number of groups
with an exact pair, and a pair is corrected with the slope of the other groups.

A percentile bootstrap of 8 normal values covers 88 % where it says 95 %. What this covers, over sizes, correlations and
shapes of effects, says docs/evidence.md (``benchmarks/evidence/control_variate.py``): less where effects are very skewed, since
few values show too little of their tail.

Sources: regression estimators, Cochran, *Sampling Techniques* (1977), ch. 7; unbiased ones by leaving out, Mickey (1959),
doi:10.1080/01621459.1959.10501497; effective degrees of freedom, Satterthwaite (1946), doi:10.2307/3002019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from align_audit.measures.exact_sample import MINIMUM_EXACT, ROUNDING, ExactSample, working_units
from align_audit.measures.interval import Interval
from align_audit.measures.resampling import LEAST_GROUPS, Groups
from align_audit.measures.significance import mean_p_values
from align_audit.measures.statistics import check_options, mean_intervals

Array = np.ndarray


@dataclass(frozen=True)
class ControlVariate:
    """One layer's mean exact effect over all pairs, and what the proxy contributed to it.

    ``interval.reason`` says why an interval is unknown, ``reason`` why the proxy was not used (the interval may be
    known all the same: it is then the plain one of the exact pairs).
    """

    interval: Interval
    p: float
    """Two-sided, of a mean effect of 0: the counterpart of the interval; NaN where that is unknown."""
    correlation: float
    """Of exact and proxy over the exact pairs (Pearson; of several the multiple one); NaN where either does not vary."""
    explained: float
    """Share of the exact effect's variance that the proxy predicts out of sample, 1 − s²ᵣ / s²ₑ; below 0 if it adds noise."""
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
    groups: Array | None = None,
    patched: Array | None = None,
) -> list[ControlVariate]:
    """Mean exact effect per layer from n exact pairs and N ≥ n proxies, with an interval.

    The estimate, its interval and their sources are at the head of this module. Every slope costs exact pairs: with fewer
    than 8 + 2(K − 1) of them the K proxies are averaged into one.

    Where all N pairs are exact the result is that of :func:`~align_audit.measures.statistics.mean_intervals`, bit for bit.
    Where the proxy cannot be used (see ``reason``) it is the mean of the exact pairs with their t interval.

    Args:
        exact: ``[N, L]``, NaN where not measured; the subset may differ between layers, in size too. A simple random
            subset of the pairs, chosen without looking at ``exact``.
        proxy: ``[N, L]``, or ``[N, L, K]`` for K of them; any unit: they are only used through their slopes.
        resamples, seed: of the bootstrap, where all pairs are exact.
        confidence: of the interval, in (0, 1).
        groups: ``[N]``, which pairs belong together; None: none do.
        patched: bool ``[N, L]``, what was measured, also where that gave NaN; None: what is not NaN.

    Returns:
        L results in the unit of ``exact``. An interval is NaN, with a reason, where no pair is exact or a measured value
        is not finite; with exact pairs in fewer than 8 groups the mean is kept and the bounds are NaN. Equal exact values have
        low = high = mean, exactly.

    Raises:
        ValueError: wrong or different shapes, no pairs, confidence or resamples out of range.

    Example:
        Eight of twelve pairs are exact, and the effect is half the proxy: the four others, with larger proxies, raise the mean.

        >>> proxy = np.arange(1.0, 13.0)[:, None]
        >>> exact = np.where(proxy <= 8, 0.5 * proxy, np.nan)
        >>> (result,) = control_variate_means(exact, proxy)
        >>> [round(x, 3) for x in (result.interval.mean, result.coefficient, result.equivalent_pairs)]
        [3.25, 0.5, 12.0]
    """
    check_options(resamples, confidence)
    if patched is not None:
        exact = np.where(patched & np.isnan(exact), np.inf, exact)  # NaN stands for what was not measured
    sample = working_units(exact, proxy)
    together = Groups.of(groups, sample.pairs)
    slopes = _slopes(sample, together)
    error = _error(sample, slopes, together)
    intervals, p = _corrected(sample, slopes, error, together, confidence)
    complete = sample.count == sample.pairs
    if complete.any():
        # On all columns at once: a product over fewer columns may differ in its last bits.
        plain = mean_intervals(exact, resamples, confidence, seed=seed, groups=groups)
        intervals = [plain[layer] if complete[layer] else interval for layer, interval in enumerate(intervals)]
        p = np.where(complete, mean_p_values(np.where(complete, exact, 0.0), resamples, seed, groups), p)
    return _results(sample, slopes, error, intervals, p)


def beside_attribution(attribution: Array, covariate: Array, exact_pairs: int) -> Array:
    """Proxies of patched effects: attribution, and beside it what is known of every pair anyway, as the margin shift.

    The effect of the last layers' streams is nearly the whole shift, however far the attribution strays; its slope is
    fitted as the others are, so it costs one exact pair's worth of freedom. Left out where there are too few exact pairs to fit
    one more slope, or where it is not finite.

    Args:
        attribution: ``[N, L, K]``.
        covariate: ``[N]``, any unit.

    Returns:
        ``[N, L, K + 1]``, or ``attribution``.

    Example:
        >>> beside_attribution(np.zeros((96, 5, 2)), np.ones(96), 24).shape
        (96, 5, 3)
        >>> beside_attribution(np.zeros((96, 5, 2)), np.ones(96), 10).shape
        (96, 5, 2)
    """
    pairs, layers, points = attribution.shape
    if exact_pairs < MINIMUM_EXACT + 2 * points or not np.isfinite(covariate).all():
        return attribution
    return np.concatenate([attribution, np.broadcast_to(covariate[:, None, None], (pairs, layers, 1))], axis=2)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Least-squares slopes of exact on proxies, in working units."""

    fitted: Array
    """``[L, K]``: of all exact pairs, also where there are too few of them."""
    slope: Array
    """``[L, K]``: b, the same with 0 where no proxy is used."""
    without: Array
    """``[N, L, K]``: b₋ᵢ, of the exact pairs but those of one's group; 0 where that one is not exact or no proxy is used."""


def _slopes(sample: ExactSample, groups: Groups) -> _Slopes:
    d, y, usable = sample.d, sample.y, sample.usable
    fitted = _solve(sample.sxx, sample.sxy, np.full(len(sample.count), ROUNDING))
    outer, product = d[:, :, :, None] * d[:, :, None, :], d * y[:, :, None]
    if groups.alone:
        correction = (sample.divisor / np.maximum(sample.count - 1, 1))[:, None]
        matrix, vector = sample.sxx - correction[:, :, None] * outer, sample.sxy - correction * product
    else:
        # Of a group g of m exact pairs: Sxx − Σ_g d dᵀ − (Σ_g d)(Σ_g d)ᵀ / (n − m), and Sxy alike.
        left = np.maximum(sample.count - groups.total(sample.measured.astype(np.float64)), 1)[:, :, None]
        moved, raised = groups.total(d), groups.total(y)[:, :, None]
        matrix = sample.sxx - groups.total(outer) - moved[:, :, :, None] * moved[:, :, None, :] / left[..., None]
        vector = sample.sxy - groups.total(product) - moved * raised / left
    without = _solve(matrix, vector, ROUNDING * sample.proxy_spread)
    return _Slopes(fitted, fitted * usable[:, None], without * (sample.measured & usable)[:, :, None])


def _estimates(sample: ExactSample, slopes: _Slopes) -> Array:
    """``[L]``: mean_S E − (1 − n/N) · (1/n) Σ b₋ᵢ (Aᵢ − mean_U A), in the unit of the exact values."""
    inside, pairs, n = sample.measured[:, :, None], sample.pairs, sample.count
    unmeasured = (sample.proxies * ~inside).sum(axis=0) / np.maximum(pairs - n, 1)[:, None]
    shifts = (slopes.without * np.where(inside, sample.proxies - unmeasured, 0.0)).sum(axis=(0, 2)) / sample.divisor
    estimates: Array = sample.origin + sample.scale * (sample.exact_mean - (1 - n / pairs) * shifts)
    return estimates


@dataclass(frozen=True, eq=False)
class _Error:
    """How far the estimates may lie from the truth, ``[L]`` each, in working units."""

    residual: Array
    """s²ᵣ."""
    variance: Array
    """V."""
    freedom: Array
    """ν."""


def _error(sample: ExactSample, slopes: _Slopes, groups: Groups) -> _Error:
    pairs = sample.pairs
    slopes_fitted = np.where(sample.usable, sample.width, 0)
    freedom = np.maximum(sample.count - 1 - slopes_fitted, 1)
    left = sample.y - (slopes.without * sample.d).sum(axis=2)
    residual = (left**2).sum(axis=0) / freedom
    predicted = ((sample.proxies - sample.proxies.mean(axis=0)) * slopes.slope).sum(axis=2)
    square = (predicted**2).sum(axis=0)
    kurtosis = _ratio(pairs * (predicted**4).sum(axis=0), square**2, square > ROUNDING)
    first, second = residual / sample.divisor, square / max(pairs - 1, 1) / pairs
    met = groups.met(sample.measured)
    by_groups = np.maximum(met - 1 - slopes_fitted, 1)
    first = first * groups.design_effect(left) * (met / sample.divisor) * (freedom / by_groups)
    second, freedom = second * groups.design_effect(predicted), by_groups
    variance = first + second
    # The variance of V itself: of its two terms, and what they have in common.
    spread = 2 * first**2 / freedom
    spread = spread + second**2 * (2 / max(pairs - 1, 1) + np.maximum(kurtosis - 3, 0) / pairs)
    spread = spread + 4 * second * first / pairs
    return _Error(residual, variance, np.maximum(_ratio(2 * variance**2, spread, spread > 0.0), freedom))


def _correlation(sample: ExactSample, slopes: _Slopes) -> Array:
    """``[L]``: of exact and proxy over S, with several slopes the multiple one; NaN where either does not vary."""
    varies = (sample.count >= 2) & (sample.syy > 0.0) & sample.sound
    multiple = np.sqrt(np.maximum(_ratio((slopes.fitted * sample.sxy).sum(axis=1), sample.syy, varies), 0.0))
    sign = np.where(sample.width == 1, np.sign(sample.sxy[:, 0]), 1.0)
    return np.where(varies, np.clip(sign * multiple, -1.0, 1.0), np.nan)


def _worth(sample: ExactSample, error: _Error) -> tuple[Array, Array]:
    """``explained`` and ``equivalent_pairs`` of :class:`ControlVariate`, ``[L]`` each."""
    total = sample.syy / np.maximum(sample.count - 1, 1)
    explained = np.where(sample.usable, 1 - _ratio(error.residual, total, total > 0.0), 0.0)
    explained = np.where(total > 0.0, explained, 0.0)
    per_pair = (1 - explained) / sample.divisor + explained / sample.pairs
    equivalent = _ratio(np.ones(len(total)), per_pair, sample.count > 0)
    return explained, np.where(sample.count == sample.pairs, sample.pairs, equivalent)


def _corrected(
    sample: ExactSample, slopes: _Slopes, error: _Error, groups: Groups, confidence: float
) -> tuple[list[Interval], Array]:
    """The estimates ± t_ν √V, and their p-values ``[L]``, as of layers at which not all pairs are exact."""
    estimates = _estimates(sample, slopes)
    spread = sample.scale * np.sqrt(error.variance)
    reach = spread * stdtrit(error.freedom, (1 + confidence) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(error.freedom, -np.where(estimates == 0.0, 0.0, np.abs(estimates) / spread))
    met = groups.met(sample.measured)
    layers = range(len(sample.count))
    return [_interval(sample, layer, estimates[layer], reach[layer], met[layer]) for layer in layers], p


def _results(
    sample: ExactSample, slopes: _Slopes, error: _Error, intervals: list[Interval], p: Array
) -> list[ControlVariate]:
    """Each layer's interval and p-value, with what its proxy contributed."""
    correlation = _correlation(sample, slopes)
    explained, equivalent = _worth(sample, error)
    return [
        ControlVariate(
            interval=interval,
            p=math.nan if math.isnan(interval.low) else float(p[layer]),
            correlation=float(correlation[layer]),
            explained=float(explained[layer]),
            coefficient=float(slopes.slope[layer, 0] * sample.scale[layer] / sample.proxy_scale[layer, 0]),
            exact_pairs=int(sample.count[layer]),
            pairs=sample.pairs,
            equivalent_pairs=float(equivalent[layer]),
            reason=_why_not_used(sample, layer),
        )
        for layer, interval in enumerate(intervals)
    ]


def _interval(sample: ExactSample, layer: int, estimate: float, reach: float, independent: float) -> Interval:
    """Of a layer at which not all pairs are exact: ``estimate`` ± ``reach``, where there are ``independent`` pairs enough."""
    exact_pairs = int(sample.count[layer])
    if sample.infinite[layer]:
        return Interval.unknown(f"{sample.infinite[layer]} of {exact_pairs} exact values are not finite")
    mean, half = float(estimate), float(reach)
    if independent < LEAST_GROUPS:
        few = f"an interval needs at least {LEAST_GROUPS} exact independent pairs, found {independent:.0f}"
        return Interval(mean, math.nan, math.nan, few) if exact_pairs else Interval.unknown(few)
    return Interval(mean, mean - half, mean + half)


def _why_not_used(sample: ExactSample, layer: int) -> str | None:
    exact_pairs, pairs = int(sample.count[layer]), sample.pairs
    if sample.not_finite[layer]:
        return f"proxy not used: {sample.not_finite[layer]} of {pairs} proxies are not finite"
    if exact_pairs < min(MINIMUM_EXACT, pairs):
        return f"proxy not used: a slope needs at least {MINIMUM_EXACT} exact pairs, found {exact_pairs}"
    if sample.proxy_spread[layer] <= ROUNDING:
        return f"proxy not used: it does not vary over the {exact_pairs} exact pairs"
    return None


def _solve(matrix: Array, vector: Array, floor: Array) -> Array:
    """matrix⁻¹ vector for symmetric ``[..., K, K]`` and ``[..., K]``; directions whose eigenvalue is no more than ``floor``
    ``[...]`` are left out."""
    if matrix.shape[-1] == 1:
        return _ratio(vector, matrix[..., 0], matrix[..., 0] > np.broadcast_to(floor, matrix.shape[:-2])[..., None])
    values, vectors = np.linalg.eigh(matrix)
    along = np.einsum("...kj,...k->...j", vectors, vector)
    kept = values > np.broadcast_to(floor, matrix.shape[:-2])[..., None]
    solution: Array = np.einsum("...kj,...j->...k", vectors, _ratio(along, values, kept))
    return solution


def _ratio(numerator: Array, denominator: Array, where: Array) -> Array:
    """numerator / denominator where asked, 0 elsewhere, without warnings."""
    return np.where(where, numerator, 0.0) / np.where(where, denominator, 1.0)
