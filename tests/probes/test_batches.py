"""Batches of probe pairs: where the model is read and patched, and that every pair is in exactly one batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.probes.batches import PairBatch, common_prompt, make_batch, pair_tokens, plan_batches
from align_audit.probes.pairs import ProbePair
from tests.helpers.oracle import patched_positions, prediction_positions, sides, spectral_positions

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
    assert batch.place.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert torch.equal(batch.copies, batch.attention_mask)
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}
    assert not batch.shared
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
        expected = torch.bool if name in ("distinct", "in_completion", "last_prompt") else torch.int64
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
            kept = spectral_positions([one])[0][side]
            for position in prediction_positions(ids, start):
                expected.append((row, position, ids[position + 1], owner, side, position in kept))
    assert entries(batch) == expected
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


def test_a_shared_batch_written_out() -> None:
    one = pair([5, 6, 7, 8], [5, 6, 7, 9, 4], 2)
    two = pair([3, 4], [3, 5], 1)
    batch = make_batch([one, two], [7, 2], PAD, shared=True)
    assert batch.shared
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 7, 9, 4], [3, 4, 5, PAD, PAD, PAD, PAD]]
    assert batch.place.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 0, 0, 0]]
    assert batch.copies.tolist() == [[2, 2, 1, 1, 1, 1, 1], [2, 1, 1, 0, 0, 0, 0]]
    assert entries(batch) == [
        (0, 1, 7, 0, 0, True),
        (0, 2, 8, 0, 0, True),
        (1, 0, 4, 1, 0, True),
        (0, 1, 7, 0, 1, False),
        (0, 4, 9, 0, 1, False),
        (0, 5, 4, 0, 1, True),
        (1, 0, 5, 1, 1, False),
    ]
    assert batch.read.tolist() == [1, 2, 4, 5, 7]
    inputs = batch.model_inputs()
    assert torch.equal(inputs["position_ids"], batch.place)
    assert inputs["attention_mask"].shape == (2, 1, 7, 7)
    assert inputs["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    assert inputs["attention_mask"][1, 0].any(-1).all(), "padding sees something, or its softmax is empty"
    assert not inputs["attention_mask"][1, 0, :3, 3:].any()


@settings(max_examples=200, deadline=None)
@given(LISTS, st.sampled_from(["all", "prompt", "completion", "last_prompt_token"]))
def test_both_layouts_hold_the_same_sequences(pairs: list[ProbePair], positions: str) -> None:
    """Following what each token sees gives the two sequences back: ids, places, patched and predicting positions."""
    shared = make_batch(pairs, range(len(pairs)), PAD, shared=True)
    visible = shared.model_inputs()["attention_mask"][:, 0]
    mask = shared.position_mask(positions)
    expected, found = [], []
    for side in (0, 1):
        for owner, one in enumerate(pairs):
            ids, start = sides(one)[side]
            # The last token of a sequence sees all of it, and nothing else.
            last = pair_tokens(one, True) - 1 if side == 1 else len(one.chosen_ids) - 1
            seen = torch.nonzero(visible[owner, last]).flatten()
            assert shared.input_ids[owner, seen].tolist() == list(ids)
            assert shared.place[owner, seen].tolist() == list(range(len(ids)))
            for at, column in enumerate(seen.tolist()):
                assert torch.nonzero(visible[owner, column]).flatten().tolist() == seen[: at + 1].tolist()
            assert torch.nonzero(mask[owner, seen]).flatten().tolist() == patched_positions(ids, start, positions)
            expected += [(owner, side, at, ids[at + 1]) for at in prediction_positions(ids, start)]
    for row, position, target, owner, side, _ in entries(shared):
        assert row == owner
        found.append((owner, side, int(shared.place[row, position]), target))
    assert found == expected
    separate = make_batch(pairs, range(len(pairs)), PAD)
    assert torch.equal(shared.distinct, separate.distinct)
    lengths = [len(one.chosen_ids) + len(one.rejected_ids) for one in pairs]
    assert shared.copies.sum(1).tolist() == lengths
    assert shared.read.numel() <= separate.read.numel()


def test_prompts_of_unequal_length_do_not_share_their_last_token() -> None:
    """One prompt ends where the other goes on: the same position is the last of one only."""
    uneven = pair([5, 6, 7, 8], [5, 6, 7, 2], 2, rejected_start=3)
    assert common_prompt(uneven) == 1
    batch = make_batch([uneven], [0], PAD, shared=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 6, 7, 2]]
    assert batch.position_mask("last_prompt_token").int().tolist() == [[0, 1, 0, 0, 0, 1, 0]]
    assert common_prompt(pair([5, 6], [7, 8], 0)) == 0
    assert make_batch([pair([5, 6], [7, 8], 0)], [0], PAD, shared=True).place.tolist() == [[0, 1, 0, 1]]


@settings(max_examples=200, deadline=None)
@given(LISTS, st.integers(1, 60), st.booleans())
def test_every_pair_is_in_one_batch_within_the_budget(pairs: list[ProbePair], budget: int, shared: bool) -> None:
    plan = plan_batches(pairs, budget, shared=shared, padding=1.0)
    assert sorted(index for group in plan for index in group) == list(range(len(pairs)))
    widths = [pair_tokens(pairs[index], shared) for group in plan for index in group]
    assert widths == sorted(widths, reverse=True)
    for group in plan:
        batch = make_batch([pairs[index] for index in group], group, PAD, shared=shared)
        assert batch.pair_index.tolist() == group
        assert batch.input_ids.numel() <= budget or len(group) == 1
        assert batch.input_ids.shape[1] == pair_tokens(pairs[group[0]], shared)
    # A batch is not left half empty: the next pair would not have fitted.
    rows = 1 if shared else 2
    for group in plan[:-1]:
        assert rows * (len(group) + 1) * pair_tokens(pairs[group[0]], shared) > budget


@settings(max_examples=100, deadline=None)
@given(LISTS, st.floats(0.0, 0.5))
def test_padding_is_bounded(pairs: list[ProbePair], padding: float) -> None:
    for group in plan_batches(pairs, 10**6, shared=True, padding=padding):
        batch = make_batch([pairs[index] for index in group], group, PAD, shared=True)
        empty = 1 - float(batch.attention_mask.float().mean())
        assert empty <= padding + 1e-6


def test_moving_a_batch_keeps_everything() -> None:
    batch = make_batch([pair([5, 6, 7], [5, 8], 1)], [0], PAD)
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).device.type == "meta" for name in PairBatch.__dataclass_fields__)
    assert all(getattr(moved, name).shape == getattr(batch, name).shape for name in PairBatch.__dataclass_fields__)


def test_a_frozen_batch() -> None:
    batch = make_batch([pair([5, 6, 7], [5, 8], 1)], [0], PAD)
    with pytest.raises(AttributeError):
        batch.row = batch.position  # type: ignore[misc]
