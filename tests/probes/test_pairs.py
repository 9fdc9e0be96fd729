"""Drawing, dropping, ordering and keeping probe pairs; ``test_probes_trainer.py`` holds the tokens to the trainer's."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.errors import ProbeError
from align_audit.probes.pairs import EQUAL, EQUAL_TRUNCATED, PROMPT_FILLS, REPEATED, UNSCORABLE, ProbePair, ProbeSet
from align_audit.probes.sources import STREAM_BUFFER_FACTOR, STREAM_MAX_BUFFERS
from align_audit.probes.tokens import truncate
from tests.helpers.probe_tokenizer import EOS, make_tokenizer

TEXT = {"prompt": "Is the sky blue?", "chosen": " The sky is blue.", "rejected": " The world is round."}
CHAT = {
    "prompt": [{"role": "user", "content": "Is the sky blue?"}],
    "chosen": [{"role": "assistant", "content": "The sky is blue."}],
    "rejected": [{"role": "assistant", "content": "The world is round."}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def ready(n: int, unusable: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    """``n`` records of token ids that tell their number; those in ``unusable`` have equal completions."""
    return [
        {"prompt_ids": [1, 2], "chosen_ids": [i, 7], "rejected_ids": [i, 7 if i in unusable else 8]} for i in range(n)
    ]


def draw(rows: Any, **options: Any) -> ProbeSet:
    return ProbeSet.from_dataset(rows, None, **options)


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


# --- files ------------------------------------------------------------------------------------------------------------


def many() -> list[dict[str, Any]]:
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    return [{**TEXT, "chosen": f" Paris {i}\u2028.", "id": i} for i in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == "":
        Dataset.from_list(rows).save_to_disk(str(path))
    else:
        lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text = json.dumps(rows) if ".json" in path.suffixes and "lines" not in path.name else lines
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.JSONL", "a.json", "a.json.gz", "lines.json", "a.parquet", "saved"]
)
@pytest.mark.parametrize("row", [TEXT, CHAT], ids=["text", "conversation"])
def test_files_hold_the_same_pairs(tmp_path: Path, tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    rows = many() if row is TEXT else [{**CHAT, "id": i, "rejected": many_turns(i)} for i in range(12)]
    path = write(tmp_path / name, rows)
    before = sorted(tmp_path.rglob("*"))
    expected = ProbeSet.from_dataset(rows, tokenizer, 5)
    for given_path in (path, str(path)):
        probes = ProbeSet.from_dataset(given_path, tokenizer, 5)
        assert probes.pairs == expected.pairs
    assert name in probes.source
    assert sorted(tmp_path.rglob("*")) == before


def many_turns(i: int) -> list[dict[str, str]]:
    return [
        {"role": "assistant", "content": f"No {i}."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"chosen": "a", "rejected": "b"}\n\n{"chosen": \n', "line 3: not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: expected a JSON object, found list"),
        ("a.jsonl", b"\n\n", "no records"),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
        ("a.jsonl.gz", b'{"chosen": "a"}', "gzipped"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-12], "gzipped"),
        ("a.json", b'[{"chosen": "a",]', "line 1, column 17"),
        ("a.json", b'{"train": [], "test": []}', "splits train, test"),
        ("a.json", b'{"chosen": ["a"], "rejected": ["b"]}', "one record per pair"),
        ("a.json", b'"text"', "expected a JSON list of records, found str"),
        ("a.json", b"[3]", "record 0: expected a dict"),
        ("a.json", b'{"format_version": 1, "pairs": []}', "ProbeSet.load"),
        ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("a.csv", b"chosen,rejected\n", "unknown kind of file"),
    ],
)
def test_bad_files(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ProbeError, match=message) as caught:
        ProbeSet.from_dataset(path, tokenizer)
    assert name in str(caught.value) or "record 0" in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=r"no such file.*load_dataset"):
        ProbeSet.from_dataset("some/hub-name", tokenizer)
    with pytest.raises(ProbeError, match="cannot be loaded as a saved data set"):
        ProbeSet.from_dataset(tmp_path, tokenizer)
    DatasetDict({"train": Dataset.from_list([TEXT]), "test": Dataset.from_list([TEXT])}).save_to_disk(tmp_path / "d")
    with pytest.raises(ProbeError, match="splits train, test"):
        ProbeSet.from_dataset(tmp_path / "d", tokenizer)
    assert len(ProbeSet.from_dataset(tmp_path / "d" / "train", tokenizer)) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(row: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no records"),
        (Dataset.from_dict({"chosen": [], "rejected": []}), "no records"),
        (IterableDataset.from_generator(lambda: iter(())), "no records"),
        (
            DatasetDict(train=Dataset.from_list([TEXT]), test=Dataset.from_list([TEXT])),
            r"splits train, test.*\['test'\]",
        ),
        (IterableDatasetDict(train=Dataset.from_list([TEXT]).to_iterable_dataset()), "splits train"),
        ({}, "empty dict"),
        (TEXT, "one record per pair"),
        (iter([TEXT]), "cannot draw probe pairs from list_iterator"),
        (7, "cannot draw probe pairs from int"),
        ([TEXT["chosen"]], "record 0: expected a dict.*found str"),
        (
            [{"question": "a", "chosen": "b"}],
            r"columns question, chosen; expected.*prompt_ids, chosen_ids, rejected_ids",
        ),
        ([TEXT, {"prompt": "a", "chosen": "b"}], "record 1: column 'rejected' is missing"),
        (changed(TEXT, chosen=None), "column 'chosen' holds NoneType None"),
        (changed(TEXT, rejected=3), "column 'rejected' holds int 3"),
        (changed(TEXT, prompt=None), "column 'prompt' holds NoneType"),
        (changed(TEXT, chosen=["a", "b"]), "column 'chosen' holds list"),
        (changed(CHAT, chosen=[]), "non-empty list of messages"),
        (changed(CHAT, chosen=[{"content": "no role"}]), "column 'chosen' holds list"),
        (changed(CHAT, prompt="Hi"), "prompt is plain text, chosen is messages.*remove the prompt column"),
        (changed(CHAT, rejected="Hi"), "rejected is plain text"),
        (changed(CHAT, tools="{"), "'tools' is not valid JSON"),
        (changed(CHAT, chat_template_kwargs=None), "'chat_template_kwargs' holds NoneType"),
        (changed(TEXT, image=None), "pairs with images"),
        (changed(ready(1)[0], images=[]), "pairs with images"),
        ([{"chosen": "", "rejected": "a"}], "no prompt to find"),
        ([{"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}], "share no message"),
        (changed(ready(1)[0], prompt_ids="12"), "column 'prompt_ids' holds str '12'; expected a list of token ids"),
        (changed(ready(1)[0], chosen_ids=[1.0]), "column 'chosen_ids' holds list"),
        (changed(ready(1)[0], rejected_ids=[-100]), "column 'rejected_ids'"),
        (changed(ready(1)[0], ref_chosen_logps="x", ref_rejected_logps=1.0), "expected two numbers"),
        (changed(TEXT, chosen=TEXT["rejected"]), r"no usable pair left; dropped 1 \(equal completions\).*differ"),
    ],
)
def test_unusable_data(tokenizer: Any, rows: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        ProbeSet.from_dataset(rows, tokenizer)


def test_a_bad_record_that_is_not_drawn_is_not_an_error(tokenizer: Any) -> None:
    rows = [{**TEXT, "chosen": f"The sky is blue {number}."} for number in range(30)]
    drawn = {pair.index for pair in ProbeSet.from_dataset(rows, tokenizer, 3)}
    spared = next(i for i in range(1, 30) if i not in drawn)
    rows = [{} if i == spared else row for i, row in enumerate(rows)]
    assert {pair.index for pair in ProbeSet.from_dataset(rows, tokenizer, 3)} == drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pairs": 0}, "max_pairs: expected a whole number of at least 1, found 0"),
        ({"max_pairs": 2.5}, "max_pairs"),
        ({"max_pairs": True}, "max_pairs"),
        ({"max_length": 1}, "max_length.*at least 2, found 1"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode: expected keep_start or keep_end, found 'keep_middle'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        draw(ready(3), **options)


def test_tokenizers_that_do_not_do(tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match="no tokenizer was given"):
        draw([TEXT])
    with pytest.raises(ProbeError, match="found str as the tokenizer"):
        ProbeSet.from_dataset([TEXT], "gpt2")  # type: ignore[arg-type]
    without_eos = make_tokenizer(pad_token=EOS)
    with pytest.raises(ProbeError, match="no EOS token"):
        ProbeSet.from_dataset([TEXT], without_eos)
    assert len(ProbeSet.from_dataset([CHAT], without_eos)) == 1
    with pytest.raises(ProbeError, match=r"record 0 \(conversation\) cannot be tokenized.*chat_template"):
        ProbeSet.from_dataset([CHAT], make_tokenizer(template=None))


def test_what_to_do_when_prompts_fill_the_length(tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=r"dropped 2 \(prompt fills max_length\).*raise max_length \(now 2\)"):
        ProbeSet.from_dataset([TEXT, TEXT], tokenizer, max_length=2)


# --- the set itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def probes() -> ProbeSet:
    rows = ready(30, unusable=(4,))
    return draw(rows, max_length=8, source="eval set of the trainer", held_out=True)


def test_reads_like_a_sequence(probes: ProbeSet) -> None:
    assert len(probes) == 29
    assert list(probes) == list(probes.pairs)
    assert probes[-1] is probes.pairs[-1]
    assert isinstance(probes[:2], ProbeSet)
    assert probes[:2].pairs == probes.pairs[:2]
    with pytest.raises(ProbeError, match="at least one pair"):
        probes[:0]
    assert probes.num_tokens == 29 * 8
    assert pickle.loads(pickle.dumps(probes)) == probes
    assert hash(probes) == hash(dataclasses.replace(probes))


def test_repr_tells_what_matters(probes: ProbeSet) -> None:
    text = repr(probes)
    for part in ("29 pairs", "232 tokens", "at most 8 each, keep_start", "eval set of the trainer", "held out"):
        assert part in text
    assert "dropped 1 (equal completions)" in text
    assert probes.content_hash in text
    assert "\n" not in text
    assert "1 pair," in repr(dataclasses.replace(probes[:1], max_length=None, held_out=None))
    assert "not truncated" in repr(dataclasses.replace(probes[:1], max_length=None))
    assert "trained on" in repr(dataclasses.replace(probes, held_out=False))


def test_subsample(probes: ProbeSet) -> None:
    part = probes.subsample(7, seed=5)
    assert len(part) == 7
    assert set(part) < set(probes)
    assert [pair.index for pair in part] == sorted(pair.index for pair in part)
    assert part == probes.subsample(7, seed=5) != probes.subsample(7, seed=6)
    assert probes.subsample(100, seed=5) == probes
    with pytest.raises(ProbeError, match="n: expected"):
        probes.subsample(0, seed=5)


@settings(deadline=None)
@given(st.integers(2, 29), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 9))
def test_split_parts_make_up_the_set(size: int, fraction: float, seed: int) -> None:
    probes = draw(ready(size))
    first, second = probes.split(fraction, seed)
    assert len(first) + len(second) == size
    assert abs(len(first) - fraction * size) < 1.01
    assert sorted([*first, *second], key=lambda pair: pair.index) == list(probes)
    assert [pair.index for pair in second] == sorted(pair.index for pair in second)
    assert probes.split(fraction, seed) == (first, second)


def test_split_refuses(probes: ProbeSet) -> None:
    assert probes.split(0.5, 0) != probes.split(0.5, 1)
    for fraction in (0.0, 1.0, -2.0, float("nan")):
        with pytest.raises(ProbeError, match="fraction"):
            probes.split(fraction, 0)
    with pytest.raises(ProbeError, match="at least 2 pairs"):
        probes[:1].split(0.5, 0)


def test_the_hash_sees_tokens_and_starts_and_nothing_else(probes: ProbeSet) -> None:
    pair = ProbePair(0, (1, 2, 3, 4), (1, 2, 5, 6), 2, 2)
    base = ProbeSet((pair,), "a", {}, 8, "keep_start", None)
    # Pinned: stored records refer to probes by this value, so it may never change.
    assert base.content_hash == "fd94d6906d100372"
    for values in (
        {"chosen_ids": (1, 2, 3, 5)},
        {"rejected_ids": (1, 2, 5)},
        {"chosen_start": 1},
        {"rejected_start": 3},
    ):
        other = dataclasses.replace(base, pairs=(dataclasses.replace(pair, **values),))  # type: ignore[arg-type]
        assert other.content_hash != base.content_hash, values
    moved = dataclasses.replace(pair, index=9, reference_logps=(-1.0, -2.0))
    assert ProbeSet((moved,), "b", {EQUAL: 2}, None, "keep_end", True).content_hash == base.content_hash
    assert dataclasses.replace(probes, pairs=probes.pairs[::-1]).content_hash != probes.content_hash


@pytest.mark.parametrize("name", ["probes.json", "deep/probes.json.gz"])
def test_saved_and_loaded(tmp_path: Path, name: str, probes: ProbeSet) -> None:
    pair = dataclasses.replace(probes[3], reference_logps=(-1.25, -0.1))
    probes = dataclasses.replace(probes, pairs=(*probes.pairs[:3], pair))
    path = tmp_path / name
    probes.save(path)
    first = path.read_bytes()
    assert ProbeSet.load(path) == probes
    probes.save(str(path))
    assert path.read_bytes() == first
    if name.endswith(".gz"):
        assert first[4:8] == bytes(4), "the time of writing is in the file"
    assert list(path.parent.iterdir()) == [path], "a partial file was left"
    # Another process, with another hash seed, finds the same.
    command = f"from align_audit.probes.pairs import ProbeSet; print(ProbeSet.load({str(path)!r}).content_hash)"
    seeded = {**os.environ, "PYTHONHASHSEED": "77"}
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, env=seeded)
    assert found.stdout.strip() == probes.content_hash


def test_saving_fails_whole(tmp_path: Path, probes: ProbeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "probes.json"
    probes.save(path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        probes[:2].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loading_refuses(tmp_path: Path, probes: ProbeSet) -> None:
    path = tmp_path / "probes.json"
    probes.save(path)
    content = json.loads(path.read_text())

    def refused(message: str, **changes: Any) -> None:
        path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))
        with pytest.raises(ProbeError, match=message):
            ProbeSet.load(path)

    pairs = content["pairs"]
    refused("format version 2.*up to 1", format_version=2)
    refused("no format_version", format_version=...)
    refused("damaged", source=...)
    refused("damaged", pairs=3)
    refused("damaged", pairs=[])
    refused("damaged", pairs=[{**pairs[0], "colour": 1}])
    refused("do not match the stored content hash", pairs=pairs[1:])
    path.write_text("not json")
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(path)
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(tmp_path / "absent.json.gz")
    path.rename(tmp_path / "probes.json.gz")
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(tmp_path / "probes.json.gz")


def test_the_import_is_light() -> None:
    command = (
        "import sys, align_audit.probes.pairs; "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
