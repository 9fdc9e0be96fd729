"""The layers that stand out of a profile, against a search over all subsets and planted profiles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from align_audit.measures.layer_set import FLOOR, layer_set, widest_gap


@pytest.mark.parametrize(
    ("profile", "layers"),
    [
        ([0.0, 1.0, 0.0, 0.0], (1,)),
        ([1.0, 0.1, 0.1, 1.0], (0, 3)),
        ([1.0, 0.3, 0.08, 0.06, 0.05], (0, 1)),  # the second does a third of the first, the others a tenth of that
        ([1.0, 0.2, 0.1, 0.1, 0.1], (0,)),
        ([1.0, 0.9, 1e-9, -3.0, 0.01], (0, 1)),  # how small a small layer is does not matter
        ([1.0, 1.0, 1.0, 0.0], ()),  # three of four are no small set, and among them there is no gap
        ([-1.0, -2.0], ()),
        ([0.0, 0.0], ()),
        ([2.0, 2.0, 2.0], ()),
        ([1.0], ()),
        ([1.0, math.nan, 0.0], ()),
    ],
)
def test_widest_gap(profile: list[float], layers: tuple[int, ...]) -> None:
    assert widest_gap(np.array(profile)) == layers


def test_widest_gap_is_the_best_of_all_subsets() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        profile = generator.normal(size=6) ** 3
        if profile.max() <= 0:
            continue
        height = np.maximum(profile / profile.max(), FLOOR)
        best: tuple[float, tuple[int, ...]] = (1.0, ())
        for size in (1, 2, 3):
            for subset in itertools.combinations(range(6), size):
                gap = height[list(subset)].min() / np.delete(height, subset).max()
                if gap > best[0]:
                    best = (gap, subset)
        assert widest_gap(profile) == best[1]


def test_a_planted_set_is_found_with_its_separation() -> None:
    generator = np.random.default_rng(1)
    pairs = generator.normal(size=(64, 8)) + np.array([0, 0, 5.0, 4.0, 0, 0, 0.5, 0])
    found = layer_set(pairs, resamples=400)
    means = pairs.mean(axis=0)
    assert (found.layers, found.reason) == ((2, 3), None)
    assert found.separation.mean == pytest.approx(means[3] - means[6])
    assert 0 < found.separation.low < found.separation.mean < found.separation.high
    assert found.stability > 0.99
    assert found.selection_frequency[2] == found.selection_frequency[3] == 1.0
    assert found.selection_frequency[0] < 0.01


def test_a_profile_without_a_set_is_not_stable() -> None:
    """Every layer the same: some set is the widest gap's, but resamples do not agree on it, and it is not clear of them."""
    generator = np.random.default_rng(2)
    stable = clear = 0
    for seed in range(60):
        found = layer_set(generator.normal(1.0, 1.0, size=(32, 6)), resamples=200, seed=seed)
        stable += found.stability >= 0.8
        clear += found.separation.low > 0
    assert stable <= 3
    assert clear <= 6


def test_what_cannot_be_known_says_why() -> None:
    cases = [
        (np.ones((4, 1)), "one layer cannot stand out of others"),
        (np.array([[1.0, np.nan], [1.0, 2.0]]), "a block transplant is not finite"),
        (np.array([[1.0, 2.0]]), "an interval needs at least 2 pairs, found 1"),
        (-np.ones((4, 3)), "no block transplant is positive"),
        (np.ones((4, 3)), "all block transplants are equal"),
    ]
    for values, reason in cases:
        found = layer_set(values)
        assert (found.layers, found.reason, found.separation.reason) == ((), reason, reason)
        assert math.isnan(found.stability)
        assert np.isnan(found.selection_frequency).all()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, L\]; found shape \[3\]"):
        layer_set(np.ones(3))
