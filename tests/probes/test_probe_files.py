"""Pairs from files, and what is refused of data, files and arguments, in words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict

from align_audit.errors import ProbeError
from align_audit.probes.pairs import ProbeSet
from tests.helpers.probe_tokenizer import EOS, make_tokenizer
from tests.probes.rows import CHAT, TEXT, draw, ready

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


def as_stream(data: Dataset, folder: Path) -> Any:
    return data.to_iterable_dataset()


def as_parquet(data: Dataset, folder: Path) -> Any:
    data.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_folder(data: Dataset, folder: Path) -> Any:
    data.save_to_disk(folder / "rows")
    return folder / "rows"


def as_lines(data: Dataset, folder: Path) -> Any:
    data.to_json(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def as_stream_of_unknown_columns(data: Dataset, folder: Path) -> Any:
    return IterableDataset.from_generator(lambda: iter(data.to_list()))


FORMS = [lambda data, folder: data, as_stream, as_parquet, as_folder, as_lines, as_stream_of_unknown_columns]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [("question", "answer"), ("prompt", "chosen", "reject")])
def test_columns_that_are_not_those_of_pairs_are_named(
    columns: tuple[str, ...], form: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """All that are there: one may be a wrong name of what is not."""
    data = Dataset.from_list([dict.fromkeys(columns, "a")] * 3)
    with pytest.raises(ProbeError, match=f"found the columns {', '.join(columns)}; expected one of these sets"):
        ProbeSet.from_dataset(form(data, tmp_path), tokenizer)


@pytest.mark.parametrize("form", FORMS[:4])
def test_columns_that_no_pair_needs_are_not_decoded(form: Any, tokenizer: Any, tmp_path: Path) -> None:
    picture = {"bytes": b"no picture", "path": None}
    rows = [{**TEXT, "picture": picture}, {**TEXT, "chosen": "Another.", "picture": picture}]
    data = Dataset.from_list(rows).cast_column("picture", Image())
    assert len(ProbeSet.from_dataset(form(data, tmp_path), tokenizer)) == 2


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_stream_that_breaks_is_refused_in_one_line(count: int, tokenizer: Any) -> None:
    def rows() -> Iterator[Any]:
        yield from [TEXT] * count
        raise OSError("the disk\nis gone")

    said = f"the stream breaks after {count} records?: the disk$"
    with pytest.raises(ProbeError, match=said):
        ProbeSet.from_dataset(IterableDataset.from_generator(rows), tokenizer, 10)


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
