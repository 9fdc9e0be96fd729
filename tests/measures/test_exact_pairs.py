"""How many exact pairs are needed: by the formula, no fewer, and as surely as is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from align_audit.measures.exact_pairs import exact_pairs_needed, exact_pairs_needed_safely


@pytest.mark.parametrize(
    ("correlation", "pairs", "equivalent", "needed"),
    [
        (0.0, 96, 48, 48),
        (0.9, 96, 48, 16),  # 0.19 / (1/48 - 0.81/96) = 15.3
        (-0.9, 96, 48, 16),
        (0.6, 100, 20, 14),  # 0.64 / (0.05 - 0.0036) = 13.8
        (math.nan, 96, 48, 48),
        (0.999, 96, 48, 8),  # 0.2 by the formula, but a slope needs 8
        (1.0, 96, 48, 8),
        (1.0, 96, 96, 96),
        (0.9, 96, 96, 96),
        (0.9, 96, 200, 96),  # impossible: 96 <= 200 · 0.81
        (0.5, 96, 120, 96),  # possible by the formula only with more pairs than there are
        (0.9, 5, 3, 5),
    ],
)
def test_exact_pairs_needed(correlation: float, pairs: int, equivalent: float, needed: int) -> None:
    assert exact_pairs_needed(correlation, pairs, equivalent) == needed


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.95])
def test_exact_pairs_needed_is_the_least(rho: float) -> None:
    for equivalent in (20, 40, 60):
        n = exact_pairs_needed(rho, 96, equivalent)

        def variance(m: int) -> float:
            return (1 - rho**2) / m + rho**2 / 96

        assert variance(n) <= 1 / equivalent
        assert n == 8 or variance(n - 1) > 1 / equivalent


def test_safe_number_of_pairs() -> None:
    low = math.tanh(math.atanh(0.9) - stats.norm.ppf(0.95) / 3)
    safe = exact_pairs_needed_safely(0.9, pilot=12, pairs=96, equivalent=48, level=0.95)
    assert safe == exact_pairs_needed(low, 96, 48) > exact_pairs_needed(0.9, 96, 48)
    assert exact_pairs_needed_safely(-0.9, 12, 96, 48, level=0.95) == safe
    assert exact_pairs_needed_safely(0.9, 100_000_000, 96, 48) == exact_pairs_needed(0.9, 96, 48)
    assert exact_pairs_needed_safely(0.99, 3, 96, 48) == 48
    assert exact_pairs_needed_safely(0.2, 8, 96, 48) == 48
    assert exact_pairs_needed_safely(math.nan, 50, 96, 48) == 48
    assert exact_pairs_needed_safely(1.0, 8, 96, 48) == 8


def test_safe_number_of_pairs_suffices_as_often_as_it_says() -> None:
    proxy, noise = np.random.default_rng([12, 96, 900]).standard_normal((2, 96, 3000))
    exact = 0.9 * proxy + math.sqrt(1 - 0.9**2) * noise
    pilots = [np.corrcoef(exact[:12, i], proxy[:12, i])[0, 1] for i in range(3000)]
    enough = np.mean([exact_pairs_needed_safely(r, 12, 96, 48) >= 16 for r in pilots])
    assert 0.88 <= enough <= 0.94
    assert np.mean([exact_pairs_needed(r, 96, 48) >= 16 for r in pilots]) < 0.65


@pytest.mark.parametrize(
    "call",
    [
        lambda: exact_pairs_needed(1.1, 96, 48),
        lambda: exact_pairs_needed(0.5, 0, 48),
        lambda: exact_pairs_needed(0.5, 96, 0),
        lambda: exact_pairs_needed(0.5, 96, math.nan),
        lambda: exact_pairs_needed_safely(-1.1, 8, 96, 48),
        lambda: exact_pairs_needed_safely(0.5, -1, 96, 48),
        lambda: exact_pairs_needed_safely(0.5, 8, 96, 48, level=1.0),
    ],
)
def test_impossible_requests_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()  # type: ignore[operator]
