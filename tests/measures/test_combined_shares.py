"""Sums of shares of the same pairs: against the published form for two, its coverage, and its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align_audit.measures.combined_shares import combined_share_interval
from align_audit.measures.statistics import share_interval

DIFFERENCE = np.array([-1.0, 1.0])


def test_one_share_has_its_own_interval() -> None:
    hits = (np.arange(40) < 29).astype(float)
    combined, share = combined_share_interval(hits[:, None], np.ones(1)), share_interval(hits)
    assert (combined.mean, combined.low, combined.high) == pytest.approx((share.mean, share.low, share.high))


def test_a_difference_is_newcombes() -> None:
    """Method 10 without a correction for continuity, written out from the two intervals and φ."""
    rng = np.random.default_rng(0)
    first = (rng.random(50) < 0.7).astype(float)
    second = np.where(rng.random(50) < 0.6, first, rng.random(50) < 0.4).astype(float)
    a, b = share_interval(first), share_interval(second)
    phi = np.corrcoef(first, second)[0, 1]
    low = math.sqrt((b.mean - b.low) ** 2 - 2 * phi * (b.mean - b.low) * (a.high - a.mean) + (a.high - a.mean) ** 2)
    high = math.sqrt((b.high - b.mean) ** 2 - 2 * phi * (b.high - b.mean) * (a.mean - a.low) + (a.mean - a.low) ** 2)
    combined = combined_share_interval(np.column_stack([first, second]), DIFFERENCE)
    assert combined.mean == pytest.approx(b.mean - a.mean)
    assert (combined.low, combined.high) == pytest.approx((combined.mean - low, combined.mean + high))


@pytest.mark.parametrize("each", [1, 4], ids=["alone", "fours"])
@pytest.mark.parametrize(("groups", "first", "second", "alike"), [(24, 0.9, 0.8, 0.5), (64, 0.6, 0.8, 0.0)])
def test_it_covers(groups: int, first: float, second: float, alike: float, each: int) -> None:
    """Pairs of a group draw the same number seven times out of ten, and both runs that of the first where they are alike."""
    rng = np.random.default_rng(1)
    names = np.repeat(np.arange(groups), each)

    def drawn() -> np.ndarray:
        return np.where(rng.random(len(names)) < 0.7, rng.random(groups)[names], rng.random(len(names)))

    covered, draws = 0, 400
    for _ in range(draws):
        u, v = drawn(), drawn()
        v = np.where((rng.random(groups) < alike)[names], u, v)
        interval = combined_share_interval(np.column_stack([u < first, v < second]), DIFFERENCE, groups=names)
        covered += interval.low <= second - first <= interval.high
    assert 0.92 <= covered / draws <= 0.99


@pytest.mark.parametrize(("in_common", "least"), [("pairs", 0.90), ("prompts", 0.92)])
def test_what_runs_have_in_common_is_told_by_prompts(in_common: str, least: float) -> None:
    """Sixteen prompts of four pairs: the sums of prompts vary together where prompts do, whatever single pairs do."""
    rng = np.random.default_rng(2)
    names = np.repeat(np.arange(16), 4)
    covered, draws = 0, 400
    for _ in range(draws):
        prompts, pairs = rng.normal(size=(16, 2))[names], rng.normal(size=(64, 2))
        shared, apart = (prompts, pairs) if in_common == "prompts" else (pairs, prompts)
        interval = combined_share_interval(shared[:, :1] + apart < 1.0, DIFFERENCE, groups=names)
        covered += interval.low <= 0.0 <= interval.high
    assert least <= covered / draws <= 0.985


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_between_two_audits_that_agree_the_interval_is_that_of_each(weight: float) -> None:
    """Also where all pairs agree, so that hits say nothing of how the audits go together."""
    for count in (64, 57):
        hits = (np.arange(64) < count).astype(float)
        between = combined_share_interval(np.column_stack([hits, hits]), np.array([1.0 - weight, weight]))
        share = share_interval(hits)
        assert (between.low, between.high) == pytest.approx((share.low, share.high))


def test_between_two_audits_one_of_which_says_nothing_of_the_pairs() -> None:
    """All hit in one, some in the other: the interval is the mean of both, as far as it may reach."""
    hits = np.column_stack([np.ones(64), np.arange(64) < 57])
    between = combined_share_interval(hits, np.array([0.5, 0.5]))
    each = [share_interval(column) for column in hits.T]
    assert between.low == pytest.approx(sum(share.low for share in each) / 2)
    assert between.high == pytest.approx(sum(share.high for share in each) / 2)


def test_edges() -> None:
    always = np.ones((24, 2))
    equal = combined_share_interval(always, DIFFERENCE)
    assert equal.mean == 0.0
    assert -1.0 < equal.low < 0.0 < equal.high < 1.0
    few = combined_share_interval(np.ones((7, 2)), DIFFERENCE)
    assert math.isnan(few.low) and "at least 8 independent pairs" in (few.reason or "")
    unknown = combined_share_interval(np.array([[1.0, math.nan]] * 9), DIFFERENCE)
    assert math.isnan(unknown.mean) and "not finite" in (unknown.reason or "")
    far = combined_share_interval(np.column_stack([np.zeros(9), np.ones(9)]), DIFFERENCE)
    assert far.high == 1.0
    with pytest.raises(ValueError, match="expected hits"):
        combined_share_interval(np.ones(9), DIFFERENCE)
