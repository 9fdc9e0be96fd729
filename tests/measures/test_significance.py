"""P-values, false discoveries and agreement against SciPy, plain loops and planted truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from align_audit.measures.resampling import resample_indices
from align_audit.measures.significance import benjamini_hochberg, mean_p_values, split_half_agreement
from align_audit.measures.statistics import mean_intervals
from tests.helpers.small_samples import p_value, without_each


def test_p_values_equal_a_plain_loop() -> None:
    values = np.random.default_rng(7).normal([0.0, 0.4, -0.8], size=(35, 3))
    indices = resample_indices(35, 199, seed=2)
    for column, p in enumerate(mean_p_values(values, resamples=199, seed=2)):
        means = [sum(values[i, column] for i in row) for row in indices]
        at_or_below, at_or_above = sum(m <= 0 for m in means), sum(m >= 0 for m in means)
        assert p == min(1.0, 2 * (1 + min(at_or_below, at_or_above)) / 200)


def test_p_values_of_groups_resample_groups() -> None:
    generator = np.random.default_rng(3)
    values, groups = generator.normal(0.3, size=(60, 2)), generator.permutation(np.resize(np.arange(33), 60))
    members = [np.flatnonzero(groups == group) for group in range(33)]
    indices = resample_indices(33, 199, seed=5)
    for column, p in enumerate(mean_p_values(values, resamples=199, seed=5, groups=groups)):
        means = [sum(values[i, column] for group in row for i in members[group]) for row in indices]
        at_or_below, at_or_above = sum(m <= 0 for m in means), sum(m >= 0 for m in means)
        assert p == min(1.0, 2 * (1 + min(at_or_below, at_or_above)) / 200)


@pytest.mark.parametrize("pairs", [8, 15, 31])
def test_p_values_of_few_pairs_are_the_larger_of_two(pairs: int) -> None:
    values = np.random.default_rng(pairs).normal([0.0, 0.4, -0.8, 9.0], size=(pairs, 4)) ** 3
    found = mean_p_values(values, resamples=299, seed=6)
    expected = [p_value(column.mean(), without_each(column), 299, 6) for column in values.T]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (found >= stats.ttest_1samp(values, 0.0).pvalue * (1 - 1e-9)).all()
    # Pairs that say the same twice are no more than once.
    twice = np.repeat(values, 3, axis=0)
    again = mean_p_values(twice, resamples=299, seed=6, groups=np.repeat(np.arange(pairs), 3))
    np.testing.assert_allclose(again, expected, rtol=1e-9)


def test_p_values_of_few_groups_leave_out_a_group_at_a_time() -> None:
    generator = np.random.default_rng(2)
    groups = generator.permutation(np.resize(np.arange(11), 40))
    values = generator.normal(0.3, size=(40, 3))
    expected = [p_value(column.mean(), without_each(column, groups), 299, 6) for column in values.T]
    np.testing.assert_allclose(mean_p_values(values, 299, 6, groups), expected, rtol=1e-9)


@pytest.mark.parametrize("pairs", [8, 31])
def test_p_values_of_few_pairs_are_the_counterpart_of_their_interval(pairs: int) -> None:
    generator = np.random.default_rng(0)
    groups = np.resize(np.arange(pairs), pairs + 5)
    values = generator.normal(0.5, size=(pairs + 5, 300))
    p = mean_p_values(values, groups=groups)
    beyond = np.array([not interval.low <= 0.0 <= interval.high for interval in mean_intervals(values, groups=groups)])
    assert 0 < beyond.sum() < 300
    apart = abs(p - 0.05) > 0.0021  # p counts the data as a resample more, the interval does not
    assert apart.mean() > 0.95
    np.testing.assert_array_equal((p < 0.05)[apart], beyond[apart])


@pytest.mark.parametrize(("pairs", "columns"), [(8, 3000), (16, 3000), (64, 1500)])
def test_p_values_hold_their_level_and_find_effects(pairs: int, columns: int) -> None:
    generator = np.random.default_rng(0)
    null = mean_p_values(generator.normal(size=(pairs, columns)), resamples=400)
    assert (0.03 if pairs == 64 else 0.02) <= (null < 0.05).mean() <= (0.08 if pairs == 64 else 0.06)
    for mean in (1.0, -1.0):
        found = mean_p_values(generator.normal(mean, size=(64, 1)), resamples=999)[0]
        assert found == 2 / 1000


def test_p_values_of_zeros_unknowns_and_single_pairs() -> None:
    for pairs in (12, 40):
        values = np.ones((pairs, 3))
        values[:, 0], values[2, 1] = 0.0, np.nan
        p = mean_p_values(values, resamples=99)
        assert p[0] == 1.0
        assert np.isnan(p[1])
        assert p[2] == 0.02
    assert np.isnan(mean_p_values(np.ones((7, 2)))).all()
    assert np.isnan(mean_p_values(np.ones((40, 2)), groups=np.resize(np.arange(7), 40))).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(0, 1)), st.data())
def test_benjamini_hochberg_equals_scipy_and_skips_nan(p: np.ndarray, data: st.DataObject) -> None:
    adjusted = benjamini_hochberg(p)
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p), rtol=1e-12, atol=1e-300)
    where = data.draw(st.integers(0, len(p)))
    with_nan = benjamini_hochberg(np.insert(p, where, np.nan))
    assert np.isnan(with_nan[where])
    np.testing.assert_array_equal(np.delete(with_nan, where), adjusted)


def test_benjamini_hochberg_of_nothing_known() -> None:
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)


def test_split_half_finds_a_shared_peak_and_not_noise() -> None:
    generator = np.random.default_rng(5)
    noise = generator.normal(size=(40, 10))
    planted = noise.copy()
    planted[:, 3] += 3.0
    assert split_half_agreement(planted, repeats=200) == (1.0, None)
    assert split_half_agreement(noise - noise.mean(axis=0), repeats=200).value < 0.3
    # Two sorts of pairs with different peaks: the halves often disagree although every pair is clear.
    mixed = np.zeros((40, 4))
    mixed[:20, 0], mixed[20:, 1] = 1.0, 1.001
    assert split_half_agreement(mixed, repeats=200).value < 0.5


def test_split_half_equals_a_plain_loop() -> None:
    values = np.random.default_rng(8).normal(size=(7, 3))
    generator = np.random.default_rng(2)
    agreements = 0
    for _ in range(30):
        order = list(generator.permutation(7))
        halves = [np.array([values[i] for i in part]).mean(axis=0) for part in (order[:3], order[3:])]
        agreements += int(np.argmax(halves[0]) == np.argmax(halves[1]))
    result = split_half_agreement(values, repeats=30, seed=2)
    assert 0 < result.value < 1
    assert result.value == agreements / 30


def test_split_half_splits_groups() -> None:
    values, groups = np.random.default_rng(9).normal(size=(13, 3)), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9])
    names = sorted(set(groups.tolist()))
    generator = np.random.default_rng(2)
    agreements = 0
    for _ in range(40):
        order = [names[place] for place in generator.permutation(8)]
        halves = [values[np.isin(groups, part)].mean(axis=0) for part in (order[:4], order[4:])]
        agreements += int(np.argmax(halves[0]) == np.argmax(halves[1]))
    result = split_half_agreement(values, repeats=40, seed=2, groups=groups)
    assert 0 < result.value < 1
    assert result.value == agreements / 40
    # Copies in both halves would agree with themselves.
    noise = np.random.default_rng(1).normal(size=(8, 12))
    noise -= noise.mean(axis=0)
    copies, group = np.repeat(noise, 8, axis=0), np.repeat(np.arange(8), 8)
    once = split_half_agreement(noise, repeats=200)
    assert split_half_agreement(copies, repeats=200, groups=group) == once
    assert split_half_agreement(copies[:24], groups=group[:24]).reason == (
        "half splits need at least 4 independent pairs, found 3"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((3, 5)), "half splits need at least 4 independent pairs, found 3"),
        (np.ones((8, 1)), "a peak among layers needs at least 2 of them, found 1"),
        (np.zeros((8, 5)), "no peak to agree on: several layers share the largest mean"),
        (np.array([[1.0, np.nan]] * 4), "4 of 8 values are not finite"),
    ],
)
def test_split_half_says_why_it_is_unknown(values: np.ndarray, reason: str) -> None:
    result = split_half_agreement(values)
    assert math.isnan(result.value)
    assert result.reason == reason


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: mean_p_values(np.ones(3)), r"found shape \[3\]"),
        (lambda: benjamini_hochberg(np.array([0.5, 1.5])), "1.5"),
        (lambda: benjamini_hochberg(np.array([0.5, np.inf])), "inf"),
        (lambda: split_half_agreement(np.ones(3)), r"found shape \[3\]"),
        (lambda: split_half_agreement(np.ones((8, 3)), repeats=0), "repeats=0"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]
