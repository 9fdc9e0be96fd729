"""Probe pairs as records, files and saved sets with damage: a ``ProbeSet``, or a ``ProbeError``."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from align_audit.errors import ProbeError
from align_audit.probes.pairs import ProbeSet
from tests.fuzz.cases import as_json, bytes_of, damaged, fuzz, scalars, texts, told, values
from tests.helpers.probe_tokenizer import make_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is the sky?", "chosen": " It is blue.", "rejected": " It is a dog."},
    {"chosen": "the sky is blue", "rejected": "the sky is round"},
    {
        "prompt": MESSAGES,
        "chosen": [{"role": "assistant", "content": "the world"}],
        "rejected": [{"role": "assistant", "content": "a dog"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"style": "s"},
    },
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
]  # fmt: skip
SAVED = ProbeSet.from_dataset([ROWS[3], {**ROWS[3], "chosen_ids": [9]}], None)
COLUMNS = st.sampled_from([*{name for row in ROWS for name in row}, "image", "score", "\x1b[2J"])


@cache
def tokenizer() -> Any:
    return make_tokenizer()


def drawn(source: Any, **options: Any) -> None:
    for with_tokenizer in (tokenizer(), None):
        try:
            probes = ProbeSet.from_dataset(source, with_tokenizer, max_pairs=3, **options)
        except ProbeError as error:
            told(error)
            continue
        assert 1 <= len(probes) <= 3
        assert probes.content_hash
        probes.summary()
        for pair in probes:
            assert all(isinstance(token, int) for token in (*pair.chosen_ids, *pair.rejected_ids))
            assert pair.chosen_ids != pair.rejected_ids
            assert len(pair.chosen_predictions) > 0


@fuzz(rows=st.lists(st.one_of(damaged(ROWS), st.sampled_from(ROWS)), max_size=3))
def test_records_with_other_values(rows: list[Any]) -> None:
    drawn(rows)


@fuzz(rows=st.lists(st.one_of(st.dictionaries(COLUMNS, values, max_size=4), values), max_size=3))
def test_records_of_anything(rows: list[Any]) -> None:
    drawn(rows)


def in_file(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(gzip.compress(data, 1, mtime=0) if name.endswith(".gz") else data)
        drawn(path)


NAMES = st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.ndjson", "a.parquet", "a.txt"])
FILES = [
    b"\n".join(map(as_json, ROWS[:1] * 3)), as_json(ROWS[:1] * 2), as_json(ROWS[3]), as_json(ROWS[2]),
    b"\xef\xbb\xbf" + as_json(ROWS[0]),
]  # fmt: skip


@fuzz(name=NAMES, data=st.one_of(bytes_of(FILES), st.lists(damaged(ROWS), max_size=3).map(as_json)))
def test_text_files_with_damage(name: str, data: bytes) -> None:
    in_file(name, data)


@fuzz(0.5, data=bytes_of([gzip.compress(data, mtime=0) for data in FILES]))
def test_zipped_files_with_damage(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl.gz"
        path.write_bytes(data)
        drawn(path)


@st.composite
def tables(draw: st.DrawFn) -> Any:
    """A table of a few columns, of whatever kinds pyarrow takes the values for."""
    size = draw(st.integers(0, 3))
    cells = st.one_of(scalars, st.lists(st.integers(0, 9), max_size=3), st.just(MESSAGES), st.binary(max_size=3))
    columns = {}
    for name in draw(st.lists(COLUMNS, min_size=1, max_size=4, unique=True)):
        one = draw(st.sampled_from([cells, texts, st.lists(st.integers(0, 9), max_size=3), st.just(MESSAGES)]))
        cell = draw(one)
        column = [cell] * size
        try:
            columns[name] = pa.array(column)
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
            columns[name] = pa.nulls(size)
    return pa.table(columns)


TRUNCATION = st.fixed_dictionaries(
    {}, optional={"max_length": st.integers(2, 9), "truncation_mode": st.sampled_from(["keep_start", "keep_end"])}
)


@fuzz(0.5, table=tables(), cut=st.one_of(st.none(), st.integers(0, 400)), options=TRUNCATION)
def test_parquet_tables(table: Any, cut: int | None, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(table, path)
        if cut is not None:
            data = bytearray(path.read_bytes())
            data[cut % len(data)] ^= 0x41
            path.write_bytes(data)
        drawn(path, **options)


def saved() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        SAVED.save(Path(folder) / "set.json")
        return json.loads((Path(folder) / "set.json").read_bytes())


@fuzz(data=st.one_of(damaged([saved()]).map(as_json), bytes_of([as_json(saved())]), values.map(as_json)))
def test_saved_sets_with_damage(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_bytes(data)
        try:
            probes = ProbeSet.load(path)
        except ProbeError as error:
            told(error)
            return
        assert probes.content_hash == SAVED.content_hash
