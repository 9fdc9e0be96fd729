"""Draws are functions of what is drawn: orders of pairs, rows and directions, whatever else is there."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align_audit.auditing.session.subsets import choose_pairs
from align_audit.config import AuditConfig, PatchingConfig
from align_audit.measures.draws import halves, keep_rows, noise_directions, prefix_keys, subset_order
from align_audit.probes.pairs import ProbePair

# -- pairs -------------------------------------------------------------------------------------------------------------


def test_order_depends_on_identities_only_and_nests() -> None:
    ids = [f"pair-{i}" for i in range(50)]
    order = subset_order(ids, seed=1)
    assert sorted(order.tolist()) == list(range(50))
    np.testing.assert_array_equal(order, subset_order(ids, seed=1))
    assert not np.array_equal(order, subset_order(ids, seed=2))
    ranked = [ids[i] for i in order]
    backwards = ids[::-1]
    assert [backwards[i] for i in subset_order(backwards, seed=1)] == ranked
    some = ids[::3]
    assert [some[i] for i in subset_order(some, seed=1)] == [i for i in ranked if i in set(some)]
    assert subset_order(["a", "b", "a"]).tolist() in ([0, 2, 1], [1, 0, 2])
    assert subset_order([]).shape == (0,)


def test_every_pair_is_as_likely_to_be_exact() -> None:
    counts = np.zeros(20)
    together = 0
    for seed in range(4000):
        prefix = subset_order(range(100, 120), seed)[:5]
        counts[prefix] += 1
        together += {0, 1} <= set(prefix.tolist())
    assert stats.chisquare(counts).pvalue > 1e-4
    assert together / 4000 == pytest.approx(5 * 4 / (20 * 19), abs=0.015)


def test_patched_pairs_are_a_sample_of_pairs_however_many_share_a_prompt() -> None:
    """24 of 64 pairs have one prompt: in the patched ones it stands for as much as in all, on average over seeds."""
    pairs = [
        ProbePair(place, (1, 2, 9, place), (1, 2, 8, place), 2, 2)
        if place < 24
        else ProbePair(place, (1, place, 9), (1, place, 8), 2, 2)
        for place in range(64)
    ]
    assert len({pair.group for pair in pairs}) == 41
    shares = []
    for seed in range(300):
        config = AuditConfig(seed=seed, patching=PatchingConfig(exact_pairs=24))
        shares.append(np.mean(choose_pairs(pairs, 2, config).everywhere < 24))
    assert np.mean(shares) == pytest.approx(24 / 64, abs=4 * np.std(shares) / np.sqrt(len(shares)))
    assert np.std(shares) > 0.0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(0, 99))
def test_halves_keep_groups_whole_and_are_about_equal(groups: list[int], seed: int) -> None:
    second = halves(groups, seed)
    assert second.dtype == np.bool_
    sides = {
        group: {bool(half) for half, name in zip(second, groups, strict=True) if name == group} for group in groups
    }
    assert all(len(side) == 1 for side in sides.values())
    assert abs(int(second.sum()) - int((~second).sum())) <= max(Counter(groups).values())
    backwards = halves(groups[::-1], seed)
    np.testing.assert_array_equal(backwards[::-1], second)


def test_halves_of_single_pairs_are_random_ones() -> None:
    splits = [halves(range(50, 61), seed).tolist() for seed in range(2000)]
    assert {sum(split) for split in splits} == {6}  # of 11 the second half is the larger
    assert stats.chisquare(np.sum(splits, axis=0)).pvalue > 1e-4
    together = np.mean([split[0] == split[1] for split in splits])
    assert together == pytest.approx((6 * 5 + 5 * 4) / (11 * 10), abs=0.04)
    assert halves([9], 0).tolist() == [True]
    assert halves([], 0).shape == (0,)


# -- rows --------------------------------------------------------------------------------------------------------------


def splitmix(z: int) -> int:
    """SplitMix64's finalizer in plain integers."""
    word = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def test_prefix_keys_equal_plain_integers() -> None:
    golden, word = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert splitmix(golden) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 at seed 0
    ids = [0, 17, 2**31 - 1, 17]
    for seed in (0, 1, 2**64 - 1):
        keys = prefix_keys(ids, seed)
        assert keys.dtype == np.int64
        state = splitmix((seed + golden) & word)
        for key, token in zip(keys.tolist(), ids, strict=True):
            state = splitmix((state * golden + token + 1) & word)
            assert key % (1 << 64) == state
    assert prefix_keys([], 0).shape == (0,)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8), st.integers(0, 2**64 - 1))
def test_positions_have_equal_keys_where_their_prefixes_are_equal(one: list[int], other: list[int], seed: int) -> None:
    first, second = prefix_keys(one, seed).tolist(), prefix_keys(other, seed).tolist()
    for i in range(len(one)):
        for j in range(len(other)):
            assert (first[i] == second[j]) == (one[: i + 1] == other[: j + 1])


def test_prefix_keys_are_distinct_even_and_seeded() -> None:
    generator = np.random.default_rng(0)
    sequences = [[number, *generator.integers(0, 5, size=299).tolist()] for number in range(100)]
    keys = np.stack([prefix_keys(ids, seed=7) for ids in sequences])
    assert len(np.unique(keys)) == keys.size
    assert stats.kstest(keys.ravel() / 2.0**64 + 0.5, "uniform").pvalue > 1e-3
    mask = keep_rows(keys.ravel(), 3000).reshape(keys.shape)  # a tenth of every sequence and position, roughly
    assert abs(mask.mean(axis=1) - 0.1).max() < 0.07
    assert abs(mask.mean(axis=0) - 0.1).max() < 0.13
    other = keep_rows(np.stack([prefix_keys(ids, seed=8) for ids in sequences]).ravel(), 3000).reshape(keys.shape)
    assert (mask & other).sum() < 450  # 300 by chance
    np.testing.assert_array_equal(prefix_keys(sequences[4][:20], seed=7), keys[4, :20])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=30), st.integers(1, 40), st.integers(0, 99))
def test_keep_rows_is_the_same_set_in_any_order(keys: list[int], max_rows: int, seed: int) -> None:
    array = np.array(keys, dtype=np.int64)
    kept = sorted(array[keep_rows(array, max_rows)].tolist())
    assert kept == sorted(keys)[:max_rows]
    shuffled = np.random.default_rng(seed).permutation(array)
    assert sorted(shuffled[keep_rows(shuffled, max_rows)].tolist()) == kept


def test_keep_rows_caps_equal_keys() -> None:
    assert keep_rows(np.array([1, 1, 1]), 2).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: prefix_keys([0], seed=-1), "found -1"),
        (lambda: prefix_keys([0], seed=2**64), "found 18446744073709551616"),
        (lambda: keep_rows(np.array([0.5]), 1), "float64"),
        (lambda: keep_rows(np.array([1]), 0), "found 0"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


# -- directions --------------------------------------------------------------------------------------------------------


def test_directions_have_unit_length_and_no_preferred_axis() -> None:
    directions = noise_directions(1, range(8), layer=3, draw=1, length=50, width=16)
    assert directions.dtype == torch.float32
    assert directions.shape == (8, 50, 16)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(8, 50), rtol=1e-6, atol=0.0)
    rows = directions.reshape(-1, 16).double()
    # Of 400 random unit vectors: the mean is near 0 and the second moments are near 1/16.
    assert rows.mean(0).abs().max() < 5 * math.sqrt(1 / 16 / 400)
    assert (rows.T @ rows / 400 - torch.eye(16) / 16).abs().max() < 0.03


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5, unique=True), st.integers(1, 30), st.integers(1, 30))
def test_a_direction_does_not_depend_on_its_batch(pairs: list[int], length: int, other: int) -> None:
    """Nor on how far the batch is padded; both completions of a pair are given the same."""
    whole = noise_directions(5, pairs, layer=-1, draw=0, length=length, width=4)
    for row, pair in enumerate(pairs):
        alone = noise_directions(5, [9999, pair], layer=-1, draw=0, length=other, width=4)[1]
        shared = min(length, other)
        assert torch.equal(alone[:shared], whole[row, :shared])
    assert torch.equal(noise_directions(5, [*pairs, *pairs], -1, 0, length, 4), whole.repeat(2, 1, 1))


def test_every_argument_changes_the_direction() -> None:
    usual = {"seed": 0, "pairs": [1], "layer": 2, "draw": 0, "length": 3, "width": 4}
    drawn = [noise_directions(**usual)]
    drawn += [
        noise_directions(**{**usual, **change}) for change in ({"seed": 1}, {"pairs": [2]}, {"layer": -1}, {"draw": 1})
    ]
    drawn += [
        noise_directions(**{**usual, "layer": 1, "draw": 1}),
        noise_directions(**{**usual, "pairs": [0], "seed": 1}),
    ]
    flat = [tuple(row) for one in drawn for row in one[0].tolist()]  # positions differ from each other, too
    assert len(set(flat)) == len(flat) == 21


def test_no_global_random_state_is_touched_or_used() -> None:
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    first = noise_directions(0, [0], 0, 0, 4, 4)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(noise_directions(0, [0], 0, 0, 4, 4), first)


def test_numpy_integers_are_pairs_too() -> None:
    assert torch.equal(noise_directions(0, np.array([4]), 1, 0, 2, 4), noise_directions(0, [4], 1, 0, 2, 4))
