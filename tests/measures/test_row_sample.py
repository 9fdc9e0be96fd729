"""Sampling errors and sizes of samples, against enumeration of every sample and closed forms."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest

from align_audit.measures import row_sample
from align_audit.measures.row_sample import rows_needed, rows_that_give, sampling_error


def test_docstring_examples() -> None:
    results = doctest.testmod(row_sample)
    assert results.failed == 0
    assert results.attempted >= 4


def test_the_error_is_right_on_average_over_every_sample_there_is() -> None:
    """Squared, it is unbiased for the variance of the sample mean: all 210 samples of 4 out of 10 rows."""
    values = np.array([0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0])[:, None]
    samples = [values[list(rows)] for rows in itertools.combinations(range(10), 4)]
    variance = float(np.var([sample.mean() for sample in samples]))
    squares = [float(sampling_error(sample, 10)[0]) ** 2 for sample in samples]
    assert np.mean(squares) == pytest.approx(variance, rel=1e-12)
    assert variance > 1


def test_all_rows_leave_no_error_and_unknown_ones_have_none() -> None:
    values = np.array([[1.0, math.nan], [3.0, 4.0]])
    np.testing.assert_array_equal(sampling_error(values, 2), [0.0, math.nan])
    np.testing.assert_array_equal(np.isnan(sampling_error(values, 9)), [False, True])
    assert np.isnan(sampling_error(values[:1], 9)).all()
    assert np.isnan(sampling_error(values[:0], 9)).all()
    assert np.isnan(sampling_error(values[:0], 0)).all(), "no row has a mean"
    assert sampling_error(values[:1, :1], 1).tolist() == [0.0]
    assert sampling_error(np.full((128, 1), 0.1), 900)[0] == pytest.approx(0.0, abs=1e-16)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("population", [500, 5_000, 10**6])
def test_the_rows_that_are_needed_are_the_fewest_that_give_the_share(share: float, population: int) -> None:
    drawn = np.random.default_rng(0).gamma(2.0, size=(200, 3))
    needed = rows_needed(drawn, population, share)

    def largest(n: int) -> float:
        spread = drawn.std(axis=0, ddof=1)
        return float((spread * np.sqrt(1 / n - 1 / population) / drawn.mean(axis=0)).max())

    assert largest(needed) <= share
    assert needed == 1 or largest(needed - 1) > share


def test_columns_that_ask_for_nothing_and_for_everything() -> None:
    steady, unknown = np.full((8, 1), 0.7), np.full((8, 1), math.nan)
    assert rows_needed(np.zeros((8, 0)), 100, 0.1) == 1
    assert rows_needed(np.hstack([steady, 0 * steady, unknown]), 100, 0.1) == 1
    assert rows_needed(np.array([[1.0], [-1.0]]), 100, 0.1) == 100, "a mean of 0 has no share"


@pytest.mark.parametrize("population", [300, 5_000])
def test_rows_are_told_from_means_and_errors_as_from_the_rows(population: int) -> None:
    drawn = np.hstack([np.random.default_rng(0).gamma(2.0, size=(200, 3)), np.full((200, 1), math.nan)])
    means, errors = drawn.mean(axis=0), sampling_error(drawn, 1000)
    told = rows_that_give(means, errors, 200, 1000, population, 0.05)
    assert told == rows_needed(drawn, population, 0.05)
    assert rows_that_give(means, sampling_error(drawn, 200), 200, 200, population, 0.05) is None
    assert rows_that_give(np.array([0.7]), np.array([0.0]), 200, 1000, population, 0.05) == 1
    assert rows_that_give(np.array([0.0]), np.array([0.1]), 200, 1000, population, 0.05) == population


@pytest.mark.parametrize(
    ("values", "population", "share", "words"),
    [
        (np.zeros(3), 9, 0.1, r"expected values \[n, k\]"),
        (np.zeros((3, 1)), 2, 0.1, "of at most 2 rows"),
        (np.zeros((1, 1)), 2, 0.1, "at least 2 rows"),
        (np.zeros((2, 1)), 2, 1.0, "a share in"),
    ],
)
def test_what_cannot_be_a_sample_is_refused(values: np.ndarray, population: int, share: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rows_needed(values, population, share)
