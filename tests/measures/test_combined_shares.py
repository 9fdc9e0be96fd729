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


@pytest.mark.parametrize(("pairs", "first", "second", "alike"), [(24, 0.9, 0.8, 0.5), (64, 0.6, 0.8, 0.0)])
def test_it_covers(pairs: int, first: float, second: float, alike: float) -> None:
    rng = np.random.default_rng(1)
    covered, draws = 0, 400
    for _ in range(draws):
        u = rng.random(pairs)
        v = np.where(rng.random(pairs) < alike, u, rng.random(pairs))
        interval = combined_share_interval(np.column_stack([u < first, v < second]), DIFFERENCE)
        covered += interval.low <= second - first <= interval.high
    assert 0.92 <= covered / draws <= 0.99


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
