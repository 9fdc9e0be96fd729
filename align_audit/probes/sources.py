"""Where probe pairs come from: data sets, streams, lists and files, read as plain records in a seeded order.

Nothing here knows about tokens; :mod:`align_audit.probes.tokens` does.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from align_audit.errors import ProbeError

PREPARED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
VISION_COLUMNS = ("image", "images")
_USED_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
    *PREPARED_COLUMNS,
    *REFERENCE_COLUMNS,
    *VISION_COLUMNS,
)
ACCEPTED_COLUMNS = (
    "prompt, chosen, rejected (explicit prompt); chosen, rejected (what they share at the start is the prompt); "
    "or prompt_ids, chosen_ids, rejected_ids (prepared by the trainer)"
)

STREAM_BUFFER_FACTOR = 4
"""A stream is read in buffers of this many records per wanted pair."""
STREAM_MAX_BUFFERS = 16
"""Buffers after which a stream is given up, however few usable pairs were met: it may have no end."""

_FILE_KINDS = ".jsonl, .ndjson, .json (each also with .gz), .parquet, or a directory written by Dataset.save_to_disk"
_READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)


@dataclass(frozen=True)
class Source:
    """Records to draw from.

    Attributes:
        description: in words, where the records come from.
        first: the record at index 0, whatever the order of ``records``; TRL decides some things from it alone.
        records: (index in the data set, record), each index at most once, in an order fixed by the seed.
    """

    description: str
    first: Mapping[str, Any]
    records: Iterator[tuple[int, Mapping[str, Any]]]


def open_source(dataset: Any, max_pairs: int, seed: int) -> Source:
    """Open ``dataset`` (see ``ProbeSet.from_dataset`` for what it may be).

    Of a map-style source only the records that are asked for are read, along one seeded permutation. Of a stream,
    ``4 * max_pairs`` records are read, in order, and walked along a seeded permutation; only when these are used up
    the next ``4 * max_pairs`` are read, up to 16 times.

    Raises:
        ProbeError: unknown kind of source, a collection of splits, an unreadable file, or no records.
    """
    if isinstance(dataset, str | Path):
        rows, description = _read_path(Path(dataset).expanduser())
        return _map_style(rows, description, seed)
    if isinstance(dataset, Mapping):
        raise ProbeError(_explain_mapping(dataset))
    if isinstance(dataset, list | tuple):
        return _map_style(dataset, f"list of {len(dataset)} records", seed)

    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset):
        return _map_style(_plain_rows(dataset), f"dataset of {len(dataset)} rows", seed)
    if isinstance(dataset, IterableDataset):
        # The new object also keeps the caller's own free of the iteration state that datasets stores in it.
        return _stream(dataset.with_format(None), "stream", STREAM_BUFFER_FACTOR * max_pairs, seed)
    raise ProbeError(
        f"cannot draw probe pairs from {type(dataset).__name__}; expected a datasets.Dataset or IterableDataset, "
        f"a list of dicts, or the path of a file ({_FILE_KINDS})"
    )


def _map_style(rows: Sequence[Any], description: str, seed: int) -> Source:
    if len(rows) == 0:
        raise ProbeError(f"{description}: no records; expected at least one preference pair")

    def walk() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
            yield index, _as_record(rows[index], index)

    return Source(description, _as_record(rows[0], 0), walk())


def _stream(rows: Iterable[Any], description: str, buffer_size: int, seed: int) -> Source:
    iterator = iter(rows)
    try:
        first = _as_record(next(iterator), 0)
    except StopIteration:
        raise ProbeError("the stream has no records; expected at least one preference pair") from None

    def walk() -> Iterator[tuple[int, Mapping[str, Any]]]:
        numbered = enumerate(chain([first], iterator))
        rng = np.random.default_rng(seed)
        for _ in range(STREAM_MAX_BUFFERS):
            buffer = list(islice(numbered, buffer_size))
            for place in rng.permutation(len(buffer)).tolist():
                index, record = buffer[place]
                yield index, _as_record(record, index)
            if len(buffer) < buffer_size:
                return

    return Source(description, first, walk())


def _as_record(value: Any, index: int) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ProbeError(f"record {index}: expected a dict with the columns {ACCEPTED_COLUMNS}; found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in an error message: its type, and the beginning of it."""
    return f"{type(value).__name__} {value!r:.60}"


def _plain_rows(dataset: Any) -> Any:
    """The same rows as Python values, without columns that are never read (decoding audio, say, is slow)."""
    if dataset.format["type"] == "custom":  # a user's transform: its output is what the trainer sees
        return dataset
    return dataset.with_format(None).select_columns([name for name in _USED_COLUMNS if name in dataset.column_names])


def _explain_mapping(dataset: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in dataset]
    if "chosen" in keys or "chosen_ids" in keys:
        return (
            f"found a single dict with the keys {', '.join(keys)}; expected one record per pair: pass a list of such "
            "dicts, or datasets.Dataset.from_dict(...) for a dict of columns"
        )
    if not keys:
        return f"found an empty {type(dataset).__name__}; expected one data set with preference pairs"
    return (
        f"found {type(dataset).__name__} with the splits {', '.join(keys)}; expected one data set: choose a split, "
        f"such as dataset[{keys[-1]!r}]"
    )


def _read_path(path: Path) -> tuple[Any, str]:
    """Rows of a file or saved data set (something with ``len`` and integer access), and a description."""
    if path.is_dir():
        rows = _plain_rows(_load_saved(path))
        return rows, f"{path.name} ({len(rows)} rows saved to disk)"
    if not path.exists():
        raise ProbeError(
            f"{path}: no such file or directory; expected {_FILE_KINDS}. A data set of the Hugging Face Hub has to be "
            "loaded first: datasets.load_dataset(name, split=...)"
        )
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    if stem.endswith((".jsonl", ".ndjson")):
        rows = _parse_lines(path, _read_text(path))
    elif stem.endswith(".json"):
        rows = _parse_json(path, _read_text(path))
    elif name.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        raise ProbeError(f"{path}: unknown kind of file; expected {_FILE_KINDS}")
    return rows, f"{path.name} ({len(rows)} records)"


def _load_saved(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds here, some of them bare
        raise ProbeError(f"{path}: cannot be loaded as a saved data set ({error}); expected {_FILE_KINDS}") from error
    if isinstance(saved, Mapping):
        raise ProbeError(f"{path}: {_explain_mapping(saved)}; or pass the path of one split's directory")
    return saved


def _read_parquet(path: Path) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(path) as file:
            # Not Dataset.from_parquet, which would write a copy into the user's cache directory.
            return _plain_rows(Dataset(file.read()))
    except (pa.ArrowException, OSError) as error:
        raise ProbeError(f"{path}: cannot be read as Parquet: {error}") from error


def _read_text(path: Path) -> str:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except _READ_ERRORS as error:
        raise ProbeError(
            f"{path}: cannot be read as {'gzipped ' * (opener is gzip.open)}UTF-8 text: {error}"
        ) from error


def _parse_lines(path: Path, text: str) -> list[dict[str, Any]]:
    records = []
    # Not str.splitlines, which would also break at U+2028 and its like inside a JSON string.
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(value, dict):
            raise ProbeError(f"{path}, line {number}: expected a JSON object, found {shown(value)}")
        records.append(value)
    return records


def _parse_json(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as many tools write them
            return _parse_lines(path, text)
        where = f"line {error.lineno}, column {error.colno}"
        raise ProbeError(f"{path}: not valid JSON: {error.msg} ({where})") from error
    if isinstance(value, dict):
        if "format_version" in value:
            raise ProbeError(f"{path}: this looks like a saved ProbeSet; read it with ProbeSet.load({path.name!r})")
        raise ProbeError(f"{path}: expected a JSON list of records; {_explain_mapping(value)}")
    if not isinstance(value, list):
        raise ProbeError(f"{path}: expected a JSON list of records, found {shown(value)}")
    return value
