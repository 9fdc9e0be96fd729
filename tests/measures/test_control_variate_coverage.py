"""How often the intervals of the control-variate estimate cover the truth, and what it gains, on planted populations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align_audit.measures import control_variate as cv
from align_audit.measures.resampling import resample_indices
from align_audit.measures.statistics import mean_intervals
from tests.measures.populations import (
    _no_warnings,  # noqa: F401
    first,
    numbers,
)


def test_coverage_with_two_proxies() -> None:
    generator = np.random.default_rng(3)
    shape = (96, 3000)
    for family in ("normal", "lognormal"):
        draws = generator.standard_normal((3, *shape))
        if family == "lognormal":
            draws = (np.exp(0.5 * draws) - math.exp(0.125)) / (math.exp(0.125) * math.sqrt(math.expm1(0.25)))
        proxies = np.stack([draws[0] + 0.1 * draws[1], draws[0] - 0.3 * draws[1]], axis=2)
        exact = draws[0] + 0.5 * draws[1] + 0.2 * draws[2]
        for n in (10, 16):
            results = cv.control_variate_means(first(exact, n), proxies)
            mean, low, high = np.array([numbers(r) for r in results]).T
            assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.98
            assert abs(mean.mean() / mean.std()) < 0.055


def test_coverage_with_groups() -> None:
    """Four pairs a prompt whose effects and proxies have half their variance in common."""
    generator = np.random.default_rng(4)
    prompts, each, columns = 24, 4, 1500
    names = np.repeat(np.arange(prompts), each)
    common = generator.standard_normal((2, prompts, columns))[:, names]
    draws = (common + generator.standard_normal((2, prompts * each, columns))) / math.sqrt(2)
    proxy, effect = draws[0], 0.8 * draws[0] + 0.6 * draws[1]
    order = np.argsort(np.arange(prompts * each) % each, kind="stable")  # one pair of each prompt comes first
    for n in (16, 48):
        measured = np.full(effect.shape, np.nan)
        measured[order[:n]] = effect[order[:n]]
        grouped = [numbers(r) for r in cv.control_variate_means(measured, proxy, groups=names)]
        _, low, high = np.array(grouped).T
        assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.985
    single = np.array([numbers(r) for r in cv.control_variate_means(measured, proxy)])
    assert ((single[:, 1] <= 0) & (single[:, 2] >= 0)).mean() < 0.88


def simulate(family: str, rho: float, n: int, pairs: int, repetitions: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects of mean 0 and variance 1, and proxies, correlated by ρ."""
    generator = np.random.default_rng([n, pairs, round(1000 * rho)])
    if family == "normal":
        draws = generator.standard_normal((2, pairs, repetitions))
    elif family == "t5":
        draws = generator.standard_t(5, (2, pairs, repetitions)) / math.sqrt(5 / 3)
    else:
        draws = np.exp(0.5 * generator.standard_normal((2, pairs, repetitions)))
        draws = (draws - math.exp(0.125)) / (math.exp(0.125) * math.sqrt(math.expm1(0.25)))
    return rho * draws[0] + math.sqrt(1 - rho**2) * draws[1], draws[0]


@pytest.mark.parametrize("family", ["normal", "t5", "lognormal"])
@pytest.mark.parametrize(("n", "pairs", "rho"), [(8, 64, 0.5), (8, 128, 0.95), (16, 96, 0.9), (24, 64, 0.999)])
def test_coverage_and_gain(family: str, n: int, pairs: int, rho: float) -> None:
    exact, proxy = simulate(family, rho, n, pairs)
    results = cv.control_variate_means(first(exact, n), proxy)
    mean, low, high = np.array([numbers(r) for r in results]).T
    # 3,000 repetitions: two standard deviations of a covering share are 0.008 here, of the bias 0.037.
    assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.98
    assert abs(mean.mean() / mean.std()) < 0.055
    equivalent = 1 / ((1 - rho**2) / n + rho**2 / pairs)
    # Fitting the slope on 8 pairs costs; where the correlation is low, all of the gain.
    assert (0.65 if n == 8 else 0.85) * equivalent < 1 / mean.var() < 1.1 * equivalent
    assert (high - low).mean() < 1.5 * 2 * 1.96 / math.sqrt(equivalent)
    # Intervals that ignored what the subset leaves unknown would fail here, where that is most of it.
    if rho < 0.9:
        half = 1.96 / math.sqrt(pairs)
        assert (abs(mean) <= half).mean() < 0.8


def test_curved_relation_is_unbiased_where_the_usual_slope_is_not() -> None:
    generator = np.random.default_rng(0)
    proxy = generator.standard_normal((64, 6000))
    exact = proxy + 0.5 * (proxy**2 - 1)
    results = cv.control_variate_means(first(exact, 8), proxy)
    mean = np.array([r.interval.mean for r in results])
    usual = exact[:8].mean(axis=0) - np.array([r.coefficient for r in results]) * (
        proxy[:8].mean(axis=0) - proxy.mean(axis=0)
    )
    assert abs(mean.mean() / mean.std()) < 0.04
    assert usual.mean() / usual.std() < -0.2


def test_narrower_than_the_exact_pairs_alone() -> None:
    exact, proxy = simulate("normal", 0.95, 12, 96, repetitions=300)
    results = cv.control_variate_means(first(exact, 12), proxy)
    combined = np.mean([r.interval.high - r.interval.low for r in results])
    plain = np.mean([i.high - i.low for i in mean_intervals(exact[:12], resamples=200)])
    assert combined < 0.6 * plain
    median = np.median([r.equivalent_pairs for r in results])
    assert median == pytest.approx(1 / (0.0975 / 12 + 0.9025 / 96), rel=0.15)


def test_mean_interval_is_what_the_percentile_bootstrap_lacks_at_eight_pairs() -> None:
    """Why the interval is not a bootstrap: 88 % at n = 8, on the same normal effects that the t interval covers."""
    values = np.random.default_rng(5).standard_normal((8, 1000))
    bounds = np.quantile(values[resample_indices(8, 300, seed=0)].mean(axis=1), [0.025, 0.975], axis=0)
    assert np.mean((bounds[0] <= 0) & (bounds[1] >= 0)) < 0.91
    padded = np.vstack([values, np.full((56, 1000), np.nan)])
    ours = cv.control_variate_means(padded, np.zeros((64, 1000)))
    assert 0.93 <= np.mean([r.interval.low <= 0 <= r.interval.high for r in ours]) <= 0.97
