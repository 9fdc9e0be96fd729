"""Logs of one JSON object a line, read and repaired: what cannot be read is said once, and never in the way of the rest."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from align_audit.errors import RecordError, first_line, plain
from align_audit.record.audit_record import SCHEMA_VERSION, AuditRecord
from align_audit.record.stored_records import Head, StoredRecords, head_of_line

_Line = TypeVar("_Line", bound=BaseModel)

_NAMED = 20
"""Unreadable lines that a warning names."""


def read_records(path: Path) -> StoredRecords:
    """The records of a log in the order of its lines; what cannot be read is left out, with a warning.

    Every field of every line is validated now, so that no record proves invalid when it is looked at; records are made of
    the lines only then.

    Raises:
        RecordError: the file cannot be read, or holds records of a newer align_audit.
    """
    records, invalid, place = StoredRecords(), [], plain(path)
    for number, line, content in _objects(path, head_of_line):
        where = f"line {number} of {place}"
        if isinstance(content, Head):
            records.append_line(content, line, where)
            continue
        try:
            records.append(AuditRecord.from_values(content, where), line, where)
        except RecordError as error:
            version = content.get("schema_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise
            # The first of its problems is enough.
            invalid.append((number, " ".join(str(error).replace(where, "it").splitlines()[:3])))
    if invalid:
        _warn_skipped(path, [number for number, _ in invalid], invalid[0][1])
    return records


def read_lines(path: Path, kind: type[_Line]) -> list[_Line]:
    """The alerts or failures of a file in the order of its lines, as :func:`read_records` reads records."""
    lines, invalid = [], []
    for number, _, values in _objects(path):
        try:
            lines.append(kind.model_validate(values))
        except Exception:  # whatever a foreign line makes of the validation: it is skipped, and said
            invalid.append(number)
    if invalid:
        _warn_skipped(path, invalid, f"no {kind.__name__}")
    return lines


def parsed(lines: Iterable[bytes], kind: type[_Line]) -> list[_Line]:
    """What lines say, in their order, as :func:`read_lines` reads those of a file; one that cannot be read is left out."""
    values = []
    for line in lines:
        with contextlib.suppress(ValidationError):
            values.append(kind.model_validate_json(line))
    return values


def repair(path: Path) -> None:
    """Make a log end with a whole line: what a kill left behind it goes to ``<name>.torn-<n>``."""
    if not path.exists():
        return
    data = path.read_bytes()
    length = _length_of_lines(data)
    if length < len(data):
        number = 1
        while (aside := path.with_name(f"{path.name}.torn-{number}")).exists():
            number += 1
        # First the copy, then the cut: a kill between the two costs nothing but a second copy.
        with aside.open("xb") as file:
            file.write(data[length:])
            file.flush()
            os.fsync(file.fileno())
        os.truncate(path, length)
        warnings.warn(
            f"{plain(path)} ended in the middle of a line (the process that wrote it was stopped); its last "
            f"{len(data) - length} bytes were moved to {aside.name}, and the log goes on after its last whole line",
            stacklevel=4,
        )
    elif data and not data.endswith(b"\n"):
        # Only the newline is missing: the line itself is whole and stays.
        with path.open("ab") as file:
            file.write(b"\n")


def _length_of_lines(data: bytes) -> int:
    """Length of a log up to the end of its last whole line: less than all of it where that line is torn."""
    start = data.rfind(b"\n", 0, len(data.rstrip())) + 1
    line = data[start:].strip()
    return start if line and _object(line) is None else len(data)


def _object(line: bytes) -> dict[str, Any] | None:
    # A proper prefix of a JSON object is never one itself: whatever parses is whole.
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, an integer of too many digits, or too deep
        return None
    return value if isinstance(value, dict) else None


def _objects(
    path: Path, quickly: Callable[[bytes], Head | None] = lambda line: None
) -> Iterator[tuple[int, bytes, Head | dict[str, Any]]]:
    """Numbered lines of a log that are JSON objects, and what they hold; the rest is skipped with one warning.

    An absent log is an empty one.

    Args:
        quickly: reads a line at once where it can, and spares it the longer way.
    """
    unreadable: list[int] = []
    last_is_torn = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                values = quickly(line) or _object(line)
                last_is_torn = values is None
                if values is None:
                    unreadable.append(number)
                else:
                    yield number, line, values
                if not line.endswith(b"\n"):
                    break  # what is written behind it from here on is the rest of this line, and no line
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecordError(f"cannot read {plain(path)}: {first_line(error)}") from None
    if last_is_torn:
        unreadable.pop()
    if unreadable:
        _warn_skipped(path, unreadable, "not JSON")
    if last_is_torn:
        warnings.warn(
            f"{plain(path)} ends in the middle of a line (being written, or its writer was stopped); that line is left "
            "out",
            stacklevel=4,
        )


def _warn_skipped(path: Path, numbers: Sequence[int], why: str) -> None:
    where = f"line {numbers[0]}" if len(numbers) == 1 else f"lines {', '.join(map(str, numbers[:_NAMED]))}"
    if len(numbers) > _NAMED:
        where += f" and {len(numbers) - _NAMED} more"
    warnings.warn(f"{where} of {plain(path)} cannot be read and is skipped (it stays in the file): {why}", stacklevel=5)
