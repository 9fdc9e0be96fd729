"""The layers that stand out by what they contribute: the rule itself, planted profiles, and noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from align_audit.measures.layer_set import CLEAR, FLOOR, MARGIN, contributions, layer_set, least_means, standing_clear
from align_audit.measures.statistics import Method, mean_intervals

METHODS: tuple[Method, ...] = ("percentile", "bca")


@pytest.mark.parametrize(
    ("profile", "layers"),
    [
        ([0.1, 1.0, 0.1, 0.1], (1,)),
        ([1.0, 0.1, 0.1, 1.0], (0, 3)),
        ([1.0, 0.3, 0.08, 0.06, 0.05], (0, 1)),
        ([20.0, 2.6, 0.9, 0.4, 0.3, 0.3], (0, 1)),  # the widest step is above the second, the last clear one below it
        ([1.0, 0.2, 0.1, 0.1, 0.1], (0,)),
        ([1.0, 0.4, 0.3, 0.2, 0.1], ()),
        ([2.4, 0.41, 0.3, 0.26, 0.19, 0.15], (0,)),
        ([1.0, 1.0, 1.0, 0.1], ()),  # three of four are no small set, and among them there is no step
        ([2.0, 2.0, 2.0], ()),
        ([1.0, 1.0 / CLEAR], (0,)),
        ([1.0], ()),
    ],
)
def test_standing_clear(profile: list[float], layers: tuple[int, ...]) -> None:
    assert standing_clear(np.array(profile)) == layers


def test_standing_clear_is_the_largest_such_subset() -> None:
    generator = np.random.default_rng(0)
    sizes = set()
    for _ in range(300):
        profile = np.exp(1.5 * generator.normal(size=6))
        largest: tuple[int, ...] = ()
        for size in (1, 2, 3):
            for subset in itertools.combinations(range(6), size):
                if profile[list(subset)].min() >= CLEAR * np.delete(profile, subset).max():
                    largest = subset
        assert standing_clear(profile) == largest
        sizes.add(len(largest))
    assert sizes == {0, 1, 2, 3}


def test_contributions_are_geometric_means_above_a_floor() -> None:
    least = (np.full(4, 0.08), np.array([0.04, 0.04, 0.04, 0.5]))
    found = contributions(np.array([8.0, 1.0, -1.0, 0.01]), np.array([2.0, 1.0, 4.0, 0.0]), least)
    np.testing.assert_allclose(found, [4.0, 1.0, math.sqrt(0.08 * 4), math.sqrt(0.08 * 0.5)])
    many = contributions(np.ones((7, 4)), np.full((7, 4), 4.0), least)
    np.testing.assert_array_equal(many, np.full((7, 4), 2.0))


def test_a_contribution_is_the_layers_own_and_not_what_it_is_compared_as() -> None:
    """The second layer does a thousandth of the first: compared as a hundredth, and said to be what it is."""
    values = np.hstack([pairs_around([10.0], 0.1, 20), pairs_around([0.01], 0.001, 20)])
    found = layer_set(values, values, resamples=200)
    assert found.layers == (0,)
    small = found.contribution[1]
    assert small.mean == pytest.approx(values[:, 1].mean())
    assert small.low < small.mean < small.high < 0.02


def test_a_mean_counts_as_its_margin_of_error_or_a_share_of_the_largest() -> None:
    values = pairs_around([8.0, 0.0, 0.0], 1.0, 9)
    values[:, 2] = 0.0
    error = values[:, 1].std(ddof=1) / 8
    np.testing.assert_allclose(least_means(values)[1:], [MARGIN * error, FLOOR * values[:, 0].mean()])
    assert (least_means(-np.ones((4, 3))) == 0).all()
    twice = least_means(np.repeat(values, 2, axis=0), np.repeat(np.arange(64), 2))
    np.testing.assert_allclose(twice, least_means(values))


def test_only_layers_that_contribute_stand_clear_and_are_still_compared() -> None:
    profile = np.array([1.0, 20.0, 1.0, 60.0, 0.9, 0.8])
    assert standing_clear(profile) == (1, 3)
    everything = np.ones(6, dtype=bool)
    assert standing_clear(profile, everything) == (1, 3)
    without = everything.copy()
    without[1] = False  # what it could be is a third of layer 3, so that stands clear and it does not
    assert standing_clear(profile, without) == (3,)
    without[[1, 3]] = True, False  # the largest may be spread: nothing is clear of it
    assert standing_clear(profile, without) == ()
    without = everything.copy()
    without[[0, 2, 4, 5]] = False
    assert standing_clear(profile, without) == (1, 3)


def pairs_around(profile: list[float], spread: float, seed: int, count: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, len(profile))) * spread + np.array(profile)


def test_a_planted_set_is_found_with_its_separation() -> None:
    profile = [0, 0, 5.0, 4.0, 0, 0, 0.3, 0]
    alone, added = pairs_around(profile, 1.0, 1), pairs_around(profile, 1.0, 2)
    found = layer_set(alone, added, resamples=400)
    assert (found.layers, found.reason) == ((2, 3), None)
    least = [MARGIN * values.std(axis=0, ddof=1) / 8 for values in (alone, added)]
    height = []
    for layer in range(8):
        parts = [max(v[:, layer].mean(), m[layer]) for v, m in zip((alone, added), least, strict=True)]
        height.append(math.sqrt(parts[0] * parts[1]))
    for layer, interval in enumerate(found.contribution):
        if layer in (2, 3):
            assert interval.mean == pytest.approx(height[layer])
        else:  # spread is no contribution, but what it could be is known
            assert (interval.mean, interval.low) == (0.0, 0.0)
            assert interval.high > height[layer] * 0.9
    assert found.separation.mean == pytest.approx(height[3] / max(height[:2] + height[4:]))
    assert CLEAR < found.separation.low < found.separation.mean < found.separation.high
    assert found.stability > 0.98
    assert found.selection_frequency[2] == found.selection_frequency[3] == 1.0
    assert found.selection_frequency[0] < 0.02
    assert all(interval.low < interval.mean < interval.high for interval in found.contribution[2:4])


def test_a_layer_that_works_only_on_top_of_another_is_found() -> None:
    """Alone the second does a twentieth of the first, on top of it as much: both did what the others did not."""
    alone = pairs_around([20.0, 0.2, 1.0, 0.2, 0.2, 0.2], 0.1, 3)
    added = pairs_around([20.0, 0.5, 20.0, 0.5, 0.5, 0.5], 0.1, 4)
    assert layer_set(alone, added, resamples=100).layers == (0, 2)


def test_one_pair_that_does_it_all_is_no_contribution_of_a_layer() -> None:
    """A resample without it is all zeros."""
    pairs = np.zeros((12, 6))
    pairs[0, 0] = 100.0
    found = layer_set(pairs, pairs, resamples=200)
    assert found.layers == ()
    assert (found.contribution[0].mean, found.contribution[0].low) == (0.0, 0.0)
    assert found.contribution[0].high > 8.0
    assert "no layer moves the margin" in (found.reason or "")


def test_layers_that_do_nothing_do_not_stand_out_in_any_resample() -> None:
    pairs = np.zeros((12, 6))
    pairs[:, 0] = np.linspace(0.1, 100.0, 12)
    found = layer_set(pairs, pairs, resamples=200)
    assert found.layers == (0,)
    assert (found.selection_frequency[1:] == 0).all()
    assert all(math.isfinite(value) for value in (found.separation.low, found.separation.mean, found.separation.high))


def test_a_layer_that_lowers_the_margin_does_not_contribute() -> None:
    """Surely lowered, by nine standard errors and more: its spread is no contribution, alone nor in a resample."""
    alone, added = (pairs_around([0.0, 4.0, -12.0, 0.0, 0.0, 0.0], 0.5, seed) for seed in (1, 2))
    alone[:, 2] -= 8.0 * np.random.default_rng(3).normal(size=64)
    found = layer_set(alone, added, resamples=200)
    assert (found.contribution[2].mean, found.contribution[2].low) == (0.0, 0.0)
    assert found.selection_frequency[2] == 0.0
    # Only alone or only on top of the others above 0 is not enough, either.
    for lowered in (0, 1):
        both = [pairs_around([0.0, 4.0, 4.0, 0.0, 0.0, 0.0], 0.5, seed) for seed in (1, 2)]
        both[lowered][:, 2] -= 8.0
        found = layer_set(*both, resamples=200)
        assert found.layers == (1,)
        assert (found.contribution[2].mean, found.selection_frequency[2]) == (0.0, 0.0)


def test_pairs_that_repeat_themselves_make_no_layer_stand_out() -> None:
    values = pairs_around([0.0, 5.0, 1.0, 0.0, 0.0, 0.0], 1.5, 6, count=12)
    groups = np.repeat(np.arange(12), 4)
    once = layer_set(values, values, resamples=200)
    again = layer_set(np.repeat(values, 4, axis=0), np.repeat(values, 4, axis=0), resamples=200, groups=groups)
    assert once.layers == again.layers
    assert again.stability == once.stability
    np.testing.assert_array_equal(again.selection_frequency, once.selection_frequency)
    for one, other in zip(once.contribution, again.contribution, strict=True):
        assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))
    seven = layer_set(np.repeat(values, 4, axis=0)[:28], np.repeat(values, 4, axis=0)[:28], groups=groups[:28])
    assert "at least 8 independent pairs, found 7 in 28" in (seven.reason or "")


def test_noise_has_no_layer_that_stands_out() -> None:
    """Nothing learned, or all layers the same: hardly ever a set, and then not one that resamples agree on."""
    for level in (0.0, 1.0):
        found_any = stable = 0
        for seed in range(60):
            alone, added = (pairs_around([level] * 6, 1.0, 100 * seed + part, 32) for part in (0, 1))
            found = layer_set(alone, added, resamples=200, seed=seed)
            found_any += bool(found.layers)
            stable += found.stability >= 0.8 and found.separation.low > 1.0
        assert found_any <= 3
        assert stable == 0


def test_what_cannot_be_known_says_why() -> None:
    flat = np.ones((8, 4))
    cases = [
        (np.ones((8, 1)), "one layer cannot stand out of others"),
        (np.array([[1.0, np.nan], [1.0, 2.0]]), "a block transplant or a gain is not finite"),
        (np.array([[np.nan, 1.0], [np.nan, 2.0]]), "a block transplant or a gain is not finite"),
        (np.ones((7, 2)), "an interval needs at least 8 independent pairs, found 7"),
        (-flat, "no layer moves the margin in the direction of the shift, alone and on top of those below"),
        (
            flat,
            "no layer stands out by contributing at least 2.7 times what any other could",
        ),
    ]
    for values, reason in cases:
        found = layer_set(values, values)
        assert (found.layers, found.reason, found.separation.reason) == ((), reason, reason)
        assert math.isnan(found.stability)
        assert np.isnan(found.selection_frequency).all()
        assert len(found.contribution) == values.shape[1]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, L\] of one shape; found \[3\] and \[3\]"):
        layer_set(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"found \[3, 2\] and \[3, 3\]"):
        layer_set(np.ones((3, 2)), np.ones((3, 3)))


def test_a_layer_contributes_by_the_interval_that_was_asked_for() -> None:
    """Of skewed values the corrected interval lies elsewhere, and may lie above 0 where the plain one does not."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        skewed = generator.exponential(1.0, (40, 3)) - 0.72
        plain, corrected = (
            [interval.low > 0 for interval in mean_intervals(skewed, 200, 0.95, method)] for method in METHODS
        )
        if plain != corrected:
            break
    assert plain != corrected, "or this shows nothing"
    for method, expected in zip(METHODS, (plain, corrected), strict=True):
        stands = layer_set(skewed, skewed, resamples=200, method=method)
        assert [interval.mean > 0 for interval in stands.contribution] == expected
