"""Groups of pairs and their resamples against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align_audit.measures import resampling as r
from tests.helpers.small_samples import studentized_draws

LABELS = st.lists(st.integers(-3, 6), min_size=1, max_size=30)


def members(groups: list[int]) -> list[list[int]]:
    """Places of the pairs of each group, groups in ascending order."""
    return [[i for i, name in enumerate(groups) if name == group] for group in sorted(set(groups))]


def test_resample_indices_is_local_and_repeatable() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = r.resample_indices(7, 50, seed=3)
    assert first.shape == (50, 7)
    assert set(np.unique(first)) == set(range(7))
    np.testing.assert_array_equal(first, r.resample_indices(7, 50, seed=3))
    assert not np.array_equal(first, r.resample_indices(7, 50, seed=4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(("n", "resamples"), [(0, 5), (5, 0)])
def test_resample_indices_refuses(n: int, resamples: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, resamples={resamples}"):
        r.resample_indices(n, resamples, seed=0)


@settings(max_examples=80, deadline=None)
@given(LABELS, st.integers(0, 99))
def test_groups_equal_plain_loops(groups: list[int], seed: int) -> None:
    together, expected = r.Groups.of(np.array(groups), len(groups)), members(groups)
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(len(groups), 2))
    assert together.count == len(expected)
    assert together.sizes.tolist() == [len(places) for places in expected]
    assert together.alone == (len(set(groups)) == len(groups))
    assert [sorted(set(groups))[label] for label in together.labels] == groups
    np.testing.assert_allclose(together.sums(values), [sum(values[i] for i in places) for places in expected])
    chosen = generator.integers(0, len(expected), size=5)
    assert together.rows(chosen).tolist() == [i for group in chosen for i in expected[group]]


def test_without_names_every_pair_is_a_group() -> None:
    values = np.arange(8.0).reshape(4, 2)
    together = r.Groups.of(None, 4)
    assert (together.count, together.alone, together.sizes.tolist()) == (4, True, [1.0] * 4)
    np.testing.assert_array_equal(together.sums(values), values)
    assert together.rows(np.array([2, 0, 2])).tolist() == [2, 0, 2]
    empty = r.Groups.of(np.empty(0), 0)
    assert (empty.count, len(empty.sizes)) == (0, 0)


def test_groups_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each of 3 pairs, shape \[3\]; found \[2\]"):
        r.Groups.of(np.array([0, 1]), 3)


def test_fewer_than_eight_groups_are_too_few() -> None:
    assert r.LEAST_GROUPS == 8
    assert r.Groups.of(None, 8).too_few() is None
    assert r.Groups.of(None, 7).too_few() == "an interval needs at least 8 independent pairs, found 7"
    assert r.Groups.of(np.resize(np.arange(8), 20), 20).too_few() is None
    assert r.Groups.of(np.resize(np.arange(7), 20), 20).too_few() == (
        "an interval needs at least 8 independent pairs, found 7 in 20 pairs (those that share a prompt are one)"
    )


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(0, 99))
def test_resampled_means_equal_a_plain_loop(groups: list[int], seed: int) -> None:
    places = members(groups)
    values = np.random.default_rng(seed).normal(size=(len(groups), 2))
    means = r.column_means(values)
    drawn = r.resampled_means(values, means, 20, seed, np.array(groups))
    for mean, row in zip(drawn, r.resample_indices(len(places), 20, seed), strict=True):
        pairs = [values[i] for group in row for i in places[group]]
        np.testing.assert_allclose(mean, sum(pairs) / len(pairs), rtol=1e-9, atol=1e-12)


def test_equal_values_keep_their_mean_in_every_resample() -> None:
    values = np.column_stack([np.full(12, 0.1), np.arange(12.0)])
    groups = np.resize(np.arange(5), 12)
    means = r.column_means(values)
    assert means[0] == 0.1
    drawn = r.resampled_means(values, means, 50, 0, groups)
    assert (drawn[:, 0] == 0.1).all()
    assert len(set(drawn[:, 1])) > 10
    assert (r.leave_one_out_means(values, means, groups)[:, 0] == 0.1).all()
    assert r.standard_errors(values, groups)[0] == 0.0
    assert np.isnan(r.column_means(np.empty((0, 2)))).all()


def test_leave_one_out_means_equal_a_plain_loop() -> None:
    groups = [4, 1, 4, 7, 1, 1, 0]
    values = np.random.default_rng(0).normal(size=(7, 2))
    without = r.leave_one_out_means(values, r.column_means(values), np.array(groups))
    for mean, left_out in zip(without, [0, 1, 4, 7], strict=True):
        np.testing.assert_allclose(
            mean, np.mean([v for v, g in zip(values, groups, strict=True) if g != left_out], axis=0)
        )


def test_standard_errors_are_the_means_own_and_those_of_groups_the_jackknifes() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(20, 3))
    np.testing.assert_allclose(r.standard_errors(values), stats.sem(values), rtol=1e-12)
    # Copies say nothing new; of groups of one size it is the error of the groups' means.
    np.testing.assert_allclose(
        r.standard_errors(np.repeat(values, 4, axis=0), np.repeat(np.arange(20), 4)), stats.sem(values)
    )
    groups = generator.permutation(np.repeat(np.arange(5), 4))
    of_groups = np.array([values[groups == group].mean(axis=0) for group in range(5)])
    np.testing.assert_allclose(r.standard_errors(values, groups), stats.sem(of_groups), rtol=1e-12)


def test_resample_counts_say_how_often_each_group_was_drawn() -> None:
    counts = r.resample_counts(9, 20, seed=4)
    for row, drawn in zip(counts, r.resample_indices(9, 20, seed=4), strict=True):
        assert row.tolist() == [list(drawn).count(group) for group in range(9)]


def test_studentized_draws_equal_a_plain_loop() -> None:
    values = np.random.default_rng(2).exponential(size=(9, 2))
    without = r.leave_one_out_means(values, r.column_means(values))
    drawn = r.studentized(8 * (without.mean(axis=0) - without), 150, seed=7)
    for column in range(2):
        expected = studentized_draws(without[:, column].tolist(), 150, 7)
        np.testing.assert_allclose(np.sort(drawn[:, column]), expected, rtol=1e-8, atol=1e-12)
    assert (r.studentized(np.zeros((9, 1)), 50, seed=0) == 0.0).all()


def test_a_resample_of_one_group_alone_is_infinitely_far_away() -> None:
    influence = np.array([[2.0], [-1.0], [-1.0]])
    drawn = r.studentized(influence, 200, seed=0)[:, 0]
    for t, row in zip(drawn, r.resample_indices(3, 200, seed=0), strict=True):
        values = influence[row, 0]
        assert math.isinf(t) == (len(set(values)) == 1)
        assert np.sign(t) == np.sign(values.sum())
    assert np.isinf(drawn).any()


@pytest.mark.parametrize(("groups", "confidence"), [(8, 0.9), (32, 0.95), (64, 0.95), (1000, 0.8)])
def test_tails_are_widened_as_student_and_the_lost_degree_need(groups: int, confidence: float) -> None:
    tail = r.widened_tail(groups, confidence)
    t = stats.t.ppf((1 - confidence) / 2, groups - 1)
    assert tail == pytest.approx(stats.norm.cdf(t * math.sqrt(groups / (groups - 1))), rel=1e-12)
    assert tail < (1 - confidence) / 2
    if groups == 1000:
        assert tail == pytest.approx((1 - confidence) / 2, rel=0.01)
