"""Batches of probe pairs: where the model is read and patched, and that every pair is in exactly one batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.batches import PairBatch, iterate_batches, make_batch, plan_batches
from align_audit.probes import ProbePair
from tests.oracle import patched_positions, prediction_positions, sides, spectral_positions

PAD = 99


def pair(
    chosen: list[int], rejected: list[int], start: int, rejected_start: int | None = None, index: int = 0
) -> ProbePair:
    return ProbePair(index, tuple(chosen), tuple(rejected), start, start if rejected_start is None else rejected_start)


@st.composite
def probe_pairs(draw: st.DrawFn) -> ProbePair:
    """Few tokens, so that prefixes are often shared beyond the prompt, and one completion may begin the other."""
    tokens = st.lists(st.integers(1, 2), min_size=1, max_size=5)
    prompt = draw(st.lists(st.integers(1, 2), max_size=4))
    made = []
    for _ in range(2):
        completion = draw(tokens)
        if not prompt and len(completion) < 2:
            completion = completion * 2  # the token at position 0 is predicted by nothing
        made.append(prompt + completion)
    return pair(made[0], made[1], len(prompt))


LISTS = st.lists(probe_pairs(), min_size=1, max_size=9)


def entries(batch: PairBatch) -> list[tuple[int, int, int, int, int, bool]]:
    columns = (batch.row, batch.position, batch.target, batch.pair, batch.side, batch.distinct)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_batch_written_out() -> None:
    one = pair([5, 6, 7, 8], [5, 6, 7, 9, 4], 2)  # the completions share their first token
    two = pair([3, 4], [3, 5], 1)
    batch = make_batch([one, two], [7, 2], PAD)
    assert batch.num_pairs == 2
    assert batch.pair_index.tolist() == [7, 2]
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, PAD],
        [3, 4, PAD, PAD, PAD],
        [5, 6, 7, 9, 4],
        [3, 5, PAD, PAD, PAD],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert batch.lengths.tolist() == [4, 2, 5, 2]
    assert batch.completion_start.tolist() == [2, 1, 2, 1]
    assert entries(batch) == [
        # row, position, target, pair, side, distinct
        (0, 1, 7, 0, 0, True),
        (0, 2, 8, 0, 0, True),
        (1, 0, 4, 1, 0, True),
        (2, 1, 7, 0, 1, False),
        (2, 2, 9, 0, 1, False),
        (2, 3, 4, 0, 1, True),
        (3, 0, 5, 1, 1, False),
    ]
    for name in PairBatch.__dataclass_fields__:
        expected = torch.bool if name == "distinct" else torch.int64
        assert getattr(batch, name).dtype == expected, name


def test_a_prompt_that_was_cut_away_leaves_no_position_to_predict_the_first_token_from() -> None:
    batch = make_batch([pair([5, 6, 7], [8, 9], 0)], [0], PAD)
    assert entries(batch) == [(0, 0, 6, 0, 0, True), (0, 1, 7, 0, 0, True), (1, 0, 9, 0, 1, True)]


def test_a_prefix_that_the_chosen_side_does_not_read_counts_on_the_rejected_side() -> None:
    """The chosen completion is the beginning of the rejected one: after its last token nothing is read on its side."""
    batch = make_batch([pair([5, 6, 7], [5, 6, 7, 8, 9], 1)], [0], PAD)
    assert [(position, distinct) for _, position, _, _, side, distinct in entries(batch) if side == 1] == [
        (0, False),
        (1, False),
        (2, True),
        (3, True),
    ]
    # Nor before its completion: the two sides may begin theirs in different places.
    batch = make_batch([pair([5, 6, 7, 1], [5, 6, 7, 2], 3, rejected_start=1)], [0], PAD)
    assert [distinct for *_, side, distinct in entries(batch) if side == 1] == [True, True, False]


@settings(max_examples=200, deadline=None)
@given(LISTS)
def test_entries_are_those_of_the_definitions(pairs: list[ProbePair]) -> None:
    batch = make_batch(pairs, range(len(pairs)), PAD)
    expected = []
    for side in (0, 1):
        for owner, one in enumerate(pairs):
            ids, start = sides(one)[side]
            row = side * len(pairs) + owner
            kept = spectral_positions(one)[side]
            for position in prediction_positions(ids, start):
                expected.append((row, position, ids[position + 1], owner, side, position in kept))
    assert entries(batch) == expected
    lengths = batch.attention_mask.sum(1)
    assert torch.equal(lengths, batch.lengths)
    assert torch.all((batch.input_ids == PAD) == (batch.attention_mask == 0))


@settings(max_examples=100, deadline=None)
@given(LISTS, st.sampled_from(["all", "prompt", "completion", "last_prompt_token"]))
def test_position_masks_are_those_of_the_definitions(pairs: list[ProbePair], positions: str) -> None:
    batch = make_batch(pairs, range(len(pairs)), PAD)
    mask = batch.position_mask(positions)
    assert mask.shape == batch.input_ids.shape
    for row in range(2 * len(pairs)):
        ids, start = sides(pairs[row % len(pairs)])[row // len(pairs)]
        assert torch.nonzero(mask[row]).flatten().tolist() == patched_positions(ids, start, positions)


def test_position_masks_written_out() -> None:
    batch = make_batch([pair([5, 6, 7, 8], [5, 6, 9], 2)], [0], PAD)
    assert batch.position_mask("all").int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_mask("prompt").int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.position_mask("completion").int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert batch.position_mask("last_prompt_token").int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]


def longest(one: ProbePair) -> int:
    return max(len(one.chosen_ids), len(one.rejected_ids))


@settings(max_examples=200, deadline=None)
@given(LISTS, st.integers(1, 60))
def test_every_pair_is_in_one_batch_within_the_budget(pairs: list[ProbePair], budget: int) -> None:
    plan = plan_batches(pairs, budget)
    assert sorted(index for group in plan for index in group) == list(range(len(pairs)))
    for group in plan:
        padded = 2 * len(group) * max(longest(pairs[index]) for index in group)
        assert padded <= budget or len(group) == 1
    widths = [longest(pairs[index]) for group in plan for index in group]
    assert widths == sorted(widths, reverse=True)
    # A batch is not left half empty: the next pair would not have fitted.
    for group in plan[:-1]:
        assert 2 * (len(group) + 1) * longest(pairs[group[0]]) > budget


@settings(max_examples=50, deadline=None)
@given(LISTS, st.integers(1, 60))
def test_iterating_gives_the_planned_batches(pairs: list[ProbePair], budget: int) -> None:
    batches = list(iterate_batches(pairs, budget, PAD))
    plan = plan_batches(pairs, budget)
    assert [batch.pair_index.tolist() for batch in batches] == plan
    for batch, group in zip(batches, plan, strict=True):
        assert batch.num_pairs == len(group)
        for place, index in enumerate(group):
            for row, ids in ((place, pairs[index].chosen_ids), (len(group) + place, pairs[index].rejected_ids)):
                assert tuple(batch.input_ids[row, : batch.lengths[row]].tolist()) == ids


def test_moving_a_batch_keeps_everything() -> None:
    batch = make_batch([pair([5, 6, 7], [5, 8], 1)], [0], PAD)
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).device.type == "meta" for name in PairBatch.__dataclass_fields__)
    assert all(getattr(moved, name).shape == getattr(batch, name).shape for name in PairBatch.__dataclass_fields__)


def test_a_frozen_batch() -> None:
    batch = make_batch([pair([5, 6, 7], [5, 8], 1)], [0], PAD)
    with pytest.raises(AttributeError):
        batch.row = batch.position  # type: ignore[misc]
