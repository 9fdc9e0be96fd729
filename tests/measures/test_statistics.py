"""Intervals against SciPy, plain loops and planted truths."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from align_audit.measures import statistics as s


def finite(shape: object) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=st.floats(-1e6, 1e6, width=32))


def same(a: s.Interval, b: s.Interval, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose((a.mean, a.low, a.high), (b.mean, b.low, b.high), rtol=rtol, atol=1e-15)
    assert a.reason == b.reason


def test_resample_indices_is_local_and_repeatable() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = s.resample_indices(7, 50, seed=3)
    assert first.shape == (50, 7)
    assert set(np.unique(first)) == set(range(7))
    np.testing.assert_array_equal(first, s.resample_indices(7, 50, seed=3))
    assert not np.array_equal(first, s.resample_indices(7, 50, seed=4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(("n", "resamples"), [(0, 5), (5, 0)])
def test_resample_indices_refuses(n: int, resamples: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, resamples={resamples}"):
        s.resample_indices(n, resamples, seed=0)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("ties", [False, True])
def test_mean_interval_equals_scipy(method: s.Method, confidence: float, ties: bool) -> None:
    values = np.random.default_rng(1).exponential(size=23)
    if ties:
        values = np.round(values)
    ours = s.mean_interval(values, resamples=999, confidence=confidence, method=method, seed=5)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=999,
        confidence_level=confidence,
        method={"percentile": "percentile", "bca": "BCa"}[method],
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), rel=1e-14)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_mean_intervals_equals_a_plain_loop() -> None:
    values = np.random.default_rng(2).normal(size=(9, 3))
    indices = s.resample_indices(9, 200, seed=8)
    for column, interval in enumerate(s.mean_intervals(values, resamples=200, confidence=0.9, seed=8)):
        means = sorted(sum(values[i, column] for i in row) / 9 for row in indices)
        low, high = np.percentile(means, [5, 95])
        assert (interval.mean, interval.low, interval.high) == pytest.approx((values[:, column].mean(), low, high))


def test_methods_differ_on_skewed_values() -> None:
    values = np.random.default_rng(0).lognormal(sigma=1.5, size=40)
    percentile, bca = (s.mean_interval(values, method=method) for method in ("percentile", "bca"))
    assert bca.low > percentile.low
    assert bca.high > percentile.high


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("skewed", [False, True])
def test_coverage_of_the_true_mean(method: s.Method, skewed: bool) -> None:
    generator = np.random.default_rng(11)
    hits = 0
    for draw in range(300):
        values = generator.gamma(2.0, size=64) if skewed else generator.normal(2.0, size=64)
        interval = s.mean_interval(values, resamples=400, method=method, seed=draw)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.99


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e300])
def test_equal_values_stay_exact(method: s.Method, value: float) -> None:
    values = np.column_stack([np.full(13, value), np.random.default_rng(0).normal(size=13)])
    constant, other = s.mean_intervals(values, resamples=300, method=method)
    assert (constant.mean, constant.low, constant.high, constant.reason) == (value, value, value, None)
    assert other.low < other.mean < other.high


@settings(max_examples=50, deadline=None)
@given(finite((6, 2)))
def test_mean_interval_lies_within_the_values_and_columns_do_not_mix(values: np.ndarray) -> None:
    both = s.mean_intervals(values, resamples=50, seed=2)
    for column, interval in enumerate(both):
        slack = 1e-9 * (1 + abs(values[:, column]).max())
        bounds = values[:, column].min() - slack, values[:, column].max() + slack
        assert bounds[0] <= interval.low <= interval.high <= bounds[1]
        alone = s.mean_interval(values[:, column], resamples=50, seed=2)
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high), rel=1e-9, abs=slack)


def test_unknown_values_are_counted_and_stay_in_their_column() -> None:
    values = np.ones((5, 3))
    values[1, 0], values[2, 0], values[3, 2] = np.nan, np.inf, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, third = s.mean_intervals(values)
    assert first.reason == "2 of 5 values are not finite"
    assert third.reason == "1 of 5 values are not finite"
    assert all(map(math.isnan, (first.mean, first.low, first.high, third.mean, third.low, third.high)))
    assert second == s.Interval(1.0, 1.0, 1.0)


def test_one_pair_has_a_mean_and_no_interval() -> None:
    interval = s.mean_interval(np.array([2.5]))
    assert interval.mean == 2.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.reason == "an interval needs at least 2 pairs, found 1"
    none = s.mean_interval(np.zeros(0))
    assert math.isnan(none.mean)
    assert none.reason == "an interval needs at least 2 pairs, found 0"


def test_ratio_intervals_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(4)
    numerators, denominator = generator.normal(1.0, size=(8, 2)), generator.normal(5.0, size=8)
    indices = s.resample_indices(8, 150, seed=6)
    for column, interval in enumerate(s.ratio_intervals(numerators, denominator, resamples=150, seed=6)):
        ratios = [sum(numerators[i, column] for i in row) / sum(denominator[i] for i in row) for row in indices]
        low, high = np.percentile(ratios, [2.5, 97.5])
        expected = numerators[:, column].sum() / denominator.sum()
        assert (interval.mean, interval.low, interval.high) == pytest.approx((expected, low, high), rel=1e-12)
        same(interval, s.ratio_interval(numerators[:, column], denominator, resamples=150, seed=6))


def test_ratio_is_paired_and_of_sums() -> None:
    denominator = np.array([1.0, 100.0, 3.0, 20.0])
    half = s.ratio_interval(denominator / 2, denominator)
    assert (half.mean, half.low, half.high) == (0.5, 0.5, 0.5)  # exact only if pairs move together
    skewed = s.ratio_interval(np.array([1.0, 0.0, 0.0, 0.0]), denominator)
    assert skewed.mean == pytest.approx(1 / 124)  # the mean of ratios would be 1/4
    assert s.ratio_interval(np.zeros(4), denominator) == s.Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("denominator", "reason"),
    [
        (np.array([-2.0, 1.0, 2.0, -1.5]), "the 95% interval of mean Δ, [-1.75, 1.5], includes 0"),
        (np.zeros(4), "the 95% interval of mean Δ, [0, 0], includes 0"),
        (np.array([1.0, np.nan, 1.0, 1.0]), "the interval of mean Δ is unknown: 1 of 4 values are not finite"),
    ],
)
def test_ratio_is_unknown_without_a_denominator(denominator: np.ndarray, reason: str) -> None:
    interval = s.ratio_interval(np.ones(4), denominator, resamples=500, denominator_name="Δ")
    assert math.isnan(interval.mean)
    assert math.isnan(interval.low)
    assert interval.reason == reason


def test_ratio_with_one_pair_is_unknown() -> None:
    interval = s.ratio_interval(np.ones(1), np.ones(1), denominator_name="Δ")
    assert math.isnan(interval.mean)
    assert interval.reason == "the interval of mean Δ is unknown: an interval needs at least 2 pairs, found 1"


def test_ratio_keeps_unknown_numerators_apart() -> None:
    numerators = np.array([[1.0, np.nan], [2.0, 1.0], [3.0, 1.0]])
    known, unknown = s.ratio_intervals(numerators, np.array([1.0, 2.0, 3.0]))
    assert (known.mean, known.low, known.high) == (1.0, 1.0, 1.0)
    assert unknown.reason == "1 of 3 numerators are not finite"


def test_negative_denominators_are_allowed() -> None:
    interval = s.ratio_interval(np.array([1.0, 2.0, 3.0]), np.array([-2.0, -4.0, -6.0]))
    assert (interval.mean, interval.low, interval.high) == (-0.5, -0.5, -0.5)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_statistic_intervals_equal_scipy_on_a_ratio(method: s.Method) -> None:
    pairs = np.random.default_rng(9).gamma(3.0, size=(30, 2))
    (ours,) = s.statistic_intervals(
        pairs, lambda m: m[..., :1] / m[..., 1:], resamples=500, method=method, seed=1, guard=1
    )
    theirs = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        n_resamples=500,
        method={"percentile": "percentile", "bca": "BCa"}[method],
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-10)


def test_gains_from_column_means_sum_to_one() -> None:
    generator = np.random.default_rng(3)
    pairs = np.cumsum(generator.gamma(2.0, size=(20, 5)), axis=1)

    def gains(means: np.ndarray) -> np.ndarray:
        recovery = means / means[..., -1:]
        return np.diff(recovery, axis=-1, prepend=0.0)

    intervals = s.statistic_intervals(pairs, gains, guard=-1)
    assert sum(interval.mean for interval in intervals) == pytest.approx(1.0)
    # Gains are far better known than the difference of two separate intervals would say.
    recovery = s.ratio_intervals(pairs, pairs[:, -1])
    assert intervals[3].high - intervals[3].low < (recovery[3].high - recovery[2].low)


def test_statistic_that_fails_on_some_resamples_keeps_its_estimate() -> None:
    pairs = np.array([[1.0], [0.0], [0.0]])
    (interval,) = s.statistic_intervals(pairs, lambda m: 1.0 / m, resamples=300)
    lost = int((s.resample_indices(3, 300, 0) != 0).all(axis=1).sum())
    assert lost > 0
    assert interval.mean == pytest.approx(3.0)
    assert math.isnan(interval.low)
    assert interval.reason == f"{lost} of 300 resamples give no finite value"


def test_statistic_that_is_not_finite_is_unknown_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (interval,) = s.statistic_intervals(np.zeros((4, 2)), lambda m: m[..., :1] / m[..., 1:])
        assert math.isnan(interval.mean)
        assert interval.reason == "the statistic is not finite"
        pairs = np.ones((4, 2))
        pairs[0, 0] = np.nan
        (interval,) = s.statistic_intervals(pairs, lambda m: m[..., :1] / m[..., 1:])
        assert interval.reason == "the statistic is not finite: 1 of the values per pair are not"


def test_bca_says_where_it_is_undefined() -> None:
    # A statistic at its maximum: no resample lies above the estimate, and none at it.
    pairs = np.array([0.0, 1.0, 2.3, 3.9, 5.1, 7.7])[:, None]
    estimate = pairs.mean()
    (interval,) = s.statistic_intervals(pairs, lambda m: -abs(m - estimate), resamples=7, method="bca", seed=3)
    assert interval.mean == 0.0
    assert math.isnan(interval.low)
    assert interval.reason is not None
    assert "BCa is undefined" in interval.reason


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: s.mean_interval(np.ones((2, 2))), r"found shape \[2, 2\]"),
        (lambda: s.mean_intervals(np.ones(3)), r"found shape \[3\]"),
        (lambda: s.mean_intervals(np.ones((3, 1)), resamples=0), "found 0"),
        (lambda: s.mean_intervals(np.ones((3, 1)), confidence=1.0), r"found 1\.0"),
        (lambda: s.mean_intervals(np.ones((3, 1)), method="basic"), "found 'basic'"),  # type: ignore[arg-type]
        (lambda: s.ratio_interval(np.ones((3, 1)), np.ones(3)), r"found shape \[3, 1\]"),
        (lambda: s.ratio_intervals(np.ones((3, 1)), np.ones(2)), r"shape \[3\]; found shape \[2\]"),
        (lambda: s.statistic_intervals(np.ones((3, 1)), lambda m: m, guard=1), "found 1"),
        (lambda: s.statistic_intervals(np.ones((3, 1)), lambda m: m.sum()), r"found \[\]"),
        (lambda: s.statistic_intervals(np.ones((3, 1)), lambda m: np.ones(2)), r"found \[2\]"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


def test_share_interval_is_wilsons() -> None:
    for hits in (0, 1, 40, 63, 64):
        values = (np.arange(64) < hits).astype(float)
        found = s.share_interval(values, 0.9)
        expected = stats.binomtest(hits, 64).proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose(
            (found.mean, found.low, found.high), (hits / 64, expected.low, expected.high), atol=1e-12
        )


def test_share_interval_covers_near_one_where_the_bootstrap_does_not() -> None:
    draws = np.random.default_rng(0).random((1000, 64)) < 0.98
    found = [s.share_interval(draw) for draw in draws]
    assert 0.92 <= np.mean([one.low <= 0.98 <= one.high for one in found]) <= 0.99
    plain = [s.mean_interval(draw, resamples=200) for draw in draws[:300]]
    assert np.mean([one.low <= 0.98 <= one.high for one in plain]) < 0.8


def test_share_interval_of_what_is_not_known() -> None:
    assert s.share_interval(np.array([1.0, np.nan])).reason == "1 of 2 values are not finite"
    assert s.share_interval(np.array([])).reason == "an interval needs at least 2 pairs, found 0"
    one = s.share_interval(np.array([1.0]))
    assert (one.mean, math.isnan(one.low)) == (1.0, True)
    with pytest.raises(ValueError, match="expected 0, 1 or NaN"):
        s.share_interval(np.array([0.5]))
