"""Where probe pairs come from: data sets, streams, lists and files, read as plain records in a seeded order.

Nothing here knows about tokens; :mod:`align_audit.probes.tokens` does.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from align_audit.errors import SHOWN, ProbeError, counted, first_line, listed, plain, quoted

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

MAX_UNZIPPED = 2 * 2**30
"""Bytes that a .gz file may unzip to: a thousandfold of a small file is possible, and would fill the memory."""
MAX_LINE = 64 * 2**20
"""Characters of one record: far above any preference pair, and far below what fills the memory."""


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
        return _map_style(dataset, f"list of {counted(len(dataset), 'record')}", seed)

    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset):
        return _map_style(_plain_rows(dataset), f"dataset of {counted(len(dataset), 'row')}", seed)
    if isinstance(dataset, IterableDataset):
        return _stream(_plain_rows(dataset), "stream", STREAM_BUFFER_FACTOR * max_pairs, seed)
    raise ProbeError(
        f"cannot draw probe pairs from {type(dataset).__name__}; expected a datasets.Dataset or IterableDataset, "
        f"a list of dicts, or the path of a file ({_FILE_KINDS})"
    )


def _map_style(rows: Sequence[Any], description: str, seed: int) -> Source:
    if len(rows) == 0:
        raise ProbeError(f"{description}: no records; expected at least one preference pair")

    def walk() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
            yield index, _row(rows, index, description)

    return Source(description, _row(rows, 0, description), walk())


def _stream(rows: Iterable[Any], description: str, buffer_size: int, seed: int) -> Source:
    iterator = _read(rows)
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


def _read(rows: Iterable[Any]) -> Iterator[Any]:
    """What a stream yields, one after the other.

    Raises:
        ProbeError: it breaks: a file that is damaged further on, a network, a user's generator or transform.
    """
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except Exception as error:
        raise ProbeError(f"the stream breaks after {counted(count, 'record')}: {first_line(error)}") from error


def _as_record(value: Any, index: int) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ProbeError(f"record {index}: expected a dict with the columns {ACCEPTED_COLUMNS}; found {shown(value)}")
    return value


def _row(rows: Sequence[Any], index: int, description: str) -> Mapping[str, Any]:
    try:
        value = rows[index]
    except Exception as error:  # a damaged file that is read only now, or a user's transform
        raise ProbeError(f"{description}: record {index} cannot be read: {first_line(error)}") from error
    return _as_record(value, index)


def shown(value: Any) -> str:
    """A value in an error message: its type, and the beginning of it."""
    return f"{type(value).__name__} {quoted(value, 60)}"


def _plain_rows(dataset: Any) -> Any:
    """The same rows as Python values, without columns that are never read (to decode audio, say, is slow, or fails).

    Raises:
        ProbeError: there are rows, and not the columns of pairs.
    """
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        return dataset  # a user's transform: its output is what the trainer sees
    # The new object also keeps the caller's own free of the iteration state that datasets stores in a stream.
    plain_rows, names = dataset.with_format(None), dataset.column_names
    if not names:  # of an empty data set, or of a stream that does not know them yet
        return plain_rows
    check_columns(names)
    return plain_rows.select_columns([name for name in _USED_COLUMNS if name in names])


def check_columns(columns: Iterable[str]) -> None:
    """Refuse data without the columns of preference pairs.

    Raises:
        ProbeError: one is not there; the message names those that are.
    """
    names = set(columns)
    if not ({"chosen", "rejected"} <= names or names.issuperset(PREPARED_COLUMNS)):
        raise ProbeError(
            f"found the columns {listed(columns) or '(none)'}; expected one of these sets: "
            f"{ACCEPTED_COLUMNS}. Rename the columns, or choose another data set"
        )


def _explain_mapping(dataset: Mapping[Any, Any]) -> str:
    keys = [plain(key, 60) for key in dataset]
    if "chosen" in keys or "chosen_ids" in keys:
        return (
            f"found a single dict with the keys {listed(keys)}; expected one record per pair: pass a list of such "
            "dicts, or datasets.Dataset.from_dict(...) for a dict of columns"
        )
    if not keys:
        return f"found an empty {type(dataset).__name__}; expected one data set with preference pairs"
    return (
        f"found {type(dataset).__name__} with the splits {listed(keys)}; expected one data set: choose a split, "
        f"such as dataset[{quoted(list(dataset)[-1], 60)}]"
    )


def _read_path(path: Path) -> tuple[Any, str]:
    """Rows of a file or saved data set (something with ``len`` and integer access), and a description."""
    # The description goes into records: a name that is no valid text must not keep them from being written.
    where, called = plain(path), plain(path.name, SHOWN)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise ProbeError(f"{plain(path, SHOWN)}: no path of a file: {first_line(error)}") from None
    if is_folder:
        rows = _plain_rows(_load_saved(path))
        return rows, f"{called} ({counted(len(rows), 'row')} saved to disk)"
    if not exists:
        raise ProbeError(
            f"{where}: no such file or directory; expected {_FILE_KINDS}. A data set of the Hugging Face Hub has to be "
            "loaded first: datasets.load_dataset(name, split=...)"
        )
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    if stem.endswith((".jsonl", ".ndjson")):
        with text_of(path, is_zipped=name != stem) as text:
            rows = _parse_lines(where, text)
    elif stem.endswith(".json"):
        with text_of(path, is_zipped=name != stem) as text:
            rows = _parse_json(where, text.read())
    elif name.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        raise ProbeError(f"{where}: unknown kind of file; expected {_FILE_KINDS}")
    return rows, f"{called} ({counted(len(rows), 'record')})"


def _load_saved(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds here, some of them bare
        raise ProbeError(
            f"{plain(path)}: cannot be loaded as a saved data set ({first_line(error)}); expected {_FILE_KINDS}"
        ) from error
    if isinstance(saved, Mapping):
        raise ProbeError(f"{plain(path)}: {_explain_mapping(saved)}; or pass the path of one split's directory")
    return saved


def _read_parquet(path: Path) -> Any:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(path) as file:
            # Not Dataset.from_parquet, which would write a copy into the user's cache directory.
            rows = Dataset(file.read())
        return _plain_rows(rows)
    except ProbeError as error:
        raise ProbeError(f"{plain(path)}: {error}") from None
    except Exception as error:  # pyarrow and datasets raise many kinds on damaged files
        raise ProbeError(f"{plain(path)}: cannot be read as Parquet: {first_line(error)}") from error


class _Bounded(io.RawIOBase):
    """The unzipped bytes of a file, up to :data:`MAX_UNZIPPED`."""

    def __init__(self, file: gzip.GzipFile, where: str) -> None:
        self._file, self._where, self._left = file, where, MAX_UNZIPPED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ProbeError(
                f"{self._where}: unzips to more than {MAX_UNZIPPED / 2**30:.3g} GiB; unzip it, or pass a part of it or a "
                "Parquet file"
            )
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def text_of(path: Path, *, is_zipped: bool) -> Iterator[TextIO]:
    """A text file, opened, unzipped as it is read; whatever is wrong with its bytes is a ProbeError."""
    try:
        with path.open("rb") as file:
            binary: Any = io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), plain(path))) if is_zipped else file
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as text:
                yield text
    except ProbeError:
        raise
    except Exception as error:  # damaged in one of many ways
        raise ProbeError(
            f"{plain(path)}: cannot be read as {'gzipped ' * is_zipped}UTF-8 text: {first_line(error)}"
        ) from error


def _parse_lines(where: str, text: TextIO) -> list[dict[str, Any]]:
    records = []
    # Not str.splitlines, which would also break at U+2028 and its like inside a JSON string.
    for number, line in enumerate(iter(partial(text.readline, MAX_LINE + 1), ""), start=1):
        if len(line) > MAX_LINE:
            raise ProbeError(f"{where}, line {number}: longer than {MAX_LINE} characters; expected one record a line")
        if not line.strip():
            continue
        try:
            value = _parse(f"{where}, line {number}", line)
        except json.JSONDecodeError as error:
            raise ProbeError(f"{where}, line {number}: not valid JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(value, dict):
            raise ProbeError(f"{where}, line {number}: expected a JSON object, found {shown(value)}")
        records.append(value)
    return records


def _parse_json(where: str, text: str) -> list[dict[str, Any]]:
    try:
        value = _parse(where, text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as many tools write them
            return _parse_lines(where, io.StringIO(text))
        place = f"line {error.lineno}, column {error.colno}"
        raise ProbeError(f"{where}: not valid JSON: {error.msg} ({place})") from error
    if isinstance(value, dict):
        if "format_version" in value:
            raise ProbeError(f"{where}: this looks like a saved ProbeSet; read it with ProbeSet.load(path)")
        raise ProbeError(f"{where}: expected a JSON list of records; {_explain_mapping(value)}")
    if not isinstance(value, list):
        raise ProbeError(f"{where}: expected a JSON list of records, found {shown(value)}")
    return value


def _parse(where: str, text: str) -> Any:
    """A JSON value; a syntax error is left to the caller, who knows the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of too many digits, or too deep
        raise ProbeError(f"{where}: not JSON that can be read: {first_line(error)}") from error
