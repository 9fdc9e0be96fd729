"""The newest records of a log, read from its end: how a run stands now needs no more of it, however long it is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_audit.errors import RecordError, first_line, plain
from align_audit.record.audit_record import AuditRecord
from align_audit.record.lines import parsed
from align_audit.record.status import unread_end
from align_audit.record.stored_records import StoredRecords, head_of_line, parse_line
from align_audit.record.turns import COURSE, Turn, Turns

_BLOCK = 1 << 20
"""Bytes that are read at a time."""
_MOST = 64
"""Lines that are looked at, at most: a run of health audits alone has no full one to come to."""
_STEPS = 4
"""So many steps tell an interval, where records do not say when the next audit is due."""


@dataclass(frozen=True)
class Newest:
    """What the end of a log says.

    Attributes:
        records: by the order of their lines, without those of a course that the run has left.
        unread: what of the lines after the last of them cannot be read, in a sentence (see
            :func:`~align_audit.record.status.unread_end`); None: nothing.
    """

    records: Sequence[AuditRecord] = ()
    unread: str | None = None


def read_newest(path: Path, names: Collection[str | None] = ()) -> Newest:
    """Read the end of a ``records.jsonl``: all of the last step, a step before it, and back to a full audit.

    A last line without an end is being written, and is left out. An absent file has no records.

    Args:
        names: probe sets of which the last audit is wanted too, as of those with audits that broke.

    Raises:
        OSError: it is there and cannot be read.
    """
    turns = Turns(parsed(lines_from_end(path.with_name(COURSE)), Turn)[::-1])
    records: list[AuditRecord] = []
    lines: list[bytes] = []
    at_end, reason, looked, left = 0, None, 0, False
    for line in lines_from_end(path):
        if looked == _MOST or _enough(records, names):
            break
        try:
            record = parse_line(line) or AuditRecord.from_json(line, f"a line of {plain(path)}")
        except RecordError as error:
            at_end += not (records or left)
            reason = reason or first_line(error)
        else:
            if turns.is_left(record.key):
                left = True
                continue
            records.append(record)
            lines.append(line)
        looked += 1
    stored = StoredRecords(turns=turns)
    for record, line in zip(reversed(records), reversed(lines), strict=True):
        stored.append(record, line)
    return Newest(stored, unread_end(at_end, reason))


def unread_after(path: Path) -> str | None:
    """What comes after the last record of a ``records.jsonl`` that can be read: see :class:`Newest`.

    Raises:
        OSError: it is there and cannot be read.
    """
    at_end, reason = 0, None
    for line in lines_from_end(path):
        try:
            if head_of_line(line) is None:
                AuditRecord.from_json(line, f"a line of {plain(path)}")
            break
        except RecordError as error:
            at_end += 1
            reason = reason or first_line(error)
    return unread_end(at_end, reason)


def _enough(records: Sequence[AuditRecord], names: Collection[str | None]) -> bool:
    """Of records from the last one back."""
    steps = {record.step for record in records}
    planned = bool(records) and records[0].occasion is not None
    return (
        len(steps) >= (2 if planned else _STEPS)
        and any(record.kind == "full" for record in records)
        and set(names) <= {None, *(record.provenance.probe_name for record in records)}
    )


def lines_from_end(path: Path) -> Iterator[bytes]:
    """The whole lines of a file that are not blank, the last one first; none of an absent file.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        place = os.fstat(file.fileno()).st_size
        # Behind the last newline stands what is being written.
        pieces, ended = [b""], False
        while place > 0:
            size = min(_BLOCK, place)
            place -= size
            file.seek(place)
            first, *rest = file.read(size).split(b"\n")
            for piece in reversed(rest):
                line = piece + b"".join(reversed(pieces))
                pieces = []
                if ended and line.strip():
                    yield line
                ended = True
            pieces.append(first)
        line = b"".join(reversed(pieces))
        if ended and line.strip():
            yield line
