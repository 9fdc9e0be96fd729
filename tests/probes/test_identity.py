"""What a pair is: its identity, the group of those that share its prompt, repetitions, and an order of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.probes.pairs import REPEATED, ProbePair, ProbeSet, in_canonical_order
from tests.helpers.probe_tokenizer import make_tokenizer

TOKENS = st.lists(st.integers(0, 2), max_size=3).map(tuple)


@st.composite
def pairs(draw: Any) -> ProbePair:
    prompt, chosen, rejected = draw(TOKENS), draw(TOKENS), draw(TOKENS)
    return ProbePair(
        draw(st.integers(0, 99)), (*prompt, *chosen, 5, 7), (*prompt, *rejected, 5, 8), len(prompt), len(prompt)
    )


def content(pair: ProbePair) -> Any:
    return pair.chosen_ids, pair.rejected_ids, pair.chosen_start, pair.rejected_start


@settings(max_examples=200, deadline=None)
@given(pairs(), pairs())
def test_identity_and_group_are_made_of_tokens_alone(one: ProbePair, other: ProbePair) -> None:
    assert (one.identity == other.identity) == (content(one) == content(other))
    prompts = [pair.chosen_ids[: pair.chosen_start] for pair in (one, other)]
    together = prompts[0] == prompts[1] if len(prompts[0]) > 1 else content(one) == content(other)
    assert (one.group == other.group) == together
    for number in (one.identity, one.group):
        assert 0 <= number < 2**63


def test_a_prompt_of_one_token_is_what_every_sequence_begins_with() -> None:
    """Half of all pairs would be one group otherwise."""
    one, other = ProbePair(0, (1, 2, 3), (1, 2, 4), 1, 1), ProbePair(1, (1, 5, 3), (1, 5, 4), 1, 1)
    assert one.group != other.group
    assert one.group == one.identity
    longer = [ProbePair(i, (1, 2, 3 + i), (1, 2, 9), 2, 2) for i in range(2)]
    assert longer[0].group == longer[1].group
    assert longer[0].identity != longer[1].identity


@settings(max_examples=100, deadline=None)
@given(st.lists(pairs(), max_size=12), st.randoms(use_true_random=False))
def test_canonical_order_does_not_depend_on_the_given_one(given_pairs: list[ProbePair], shuffle: random.Random) -> None:
    ordered, places = in_canonical_order(given_pairs)
    assert [ordered[place].sequences for place in places] == [pair.sequences for pair in given_pairs]
    assert len({pair.sequences for pair in ordered}) == len(ordered) == len({pair.sequences for pair in given_pairs})
    groups = [pair.group for pair in ordered]
    assert groups == sorted(groups)  # one behind the other
    for pair in ordered:  # of equal ones the first that was given
        assert pair.index == next(same.index for same in given_pairs if content(same) == content(pair))
        # Of those that say otherwise where completions begin, one, whatever order they were given in.
        alike = [(same.group, same.identity) for same in given_pairs if same.sequences == pair.sequences]
        assert (pair.group, pair.identity) == min(alike)
    shuffled = list(given_pairs)
    shuffle.shuffle(shuffled)
    again, elsewhere = in_canonical_order(shuffled)
    assert [content(pair) for pair in again] == [content(pair) for pair in ordered]
    assert [again[place].sequences for place in elsewhere] == [pair.sequences for pair in shuffled]
    assert places.dtype == np.int64


def row(prompt: list[int], chosen: int, rejected: int) -> dict[str, list[int]]:
    return {"prompt_ids": prompt, "chosen_ids": [chosen, 0], "rejected_ids": [rejected, 0]}


ROWS = [row([1, 2], 3, 4), row([1, 2], 3, 4), row([1, 2], 4, 3), row([1, 9], 3, 4), row([1, 2], 3, 4), row([5], 3, 4)]


def test_a_set_holds_no_pair_twice_and_counts_those_that_are_independent() -> None:
    probes = ProbeSet.from_dataset(ROWS, None)
    assert len(probes) == 4
    assert {pair.index for pair in probes} > {2, 3, 5}
    assert dict(probes.dropped) == {REPEATED: 2}
    assert probes.groups == 3  # the first two share a prompt
    assert "repeats another pair" in probes.summary()
    assert "3 independent of each other (those that share a prompt count once)" in probes.summary()
    assert "independent" not in ProbeSet.from_dataset(ROWS[2:4], None).summary()


def test_one_whose_completions_begin_elsewhere_is_a_repetition() -> None:
    """The token that goes over to the prompt is in both completions, behind the same tokens: margins are equal."""
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 6, 5]},
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 5]},
    ]
    probes = ProbeSet.from_dataset(rows, None)
    assert (len(probes), dict(probes.dropped)) == (1, {REPEATED: 1})


@pytest.mark.parametrize("max_length", [None, 14, 10, 8])
def test_pairs_of_a_prompt_that_is_cut_from_the_left_are_of_one_group(max_length: int | None, tmp_path: Path) -> None:
    """How much is cut depends on the completion; that they are not independent does not."""
    prompts = {"one": [*range(20, 32)], "another": [*range(40, 52)]}
    rows = [
        {"prompt_ids": prompt, "chosen_ids": [1, *range(2, 2 + length), 60], "rejected_ids": [3, 60]}
        for prompt in prompts.values()
        for length in range(1, 7)
    ]
    probes = ProbeSet.from_dataset(rows, None, max_length=max_length, truncation_mode="keep_end")
    assert (len(probes), probes.groups) == (12, 2)
    cut = [pair for pair in probes if pair.chosen_start != 12]
    assert bool(cut) == (max_length is not None)
    assert {pair.prompt_hash is None for pair in cut} <= {False}
    whole = ProbeSet.from_dataset(rows, None)
    assert [pair.group for pair in probes] == [pair.group for pair in whole]
    probes.save(tmp_path / "probes.json")
    assert ProbeSet.load(tmp_path / "probes.json").pairs == probes.pairs
    assert ("prompt_hash" in (tmp_path / "probes.json").read_text()) == bool(cut)
    version = json.loads((tmp_path / "probes.json").read_text())["format_version"]
    assert version == (2 if cut else 1), "earlier versions read what they know"


def test_a_prompt_whose_last_token_merges_with_a_completion_is_one() -> None:
    """``DPOTrainer`` lets a completion begin where the sequence leaves the tokenized prompt."""
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in ("A little dog sat in the hou", "The sky is blue wor")
        for chosen, rejected in (("ld is round.", "n out dog."), (" sat.", " dog."), ("se and world.", "n blue."))
    ]
    probes = ProbeSet.from_dataset(rows, tokenizer)
    starts = [pair.chosen_start for pair in probes]
    assert len(set(starts[:3])) > 1 or len(set(starts[3:])) > 1, "or this shows nothing"
    assert probes.groups == 2


def test_repetitions_are_looked_for_behind_and_do_not_count_as_drawn() -> None:
    for seed in range(5):
        drawn = ProbeSet.from_dataset(ROWS, None, 4, seed=seed)
        assert len(drawn) == 4
        assert len({pair.identity for pair in drawn}) == 4


@pytest.mark.parametrize("maximum", [1, 2])
def test_what_is_not_met_is_not_counted(maximum: int) -> None:
    drawn = ProbeSet.from_dataset(ROWS[:2], None, maximum)
    assert len(drawn) == 1
    assert sum(drawn.dropped.values()) <= 1
