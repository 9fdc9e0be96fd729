"""The control-variate estimate against all subsets, plain loops, closed forms and planted populations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from align_audit.measures import control_variate as cv
from align_audit.measures.significance import mean_p_values
from align_audit.measures.statistics import mean_intervals
from tests.measures.populations import (
    _no_warnings,  # noqa: F401
    first,
    numbers,
)


def population(pairs: int, columns: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects and proxies: the proxies are skewed and the relation bends."""
    generator = np.random.default_rng(seed)
    proxy = generator.exponential(size=(pairs, columns))
    return 0.5 * (proxy + 0.2 * proxy**2) + noise * generator.standard_normal((pairs, columns)), proxy


def test_mean_over_all_subsets_is_the_mean_of_all_pairs() -> None:
    """Unbiased exactly, not about: a curved relation, an outlier, and all 165 subsets of 8 of 11 pairs."""
    exact, proxy = population(11, 1, seed=4)
    exact[3], proxy[3] = 40.0, 12.0
    subsets = list(itertools.combinations(range(11), 8))
    measured = np.full((11, len(subsets)), np.nan)
    for column, subset in enumerate(subsets):
        measured[list(subset), column] = exact[list(subset), 0]
    results = cv.control_variate_means(measured, np.repeat(proxy, len(subsets), axis=1))
    assert np.mean([r.interval.mean for r in results]) == pytest.approx(exact.mean(), rel=1e-12)
    # With the slope of all eight pairs instead, the same average is far off.
    naive = [
        exact[list(s)].mean() - r.coefficient * (proxy[list(s)].mean() - proxy.mean())
        for r, s in zip(results, subsets, strict=True)
    ]
    assert abs(np.mean(naive) - exact.mean()) > 0.01 * exact.mean()


def test_estimate_and_interval_equal_a_plain_loop() -> None:
    exact, proxy = population(20, 3, seed=1)
    sizes = [9, 12, 15]
    generator = np.random.default_rng(2)
    for column, n in enumerate(sizes):
        exact[generator.permutation(20)[n:], column] = np.nan
    for column, result in enumerate(cv.control_variate_means(exact, proxy, confidence=0.9)):
        inside = [i for i in range(20) if not math.isnan(exact[i, column])]
        outside = [i for i in range(20) if i not in inside]
        n, e, a = len(inside), exact[:, column], proxy[:, column]
        others = np.mean(a[outside])
        slopes = {
            i: stats.linregress([a[j] for j in inside if j != i], [e[j] for j in inside if j != i]).slope
            for i in inside
        }
        corrected = [e[i] - (1 - n / 20) * slopes[i] * (a[i] - others) for i in inside]
        fit = stats.linregress(a[inside], e[inside])
        residual = sum((e[i] - np.mean(e[inside]) - slopes[i] * (a[i] - np.mean(a[inside]))) ** 2 for i in inside) / (
            n - 2
        )
        x = fit.slope**2 * np.var(a, ddof=1) / 20
        kurtosis = stats.kurtosis(a, fisher=False)
        spread = 2 * (residual / n) ** 2 / (n - 2) + x**2 * (2 / 19 + max(kurtosis - 3, 0) / 20)
        spread += 4 * x * residual / (n * 20)
        nu = max(2 * (residual / n + x) ** 2 / spread, n - 2)
        half = stats.t.ppf(0.95, nu) * math.sqrt(residual / n + x)
        mean = np.mean(corrected)
        np.testing.assert_allclose(numbers(result), (mean, mean - half, mean + half), rtol=1e-10)
        explained = 1 - residual / np.var(e[inside], ddof=1)
        assert result.coefficient == pytest.approx(fit.slope)
        assert result.correlation == pytest.approx(fit.rvalue)
        assert result.explained == pytest.approx(explained)
        assert result.explained < fit.rvalue**2
        assert result.equivalent_pairs == pytest.approx(1 / ((1 - explained) / n + explained / 20))
        assert (result.exact_pairs, result.pairs, result.reason) == (n, 20, None)
        assert result.p == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(residual / n + x), nu), rel=1e-8)


def two_proxies(pairs: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects that need both proxies, [N, L] and [N, L, 2]."""
    generator = np.random.default_rng(seed)
    shape = (pairs, columns)
    common = generator.exponential(size=shape)
    proxies = np.stack(
        [common + 0.5 * generator.standard_normal(shape), 3 * common + generator.exponential(size=shape)]
    )
    exact = 1.5 * proxies[0] - 0.5 * proxies[1] + 0.02 * proxies[0] ** 2 + 0.2 * generator.standard_normal(shape)
    return exact, np.moveaxis(proxies, 0, 2)


def test_mean_over_all_subsets_with_two_proxies() -> None:
    exact, proxies = two_proxies(13, 1, seed=4)
    exact[3], proxies[3] = 40.0, 12.0
    subsets = list(itertools.combinations(range(13), 10))
    measured = np.full((13, len(subsets)), np.nan)
    for column, subset in enumerate(subsets):
        measured[list(subset), column] = exact[list(subset), 0]
    results = cv.control_variate_means(measured, np.repeat(proxies, len(subsets), axis=1))
    assert np.mean([r.interval.mean for r in results]) == pytest.approx(exact.mean(), rel=1e-12)


def test_two_proxies_equal_a_plain_loop_and_beat_one() -> None:
    exact, proxies = two_proxies(40, 2, seed=1)
    measured, n = first(exact, 14), 14
    for column, result in enumerate(cv.control_variate_means(measured, proxies)):
        e, A = exact[:, column], proxies[:, column]

        def fit(rows: list[int], e: np.ndarray = e, A: np.ndarray = A) -> np.ndarray:
            return np.linalg.lstsq(np.column_stack([np.ones(len(rows)), A[rows]]), e[rows], rcond=None)[0][1:]

        inside = list(range(n))
        slopes = np.array([fit([j for j in inside if j != i]) for i in inside])
        others = A[n:].mean(axis=0)
        mean = np.mean([e[i] - (1 - n / 40) * slopes[i] @ (A[i] - others) for i in inside])
        assert result.interval.mean == pytest.approx(mean, rel=1e-9)
        assert result.coefficient == pytest.approx(fit(inside)[0], rel=1e-9)
        centred, low = A[:n] - A[:n].mean(axis=0), e[:n] - e[:n].mean()
        residual = sum((low[i] - slopes[i] @ centred[i]) ** 2 for i in inside) / (n - 3)
        assert result.explained == pytest.approx(1 - residual / np.var(e[:n], ddof=1), rel=1e-9)
        assert result.correlation == pytest.approx(np.corrcoef(A[:n] @ fit(inside), e[:n])[0, 1], rel=1e-9)
        x = np.var(A @ fit(inside), ddof=1) / 40
        kurtosis = stats.kurtosis(A @ fit(inside), fisher=False)
        spread = 2 * (residual / n) ** 2 / (n - 3) + x**2 * (2 / 39 + max(kurtosis - 3, 0) / 40)
        spread += 4 * x * residual / (n * 40)
        nu = max(2 * (residual / n + x) ** 2 / spread, n - 3)
        half = stats.t.ppf(0.975, nu) * math.sqrt(residual / n + x)
        np.testing.assert_allclose(numbers(result), (mean, mean - half, mean + half), rtol=1e-9)
        for one in (0, 1):
            (alone,) = cv.control_variate_means(measured[:, [column]], proxies[:, [column], one])
            assert alone.equivalent_pairs < 0.8 * result.equivalent_pairs


def test_one_proxy_in_a_third_axis_is_one_proxy_and_with_few_pairs_two_are_their_mean() -> None:
    exact, proxies = two_proxies(30, 3)
    plain = cv.control_variate_means(first(exact, 12), proxies[:, :, 0])
    assert cv.control_variate_means(first(exact, 12), proxies[:, :, :1]) == plain
    few = cv.control_variate_means(first(exact, 9), proxies)
    mean = cv.control_variate_means(first(exact, 9), proxies.mean(axis=2))
    for one, other in zip(few, mean, strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-9)
        assert one.correlation == pytest.approx(other.correlation)


def test_exact_relation_gives_the_mean_of_all_pairs() -> None:
    _, proxy = population(30, 1)
    exact = 3.0 - 0.25 * proxy
    (result,) = cv.control_variate_means(first(exact, 8), proxy)
    assert result.interval.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert result.correlation == pytest.approx(-1.0)
    assert result.equivalent_pairs == pytest.approx(30)
    # What is left is what 30 pairs leave unknown.
    half = (result.interval.high - result.interval.low) / 2
    assert 1.0 < half / (1.96 * exact.std(ddof=1) / math.sqrt(30)) < 1.2


def test_all_pairs_measured_is_the_plain_interval() -> None:
    exact, proxy = population(16, 2)
    results = cv.control_variate_means(exact, proxy, resamples=200, confidence=0.9, seed=3)
    assert [r.interval for r in results] == mean_intervals(exact, 200, 0.9, seed=3)
    assert [(r.exact_pairs, r.equivalent_pairs, r.reason) for r in results] == [(16, 16.0, None)] * 2
    # Also next to a layer of which only some are.
    exact[10:, 0] = np.nan
    mixed = cv.control_variate_means(exact, proxy, resamples=200, confidence=0.9, seed=3)
    assert mixed[1] == results[1]


def test_units_and_origins() -> None:
    exact, proxy = population(20, 1)
    (result,) = cv.control_variate_means(first(exact, 10), proxy)
    (moved,) = cv.control_variate_means(first(1e-9 * exact + 1.0, 10), -1e200 * proxy + 7.0)
    np.testing.assert_allclose((np.array(numbers(moved)) - 1.0) * 1e9, numbers(result), rtol=1e-5)
    assert moved.coefficient == pytest.approx(-result.coefficient * 1e-209, rel=1e-5)
    assert moved.equivalent_pairs == pytest.approx(result.equivalent_pairs, rel=1e-5)


def plain_t(values: np.ndarray) -> tuple[float, float, float]:
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - half, values.mean() + half


@pytest.mark.parametrize("value", [0.0, 0.1, -3e8])
def test_proxies_that_do_not_vary_give_the_plain_mean(value: float) -> None:
    exact, _ = population(20, 1)
    (result,) = cv.control_variate_means(first(exact, 10), np.full((20, 1), value))
    np.testing.assert_allclose(numbers(result), plain_t(exact[:10, 0]), rtol=1e-12)
    assert math.isnan(result.correlation)
    assert (result.coefficient, result.explained) == (0.0, 0.0)
    assert result.equivalent_pairs == pytest.approx(10)
    assert result.reason == "proxy not used: it does not vary over the 10 exact pairs"


def test_a_proxy_that_varies_only_where_nothing_is_exact_or_in_one_pair() -> None:
    exact, proxy = population(20, 2)
    proxy[:10, 0] = 1.0
    proxy[:, 1] = 0.0
    proxy[2, 1] = 5.0
    unseen, single = cv.control_variate_means(first(exact, 10), proxy)
    np.testing.assert_allclose(numbers(unseen), plain_t(exact[:10, 0]), rtol=1e-12)
    # Without pair 2 there is no slope; with it there is, but pair 2 must not be corrected by itself.
    slope = exact[2, 1] / 5 - np.delete(exact[:10, 1], 2).mean() / 5
    assert single.coefficient == pytest.approx(slope)
    # Only the slopes for the other pairs see it. Their own proxies equal those of the unmeasured pairs: no correction.
    np.testing.assert_allclose(single.interval.mean, exact[:10, 1].mean(), rtol=1e-12)
    proxy[12, 1] = 5.0
    slopes = [(exact[2, 1] - np.delete(exact[:10, 1], [2, i]).mean()) / 5 for i in range(10) if i != 2]
    (corrected,) = cv.control_variate_means(first(exact, 10)[:, 1:], proxy[:, 1:])
    assert corrected.interval.mean == pytest.approx(exact[:10, 1].mean() + 0.5 * sum(slopes) * (5 / 10) / 10)


@pytest.mark.parametrize("n", range(8, 20))
def test_rounding_is_not_a_slope(n: int) -> None:
    """Without the one pair that differs nothing varies but the last bits, which must not be divided by."""
    exact, _ = population(20, 1)
    proxy = np.full((20, 1), 1 / 3)
    proxy[2] = 5.0
    proxy[12:] += 1e-15
    (result,) = cv.control_variate_means(first(exact, n), proxy)
    assert result.interval.mean == pytest.approx(exact[:n].mean(), rel=1e-9)


def test_zeros_are_exactly_zero() -> None:
    _, proxy = population(20, 1)
    for proxies in (proxy, np.zeros((20, 1))):
        for n in (8, 12, 20):
            (result,) = cv.control_variate_means(first(np.zeros((20, 1)), n), proxies)
            assert numbers(result) == (0.0, 0.0, 0.0)
            assert result.p == 1.0
    (equal,) = cv.control_variate_means(first(np.full((20, 1), 0.1), 12), proxy)
    assert numbers(equal) == (0.1, 0.1, 0.1)
    assert equal.p == 0.0


def test_too_few_exact_pairs() -> None:
    exact, proxy = population(20, 3)
    exact[0:, 0] = np.nan
    exact[1:, 1] = np.nan
    exact[7:, 2] = np.nan
    none, one, seven = cv.control_variate_means(exact, proxy)
    assert math.isnan(none.interval.mean)
    assert none.interval.reason == "an interval needs at least 8 exact independent pairs, found 0"
    assert none.equivalent_pairs == 0.0
    assert one.interval.mean == exact[0, 1]
    assert math.isnan(one.interval.low)
    assert seven.interval.mean == pytest.approx(exact[:7, 2].mean(), rel=1e-12)
    assert math.isnan(seven.interval.low)
    assert math.isnan(seven.interval.high)
    assert seven.interval.reason == "an interval needs at least 8 exact independent pairs, found 7"
    assert seven.reason == "proxy not used: a slope needs at least 8 exact pairs, found 7"
    assert seven.correlation == pytest.approx(np.corrcoef(exact[:7, 2], proxy[:7, 2])[0, 1])
    assert all(math.isnan(result.p) for result in (none, one, seven))
    # Nine exact pairs in seven groups are seven.
    (shared,) = cv.control_variate_means(
        first(population(20, 1)[0], 9),
        proxy[:, :1],
        groups=np.where(np.arange(20) < 9, np.arange(20) % 7, np.arange(20)),
    )
    assert math.isnan(shared.interval.low)
    assert shared.interval.reason == "an interval needs at least 8 exact independent pairs, found 7"


def test_p_is_the_counterpart_of_the_interval() -> None:
    generator = np.random.default_rng(8)
    proxy = generator.normal(0.3, size=(40, 200))
    exact = first(proxy + 0.5 * generator.normal(size=(40, 200)), 12)
    for confidence in (0.8, 0.95):
        results = cv.control_variate_means(exact, proxy, confidence=confidence)
        apart = np.array([not r.interval.low <= 0.0 <= r.interval.high for r in results])
        assert 0 < apart.sum() < 200
        np.testing.assert_array_equal(np.array([r.p for r in results]) < 1 - confidence, apart)
    # Without a proxy it is that of the t test; where every pair is exact, that of the plain mean.
    (plain,) = cv.control_variate_means(exact[:, :1], np.zeros((40, 1)))
    assert plain.p == pytest.approx(stats.ttest_1samp(exact[:12, 0], 0.0).pvalue, rel=1e-9)
    (complete,) = cv.control_variate_means(exact[:12, :1], proxy[:12, :1])
    assert complete.p == mean_p_values(exact[:12, :1])[0]


def test_pairs_that_repeat_themselves_do_not_narrow_the_interval() -> None:
    """Both terms of the variance, and the degrees of freedom, are those of as many pairs as there are groups."""
    exact, proxy = population(30, 4, seed=2)
    measured = first(exact, 12)
    groups = np.repeat(np.arange(30), 4)
    once = cv.control_variate_means(measured, proxy)
    copies = np.repeat(measured, 4, axis=0), np.repeat(proxy, 4, axis=0)
    again = cv.control_variate_means(*copies, groups=groups)
    apart = cv.control_variate_means(*copies)
    for one, grouped, single in zip(once, again, apart, strict=True):
        width, as_groups, as_pairs = (r.interval.high - r.interval.low for r in (one, grouped, single))
        # Slopes are fitted with the other copies of a pair, so residuals look somewhat smaller than they are.
        assert 0.7 * width < as_groups < 1.05 * width
        assert as_pairs < 0.65 * width
    unused = [
        cv.control_variate_means(m, np.zeros(m.shape), groups=g) for m, g in ((measured, None), (copies[0], groups))
    ]
    for one, grouped in zip(*unused, strict=True):
        assert numbers(grouped)[0] == pytest.approx(numbers(one)[0])
        assert numbers(grouped)[2] == pytest.approx(numbers(one)[2], rel=0.05)
        assert grouped.p == pytest.approx(one.p, rel=0.3)
    alone = np.arange(30)[::-1]
    assert cv.control_variate_means(measured, proxy, groups=alone) == once


@pytest.mark.parametrize("n", [10, 20])
def test_a_patched_pair_without_a_number_is_not_left_out(n: int) -> None:
    """NaN stands for what was not patched, and may also be what came out; ``patched`` tells them apart."""
    exact, proxy = population(20, 3)
    exact, patched = first(exact, n), np.zeros(exact.shape, dtype=bool)
    patched[:n] = True
    whole = cv.control_variate_means(exact, proxy)
    assert cv.control_variate_means(exact, proxy, patched=patched) == whole
    exact[4, 1] = np.nan
    left, broken, right = cv.control_variate_means(exact, proxy, patched=patched)
    assert math.isnan(broken.interval.mean) and math.isnan(broken.p) and broken.explained == 0.0
    assert broken.interval.reason is not None and "not finite" in broken.interval.reason.replace(
        "are not", "not finite"
    )
    assert (left, right) == (whole[0], whole[2])
    assert (broken.exact_pairs, cv.control_variate_means(exact, proxy)[1].exact_pairs) == (n, n - 1)


def test_values_that_are_not_finite() -> None:
    exact, proxy = population(20, 4)
    exact = first(exact, 10)
    proxy[15, 0], proxy[2, 1] = np.nan, np.inf
    exact[4, 2] = np.inf
    unseen, seen, infinite, fine = cv.control_variate_means(exact, proxy)
    for column, result in enumerate((unseen, seen)):
        np.testing.assert_allclose(numbers(result), plain_t(exact[:10, column]), rtol=1e-12)
        assert result.reason == "proxy not used: 1 of 20 proxies are not finite"
    assert math.isnan(infinite.interval.mean)
    assert infinite.interval.reason == "1 of 10 exact values are not finite"
    assert fine == cv.control_variate_means(exact[:, 3:], proxy[:, 3:])[0]


@pytest.mark.parametrize(
    ("exact", "proxy", "options", "found"),
    [
        (np.ones((3, 2)), np.ones((3, 1)), {}, r"\[3, 2\] and \[3, 1\]"),
        (np.ones(3), np.ones(3), {}, r"\[3\] and \[3\]"),
        (np.ones((0, 2)), np.ones((0, 2)), {}, r"\[0, 2\] and \[0, 2\]"),
        (np.ones((3, 1)), np.ones((3, 1)), {"confidence": 1.0}, r"found 1\.0"),
        (np.ones((3, 1)), np.ones((3, 1)), {"resamples": 0}, "found 0"),
    ],
)
def test_wrong_arguments_are_refused(exact: np.ndarray, proxy: np.ndarray, options: dict, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        cv.control_variate_means(exact, proxy, **options)


def test_what_is_known_of_every_pair_stands_beside_attribution() -> None:
    """Effects that attribution hardly sees and the shift nearly is: worth nearly all pairs, and only then."""
    generator = np.random.default_rng(3)
    shift = generator.normal(size=96)
    effect = np.where(np.arange(96) < 16, shift + 0.1 * generator.normal(size=96), np.nan)[:, None]
    attribution = generator.normal(size=(96, 1, 1))
    (alone,) = cv.control_variate_means(effect, attribution)
    (joint,) = cv.control_variate_means(effect, cv.beside_attribution(attribution, shift, 16))
    assert alone.equivalent_pairs < 20
    assert joint.equivalent_pairs > 80
    assert joint.interval.high - joint.interval.low < 0.6 * (alone.interval.high - alone.interval.low)
    assert cv.beside_attribution(attribution, shift, 9) is attribution
    shift[50] = np.inf
    assert cv.beside_attribution(attribution, shift, 16) is attribution
