"""Drawing, dropping, ordering and keeping probe pairs; ``test_probes_trainer.py`` holds the tokens to the trainer's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.errors import ProbeError
from align_audit.probes.pairs import EQUAL, EQUAL_TRUNCATED, PROMPT_FILLS, REPEATED, UNSCORABLE, ProbePair, ProbeSet
from align_audit.probes.sources import STREAM_BUFFER_FACTOR, STREAM_MAX_BUFFERS
from align_audit.probes.tokens import truncate
from tests.helpers.probe_tokenizer import EOS
from tests.probes.rows import CHAT, TEXT, draw, ready

# --- truncation and its bookkeeping -----------------------------------------------------------------------------------

token_ids = st.lists(st.integers(0, 3), max_size=6)


limits = st.none() | st.integers(2, 9)


modes = st.sampled_from(["keep_start", "keep_end"])


def cut_by_hand(prompt: list[int], completion: list[int], max_length: int | None, mode: str) -> list[tuple[int, bool]]:
    """(token, is it of the completion) one by one, until the sequence fits."""
    tokens = [(token, False) for token in prompt] + [(token, True) for token in completion]
    while max_length is not None and len(tokens) > max_length:
        tokens.pop(-1 if mode == "keep_start" else 0)
    return tokens


@settings(deadline=None)
@given(token_ids, token_ids, limits, modes)
def test_truncate_keeps_every_token_with_its_side(
    prompt: list[int], completion: list[int], max_length: int | None, mode: str
) -> None:
    ids, start = truncate(prompt, completion, max_length, mode)
    assert [(token, place >= start) for place, token in enumerate(ids)] == cut_by_hand(
        prompt, completion, max_length, mode
    )
    assert 0 <= start <= len(ids)


@settings(deadline=None)
@given(st.lists(st.tuples(token_ids, token_ids, token_ids), min_size=1, max_size=6), limits, modes)
def test_each_pair_is_kept_whole_or_counted(rows: list[Any], max_length: int | None, mode: str) -> None:
    expected: dict[int, Any] = {}
    kept: dict[int, Any] = {}
    reasons: dict[str, int] = {}
    for number, (prompt, chosen, rejected) in enumerate(rows):
        sides = [cut_by_hand(prompt, completion, max_length, mode) for completion in (chosen, rejected)]
        scored = [[place for place in range(1, len(side)) if side[place][1]] for side in sides]
        reason = None
        if max_length is not None and mode == "keep_start" and len(prompt) >= max_length:
            reason = PROMPT_FILLS
        elif chosen == rejected:
            reason = EQUAL
        elif not scored[0] or not scored[1]:
            reason = UNSCORABLE
        elif sides[0] == sides[1]:
            reason = EQUAL_TRUNCATED
        elif sides in kept.values():
            reason = REPEATED
        if reason in (None, REPEATED):
            kept[number] = sides
        if reason is None:
            expected[number] = [
                ([token for token, _ in side], places) for side, places in zip(sides, scored, strict=True)
            ]
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    records = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
    if not expected:
        with pytest.raises(ProbeError, match="no usable pair left") as caught:
            draw(records, max_length=max_length, truncation_mode=mode)
        assert all(f"{count} ({reason})" in str(caught.value) for reason, count in reasons.items())
        return
    probes = draw(records, max_length=max_length, truncation_mode=mode)
    assert dict(probes.dropped) == reasons
    found = {  # of equal ones any may be kept
        next(number for number in kept if kept[number] == kept[pair.index]): [
            (list(pair.chosen_ids), [place + 1 for place in pair.chosen_predictions]),
            (list(pair.rejected_ids), [place + 1 for place in pair.rejected_predictions]),
        ]
        for pair in probes
    }
    assert found == expected
    for pair in probes:
        shared = pair.common_prefix
        assert pair.chosen_ids[:shared] == pair.rejected_ids[:shared]
        assert pair.chosen_ids[shared : shared + 1] != pair.rejected_ids[shared : shared + 1] or (
            pair.chosen_ids == pair.rejected_ids
        )


def test_each_reason_to_drop() -> None:
    rows = [
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5], "rejected_ids": [6]},
        {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [5]},
        {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]},
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [6, 7]},
        {"prompt_ids": [1], "chosen_ids": [5, 5, 5, 8], "rejected_ids": [5, 5, 5, 9]},
        {"prompt_ids": [1], "chosen_ids": [5, 5, 5, 8, 5], "rejected_ids": [5, 5, 6]},
    ]
    probes = draw(rows, max_length=4)
    assert probes.dropped == {PROMPT_FILLS: 1, EQUAL: 1, UNSCORABLE: 2, EQUAL_TRUNCATED: 1}
    assert probes.pairs == (ProbePair(5, (1, 5, 5, 5), (1, 5, 5, 6), 1, 1),)
    kept = draw(rows, max_length=4, truncation_mode="keep_end")
    assert [pair.index for pair in kept] == [0, 4, 5]
    assert (kept[1].chosen_ids, kept[1].chosen_start) == ((5, 5, 5, 8), 0)
    assert kept[1].chosen_predictions == range(0, 3)


def test_a_pair_with_nothing_to_score_cannot_be_made() -> None:
    with pytest.raises(ProbeError, match="rejected has 1 tokens"):
        ProbePair(3, (1, 2), (1,), 1, 0)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_label_that_is_masked_is_no_token(side: str) -> None:
    """An embedding has no such row: on a CUDA device to look for it ends the process, and training with it."""
    ids = {"chosen_ids": (1, 2, 3), "rejected_ids": (1, 2, 4), f"{side}_ids": (-100, 2, 3)}
    with pytest.raises(ProbeError, match=f"pair 3: {side} holds -100, which is no token's id"):
        ProbePair(3, chosen_start=1, rejected_start=1, **ids)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_the_draw_depends_on_data_and_seed_alone() -> None:
    rows = ready(200)
    one, same, other = (draw(rows, max_pairs=20, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one.content_hash == same.content_hash != other.content_hash
    indices = [pair.index for pair in one]
    assert indices == sorted(set(indices))
    assert indices != list(range(20)), "the first records, not a draw"
    assert all(pair.chosen_ids == (1, 2, pair.index, 7) for pair in one)
    assert draw(Dataset.from_list(rows), max_pairs=20, seed=3).pairs == one.pairs


def test_only_the_records_that_are_needed_are_read() -> None:
    class Counting(list[Any]):
        read: list[int]

        def __getitem__(self, index: Any) -> Any:
            self.read.append(index)
            return super().__getitem__(index)

    rows = Counting(ready(1000, unusable=tuple(range(0, 1000, 2))))
    rows.read = []
    probes = draw(rows, max_pairs=10)
    assert len(probes) == 10
    assert len(rows.read) == 1 + 10 + probes.dropped[EQUAL]  # record 0, then those drawn
    assert probes.dropped[EQUAL] < 40


def test_fewer_usable_pairs_than_asked_for() -> None:
    probes = draw(ready(10, unusable=(2, 5)), max_pairs=64)
    assert [pair.index for pair in probes] == [0, 1, 3, 4, 6, 7, 8, 9]
    assert probes.dropped == {EQUAL: 2}


def counting_stream(rows: Any) -> tuple[IterableDataset, list[int]]:
    read: list[int] = []

    def generate() -> Iterator[Any]:
        for number, row in enumerate(rows()):
            read.append(number)
            yield row

    return IterableDataset.from_generator(generate), read


def test_a_stream_is_read_in_bounded_buffers() -> None:
    stream, read = counting_stream(lambda: iter(ready(1000)))
    probes = draw(stream, max_pairs=5, seed=1)
    assert len(probes) == 5
    # The first record once more for the look at it that datasets itself may take.
    assert sorted(set(read)) == list(range(STREAM_BUFFER_FACTOR * 5))
    indices = [pair.index for pair in probes]
    assert indices != list(range(5)), "the first records, not a draw"
    assert all(pair.chosen_ids[2] == pair.index for pair in probes)
    assert draw(counting_stream(lambda: iter(ready(1000)))[0], max_pairs=5, seed=1) == probes


def test_a_stream_is_read_on_while_pairs_are_missing() -> None:
    unusable = tuple(range(3, 30))
    stream, read = counting_stream(lambda: iter(ready(100, unusable)))
    probes = draw(stream, max_pairs=5)
    assert [pair.index for pair in probes][:3] == [0, 1, 2]
    assert 20 < max(read) < 40
    assert len(probes) == 5
    short = draw(counting_stream(lambda: iter(ready(7)))[0], max_pairs=5)
    assert len(short) == 5
    assert len(draw(counting_stream(lambda: iter(ready(3)))[0], max_pairs=5)) == 3


def test_an_endless_stream_without_usable_pairs_ends() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}

    stream, read = counting_stream(endless)
    with pytest.raises(ProbeError, match=r"128 \(equal completions\)"):
        draw(stream, max_pairs=2)
    assert max(read) + 1 == STREAM_MAX_BUFFERS * STREAM_BUFFER_FACTOR * 2 == 128


def test_nothing_global_changes(tokenizer: Any) -> None:
    def state() -> Any:
        backend = tokenizer.backend_tokenizer.to_str()
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002  (that nobody touches it is the point)
        settings = {key: repr(value) for key, value in vars(tokenizer).items()}
        return backend, settings, random.getstate(), numpy_state, torch.get_rng_state().tolist()

    tokenizer.model_max_length = 5  # provokes the warning that is kept as a flag
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(4, stride=1, direction="left")
    tokenizer.backend_tokenizer.enable_padding(length=50, pad_id=3)
    row = {**CHAT}
    before = state()
    probes = ProbeSet.from_dataset([row], tokenizer)
    assert state() == before
    assert tokenizer.pad_token is None
    assert len(probes[0].chosen_ids) > 5
    with pytest.raises(ProbeError):
        ProbeSet.from_dataset([row, {**row, "chosen": [{"role": "user", "content": {}}], "tools": "{"}], tokenizer)
    assert state() == before
    assert row == CHAT
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


# --- formats ----------------------------------------------------------------------------------------------------------


def test_text_by_hand(tokenizer: Any) -> None:
    pair = ProbeSet.from_dataset([TEXT], tokenizer)[0]
    assert tokenizer.decode(pair.chosen_ids) == f"Is the sky blue? The sky is blue.{EOS}"
    assert tokenizer.decode(pair.rejected_ids[pair.rejected_start :]) == f" The world is round.{EOS}"
    assert pair.chosen_start == len(tokenizer("Is the sky blue?")["input_ids"])


def test_conversation_by_hand(tokenizer: Any) -> None:
    pair = ProbeSet.from_dataset([CHAT], tokenizer)[0]
    assert tokenizer.decode(pair.chosen_ids) == f"<|user|>Is the sky blue?{EOS}<|assistant|>The sky is blue.{EOS}"
    assert tokenizer.decode(pair.chosen_ids[pair.chosen_start :]) == f"The sky is blue.{EOS}"
    implicit = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert ProbeSet.from_dataset([implicit], tokenizer)[0] == pair


def test_the_first_record_decides_about_eos_and_prompt(tokenizer: Any) -> None:
    """As in the trainer: text in data that begins with a conversation gets no EOS."""
    probes = ProbeSet.from_dataset([CHAT, TEXT], tokenizer)
    assert tokenizer.decode(probes[1].chosen_ids) == "Is the sky blue? The sky is blue."
    with pytest.raises(ProbeError, match="record 1 is conversational while record 0 is plain text"):
        ProbeSet.from_dataset([TEXT, CHAT], tokenizer)
    implicit = {"chosen": "The sky is blue.", "rejected": "The sky is round."}
    with_prompt = {**implicit, "prompt": "ignored"}
    probes = ProbeSet.from_dataset([implicit, with_prompt], tokenizer)
    assert (len(probes), dict(probes.dropped)) == (1, {REPEATED: 1})  # the prompt is not read: the pair is the first's
    other = {**implicit, "rejected": "The sky is flat."}
    first, second = ProbeSet.from_dataset([implicit, {**other, "prompt": "ignored"}], tokenizer)
    assert first.chosen_ids == second.chosen_ids


def test_prepared_columns_come_first_and_need_no_tokenizer() -> None:
    row = {**TEXT, **ready(1)[0], "ref_chosen_logps": -3.5, "ref_rejected_logps": np.float32(-4.25)}
    probes = draw([row])
    assert probes.pairs == (ProbePair(0, (1, 2, 0, 7), (1, 2, 0, 8), 2, 2, (-3.5, -4.25)),)
    assert draw([{**row, "ref_chosen_logps": None}])[0].reference_logps is None
    for kind in ("torch", "numpy", "pandas", "arrow"):
        formatted = Dataset.from_list([row]).with_format(kind)
        assert draw(formatted).pairs == probes.pairs
        assert formatted.format["type"] == kind
    arrays = {**ready(1)[0], "chosen_ids": np.array([0, 7])}
    assert draw([arrays])[0].chosen_ids == (1, 2, 0, 7)
    with pytest.raises(ProbeError, match="no tokenizer was given"):  # two of the three columns do not do
        draw([{name: value for name, value in row.items() if name != "rejected_ids"}])


def test_a_transform_is_applied(tokenizer: Any) -> None:
    raw = Dataset.from_list([{"good": TEXT["chosen"], "bad": TEXT["rejected"]}])
    shaped = raw.with_transform(
        lambda batch: {"prompt": [TEXT["prompt"]], "chosen": batch["good"], "rejected": batch["bad"]}
    )
    assert ProbeSet.from_dataset(shaped, tokenizer).pairs == ProbeSet.from_dataset([TEXT], tokenizer).pairs
