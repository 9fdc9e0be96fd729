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
from align_audit.measures.interval import Interval
from align_audit.measures.resampling import resample_indices
from tests.helpers.small_samples import hull, without_each


def finite(shape: object) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=st.floats(-1e6, 1e6, width=32))


def widened(groups: int, confidence: float) -> float:
    """The share of resamples in either tail, as Student's t and a variance of (G − 1)/G of the true one ask for."""
    t = stats.t.ppf((1 - confidence) / 2, groups - 1)
    return float(stats.norm.cdf(t * math.sqrt(groups / (groups - 1))))


def same(a: s.Interval, b: s.Interval, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose((a.mean, a.low, a.high), (b.mean, b.low, b.high), rtol=rtol, atol=1e-15)
    assert a.reason == b.reason


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("ties", [False, True])
def test_mean_interval_equals_scipy(method: s.Method, confidence: float, ties: bool) -> None:
    values = np.random.default_rng(1).exponential(size=37)
    if ties:
        values = np.round(values)
    ours = s.mean_interval(values, resamples=999, confidence=confidence, method=method, seed=5)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=999,
        confidence_level=1 - 2 * widened(37, confidence),
        method={"percentile": "percentile", "bca": "BCa"}[method],
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), rel=1e-14)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_mean_intervals_equals_a_plain_loop() -> None:
    values = np.random.default_rng(2).normal(size=(33, 3))
    indices = resample_indices(33, 200, seed=8)
    tail = 100 * widened(33, 0.9)
    for column, interval in enumerate(s.mean_intervals(values, resamples=200, confidence=0.9, seed=8)):
        means = sorted(sum(values[i, column] for i in row) / 33 for row in indices)
        low, high = np.percentile(means, [tail, 100 - tail])
        assert (interval.mean, interval.low, interval.high) == pytest.approx((values[:, column].mean(), low, high))


def test_intervals_over_groups_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(5)
    groups = generator.permutation(np.resize(np.arange(34), 70))
    values = generator.normal(size=(70, 2)) + generator.normal(size=34)[groups, None]
    members = [np.flatnonzero(groups == group) for group in range(34)]
    tail = 100 * widened(34, 0.9)
    found = s.mean_intervals(values, resamples=200, confidence=0.9, seed=8, groups=groups)
    for column, interval in enumerate(found):
        means = []
        for row in resample_indices(34, 200, seed=8):
            drawn = [values[i, column] for group in row for i in members[group]]
            means.append(sum(drawn) / len(drawn))
        low, high = np.percentile(means, [tail, 100 - tail])
        assert (interval.mean, interval.low, interval.high) == pytest.approx((values[:, column].mean(), low, high))


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("pairs", [8, 20, 31])
def test_intervals_of_few_pairs_are_the_wider_of_two(method: s.Method, pairs: int) -> None:
    values = np.random.default_rng(pairs).exponential(size=(pairs, 2)) ** 2
    found = s.mean_intervals(values, resamples=300, confidence=0.9, method=method, seed=4)
    for column, interval in enumerate(found):
        mean = values[:, column].mean()
        student = stats.ttest_1samp(values[:, column], 0.0).confidence_interval(0.9)
        low, high = hull(mean, without_each(values[:, column]), 0.9, 300, 4)
        assert (interval.mean, interval.low, interval.high) == pytest.approx((mean, low, high), rel=1e-9)
        assert interval.low <= student.low + 1e-12
        assert interval.high >= student.high - 1e-12
        assert interval.high - mean > 1.05 * (mean - interval.low)  # skewed to the right, as the values are


def test_intervals_of_few_groups_leave_out_a_group_at_a_time() -> None:
    generator = np.random.default_rng(6)
    groups = np.array([3, 3, 3, 0, 8, 8, 1, 2, 2, 4, 5, 6, 6, 7])
    pairs = generator.gamma(3.0, size=(14, 2))
    (found,) = s.statistic_intervals(pairs, lambda m: m[..., :1] / m[..., 1:], 200, confidence=0.9, groups=groups)
    ratios = []
    for left_out in range(9):
        kept = [pairs[i] for i in range(14) if groups[i] != left_out]
        ratios.append(sum(pair[0] for pair in kept) / sum(pair[1] for pair in kept))
    estimate = pairs[:, 0].sum() / pairs[:, 1].sum()
    assert (found.mean, found.low, found.high) == pytest.approx(
        (estimate, *hull(estimate, ratios, 0.9, 200, 0)), rel=1e-9
    )


@pytest.mark.parametrize("groups", [8, 31, 32, 64])
def test_pairs_that_repeat_themselves_narrow_no_interval(groups: int) -> None:
    generator = np.random.default_rng(groups)
    values, denominator = generator.normal(1.0, size=(groups, 2)), generator.gamma(9.0, size=groups)
    name = np.repeat(np.arange(groups), 8)
    for once, eightfold in zip(
        [*s.mean_intervals(values), *s.ratio_intervals(values, denominator)],
        [
            *s.mean_intervals(np.repeat(values, 8, axis=0), groups=name),
            *s.ratio_intervals(np.repeat(values, 8, axis=0), np.repeat(denominator, 8), groups=name),
        ],
        strict=True,
    ):
        same(once, eightfold, rtol=1e-9)
    apart = s.mean_interval(np.repeat(values[:, 0], 8))
    whole = s.mean_interval(values[:, 0])
    assert apart.high - apart.low < 0.5 * (whole.high - whole.low)  # as copies of their own they would


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("pairs", [8, 16, 31, 32])
def test_coverage_of_few_pairs(pairs: int, skewed: bool) -> None:
    generator = np.random.default_rng(pairs)
    values = generator.gamma(2.0, size=(pairs, 3000)) if skewed else generator.normal(2.0, size=(pairs, 3000))
    intervals = s.mean_intervals(values, resamples=400)
    assert 0.925 <= np.mean([interval.low <= 2.0 <= interval.high for interval in intervals]) <= 0.975


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
@given(finite((32, 2)))
def test_mean_interval_lies_within_the_values_and_columns_do_not_mix(values: np.ndarray) -> None:
    both = s.mean_intervals(values, resamples=50, seed=2)
    for column, interval in enumerate(both):
        slack = 1e-9 * (1 + abs(values[:, column]).max())
        bounds = values[:, column].min() - slack, values[:, column].max() + slack
        assert bounds[0] <= interval.low <= interval.high <= bounds[1]
        alone = s.mean_interval(values[:, column], resamples=50, seed=2)
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high), rel=1e-9, abs=slack)


def test_unknown_values_are_counted_and_stay_in_their_column() -> None:
    values = np.ones((8, 3))
    values[1, 0], values[2, 0], values[3, 2] = np.nan, np.inf, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, third = s.mean_intervals(values)
    assert first.reason == "2 of 8 values are not finite"
    assert third.reason == "1 of 8 values are not finite"
    assert all(map(math.isnan, (first.mean, first.low, first.high, third.mean, third.low, third.high)))
    assert second == s.Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_few_pairs_have_a_mean_and_no_interval(pairs: int) -> None:
    interval = s.mean_interval(np.linspace(2.0, 3.0, pairs))
    assert interval.mean == pytest.approx(np.linspace(2.0, 3.0, pairs).mean())
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.reason == f"an interval needs at least 8 independent pairs, found {pairs}"
    none = s.mean_interval(np.zeros(0))
    assert math.isnan(none.mean)
    assert none.reason == "an interval needs at least 8 independent pairs, found 0"
    shared = s.mean_interval(np.linspace(2.0, 3.0, 20), groups=np.resize(np.arange(pairs), 20))
    assert (shared.mean, math.isnan(shared.low)) == (pytest.approx(2.5), True)
    assert f"found {pairs} in 20 pairs (those that share a prompt are one)" in (shared.reason or "")


def test_ratio_intervals_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(4)
    numerators, denominator = generator.normal(1.0, size=(36, 2)), generator.normal(5.0, size=36)
    indices = resample_indices(36, 150, seed=6)
    tail = 100 * widened(36, 0.95)
    for column, interval in enumerate(s.ratio_intervals(numerators, denominator, resamples=150, seed=6)):
        ratios = [sum(numerators[i, column] for i in row) / sum(denominator[i] for i in row) for row in indices]
        low, high = np.percentile(ratios, [tail, 100 - tail])
        expected = numerators[:, column].sum() / denominator.sum()
        assert (interval.mean, interval.low, interval.high) == pytest.approx((expected, low, high), rel=1e-12)
        same(interval, s.ratio_interval(numerators[:, column], denominator, resamples=150, seed=6))


def test_ratio_is_paired_and_of_sums() -> None:
    denominator = np.array([1.0, 100.0, 3.0, 20.0, 60.0, 90.0, 50.0, 70.0])
    half = s.ratio_interval(denominator / 2, denominator)
    assert (half.mean, half.low, half.high) == (0.5, 0.5, 0.5)  # exact only if pairs move together
    skewed = s.ratio_interval(np.eye(8)[0], denominator)
    assert skewed.mean == pytest.approx(1 / 394)  # the mean of ratios would be 1/8
    assert s.ratio_interval(np.zeros(8), denominator) == s.Interval(0.0, 0.0, 0.0)


SYMMETRIC = np.array([-3.0, 1.0, 3.0, -1.0] * 2)
HULL = hull(0.0, without_each(SYMMETRIC), 0.95, 500, 0)


@pytest.mark.parametrize(
    ("denominator", "reason"),
    [
        (SYMMETRIC, f"the 95% interval of mean Δ, [{HULL[0]:.4g}, {HULL[1]:.4g}], includes 0"),
        (np.zeros(8), "the 95% interval of mean Δ, [0, 0], includes 0"),
        (np.where(np.arange(8) == 1, np.nan, 1.0), "the interval of mean Δ is unknown: 1 of 8 values are not finite"),
    ],
)
def test_ratio_is_unknown_without_a_denominator(denominator: np.ndarray, reason: str) -> None:
    interval = s.ratio_interval(np.ones(8), denominator, resamples=500, denominator_name="Δ")
    assert math.isnan(interval.mean)
    assert math.isnan(interval.low)
    assert interval.reason == reason


@pytest.mark.parametrize("pairs", [1, 7])
def test_ratio_with_few_pairs_is_unknown(pairs: int) -> None:
    interval = s.ratio_interval(np.ones(pairs), np.ones(pairs), denominator_name="Δ")
    assert math.isnan(interval.mean)
    assert interval.reason == (
        f"the interval of mean Δ is unknown: an interval needs at least 8 independent pairs, found {pairs}"
    )


def test_ratio_keeps_unknown_numerators_apart() -> None:
    numerators = np.column_stack([np.arange(1.0, 9.0), [np.nan] + [1.0] * 7])
    known, unknown = s.ratio_intervals(numerators, np.arange(1.0, 9.0))
    assert (known.mean, known.low, known.high) == (1.0, 1.0, 1.0)
    assert unknown.reason == "1 of 8 numerators are not finite"


def test_negative_denominators_are_allowed() -> None:
    interval = s.ratio_interval(np.arange(1.0, 9.0), -2 * np.arange(1.0, 9.0))
    assert (interval.mean, interval.low, interval.high) == (-0.5, -0.5, -0.5)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_statistic_intervals_equal_scipy_on_a_ratio(method: s.Method) -> None:
    pairs = np.random.default_rng(9).gamma(3.0, size=(40, 2))
    (ours,) = s.statistic_intervals(
        pairs, lambda m: m[..., :1] / m[..., 1:], resamples=500, method=method, seed=1, guard=1
    )
    theirs = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        n_resamples=500,
        confidence_level=1 - 2 * widened(40, 0.95),
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
    pairs = np.zeros((32, 1))
    pairs[0] = 1.0
    (interval,) = s.statistic_intervals(pairs, lambda m: 1.0 / m, resamples=300)
    lost = int((resample_indices(32, 300, 0) != 0).all(axis=1).sum())
    assert lost > 0
    assert interval.mean == pytest.approx(32.0)
    assert math.isnan(interval.low)
    assert interval.reason == f"{lost} of 300 resamples give no finite value"


def test_statistic_that_fails_without_one_group_keeps_its_estimate() -> None:
    pairs = np.zeros((9, 1))
    pairs[0] = 1.0
    (interval,) = s.statistic_intervals(pairs, lambda m: np.where(m > 0, m, np.nan), resamples=300)
    assert interval.mean == pytest.approx(1 / 9)
    assert math.isnan(interval.low)
    assert interval.reason == "without 1 of 9 independent pairs, each for itself, there is no finite value"


def test_statistic_that_is_not_finite_is_unknown_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (interval,) = s.statistic_intervals(np.zeros((8, 2)), lambda m: m[..., :1] / m[..., 1:])
        assert math.isnan(interval.mean)
        assert interval.reason == "the statistic is not finite"
        pairs = np.ones((8, 2))
        pairs[0, 0] = np.nan
        (interval,) = s.statistic_intervals(pairs, lambda m: m[..., :1] / m[..., 1:])
        assert interval.reason == "the statistic is not finite: 1 of the values per pair are not"


def test_bca_says_where_it_is_undefined() -> None:
    # A statistic at its maximum: no resample lies above the estimate, and none at it.
    pairs = np.arange(33.0)[:, None] ** 1.1
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
        (lambda: s.statistic_intervals(np.ones((9, 1)), lambda m: np.ones(2)), r"leave-one-out .* found \[2\]"),
        (lambda: s.statistic_intervals(np.ones((32, 1)), lambda m: np.ones(2)), r"resampled .* found \[2\]"),
        (lambda: s.mean_intervals(np.ones((3, 1)), groups=np.arange(2)), r"shape \[3\]; found \[2\]"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("pairs", [40, 64])
def test_share_interval_is_wilsons(pairs: int) -> None:
    """But for its outer bound beside 0 and 1, where it is Poisson's: of 3 hits from 51 pairs on, else of 2."""
    rare = 3 if pairs > 50 else 2
    for hits in (0, 1, 2, 3, 4, 30, pairs - 4, pairs - 3, pairs - 2, pairs - 1, pairs):
        values = (np.arange(pairs) < hits).astype(float)
        found = s.share_interval(values, 0.9)
        expected = stats.binomtest(hits, pairs).proportion_ci(0.9, method="wilson")
        low, high = expected.low, expected.high
        if 0 < hits <= rare:
            low = stats.chi2.ppf(0.1, 2 * hits) / 2 / pairs
        if 0 < pairs - hits <= rare:
            high = 1 - stats.chi2.ppf(0.1, 2 * (pairs - hits)) / 2 / pairs
        np.testing.assert_allclose((found.mean, found.low, found.high), (hits / pairs, low, high), atol=1e-12)


@pytest.mark.parametrize("share", [0.95, 0.98, 0.99, 0.995, 0.998])
def test_share_interval_covers_beside_one_whatever_the_share(share: float) -> None:
    """Exactly, by the binomial distribution: Wilson's alone covers 84 % at some."""
    covered = 0.0
    for hits in range(65):
        interval = s.share_interval((np.arange(64) < hits).astype(float))
        covered += stats.binom.pmf(hits, 64, share) * (interval.low <= share <= interval.high)
    assert covered >= 0.92


def test_share_interval_covers_near_one_where_the_bootstrap_does_not() -> None:
    draws = np.random.default_rng(0).random((1000, 64)) < 0.98
    found = [s.share_interval(draw) for draw in draws]
    assert 0.92 <= np.mean([one.low <= 0.98 <= one.high for one in found]) <= 0.99
    plain = [s.mean_interval(draw, resamples=200) for draw in draws[:300]]
    assert np.mean([one.low <= 0.98 <= one.high for one in plain]) < 0.8


def test_share_interval_of_groups() -> None:
    """Groups whose pairs agree are worth one pair each; pairs that do not agree more than by chance, one each."""
    hits = (np.arange(40) < 30).astype(float)
    copies = s.share_interval(np.repeat(hits, 5), 0.9, groups=np.repeat(np.arange(40), 5))
    expected = stats.binomtest(30, 40).proportion_ci(0.9, method="wilson")
    np.testing.assert_allclose((copies.mean, copies.low, copies.high), (0.75, expected.low, expected.high), atol=1e-12)
    generator = np.random.default_rng(0)
    scattered = (generator.random(2000) < 0.7).astype(float)
    apart, shared = s.share_interval(scattered), s.share_interval(scattered, groups=np.repeat(np.arange(500), 4))
    assert 0.9 < (shared.high - shared.low) / (apart.high - apart.low) < 1.15
    assert shared.high - shared.low >= apart.high - apart.low
    ones = s.share_interval(np.ones(40), groups=np.repeat(np.arange(8), 5))
    eight = s.share_interval(np.ones(8))
    assert (ones.low, ones.high) == pytest.approx((eight.low, 1.0))


def test_share_interval_of_correlated_pairs_covers() -> None:
    """Twenty prompts of six pairs, of which most agree: the interval of independent pairs would miss far more often."""
    generator = np.random.default_rng(1)
    own = generator.random((1000, 20, 1)) < 0.6
    hits = np.where(generator.random((1000, 20, 6)) < 0.8, own, generator.random((1000, 20, 6)) < 0.6).reshape(
        1000, 120
    )
    names = np.repeat(np.arange(20), 6)
    grouped = [s.share_interval(row, groups=names) for row in hits]
    assert 0.92 <= np.mean([one.low <= 0.6 <= one.high for one in grouped]) <= 0.98
    assert np.mean([one.low <= 0.6 <= one.high for one in map(s.share_interval, hits)]) < 0.75


def test_share_interval_of_what_is_not_known() -> None:
    assert s.share_interval(np.array([1.0, np.nan])).reason == "1 of 2 values are not finite"
    assert s.share_interval(np.array([])).reason == "an interval needs at least 8 independent pairs, found 0"
    one = s.share_interval(np.array([1.0]))
    assert (one.mean, math.isnan(one.low)) == (1.0, True)
    seven = s.share_interval(np.resize([1.0, 0.0], 14), groups=np.resize(np.arange(7), 14))
    assert (seven.mean, math.isnan(seven.low)) == (0.5, True)
    assert "found 7 in 14 pairs" in (seven.reason or "")
    with pytest.raises(ValueError, match="expected 0, 1 or NaN"):
        s.share_interval(np.array([0.5]))


FEW_DIFFER = {
    "one of eight": [32.0] * 7 + [10.0],
    "one above nothing": [0.0] * 7 + [0.3],
    "one of sixteen": [0.0] * 15 + [0.3],
    "two of eight": [0.0] * 6 + [0.25, 0.25],
    "rounding beside one": [1e-9 * place for place in range(9)] + [0.3],
    "rounding far from 0": [1000.0 + 1e-7 * place for place in range(9)] + [1003.0],
}


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("values", FEW_DIFFER.values(), ids=FEW_DIFFER)
def test_where_few_pairs_differ_bounds_are_finite(values: list[float], method: s.Method) -> None:
    """A resample of the others alone has no spread: what is unlikely by it is not unlikely by the pairs."""
    interval = s.mean_interval(np.array(values), method=method)
    student = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    widest = stats.t.ppf(0.975, 1) * stats.sem(values)
    assert interval.reason is None
    assert interval.mean - 1.001 * widest <= interval.low <= student.low + 1e-12
    assert student.high - 1e-12 <= interval.high <= interval.mean + 1.001 * widest


@pytest.mark.parametrize("groups", range(8, 32))
def test_bounds_of_shares_that_repeat_are_finite(groups: int) -> None:
    rng = np.random.default_rng(groups)
    for _ in range(20):
        values = np.where(rng.random(groups) < 0.2, rng.integers(1, 4, groups) / 10, 0.0)
        interval = s.mean_interval(values, resamples=200).within(0.0, 1.0)
        assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0
        assert interval.reason is None


def test_a_range_ends_an_interval_and_leaves_what_is_not_known() -> None:
    assert Interval(0.1, -0.2, 1.3).within(0.0, 1.0) == Interval(0.1, 0.0, 1.0)
    unknown = Interval.unknown("too few").within(0.0, 1.0)
    assert math.isnan(unknown.low) and math.isnan(unknown.high) and unknown.reason == "too few"
