"""The records of a run, as many as there are: kept as they were stored, and parsed when they are looked at.

A parsed record takes many times the memory of its line, and most readers look at few: the last ones, or those of a step. What
records are searched by stands in a :class:`Head` each, which is always there.
"""

from __future__ import annotations

import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

from pydantic import ValidationError

from align_audit.record.audit_record import SCHEMA_VERSION, Alert, AuditKind, AuditRecord, Estimate, RecordKey

KEPT_PARSED = 256
"""Records of a run, those looked at last, that stay parsed."""


@dataclass(frozen=True, slots=True)
class Head:
    """What records are searched, ordered and judged by.

    Attributes:
        key: :attr:`AuditRecord.key`.
        accuracy, shift: of the ``margins``.
    """

    step: int
    created: str
    key: RecordKey
    probe_hash: str
    accuracy: Estimate
    shift: Estimate
    alerts: tuple[Alert, ...]

    @classmethod
    def of(cls, record: AuditRecord) -> Self:
        """That of a record."""
        there = record.provenance
        return cls(
            record.step,
            there.created,
            record.key,
            there.probe_hash,
            record.margins.accuracy,
            record.margins.shift,
            tuple(record.alerts),
        )

    @property
    def policy_hash(self) -> str:
        """``provenance.policy_hash``."""
        return self.key[1]

    @property
    def probe_name(self) -> str | None:
        """``provenance.probe_name``."""
        return self.key[3]

    @property
    def kind(self) -> AuditKind:
        """Whether everything was measured, or health only."""
        return self.key[4]


def parse_line(line: bytes) -> AuditRecord | None:
    """A record of this version, read at once; None: the line is another, or none (:meth:`AuditRecord.from_json` says which)."""
    try:
        record = AuditRecord.model_validate_json(line)
    except ValidationError:
        return None
    current = record.schema_version == SCHEMA_VERSION and "schema_version" in record.model_fields_set
    return record if current else None


class _Kept:
    """One record: its line, packed, and the parsed one as long as somebody holds it."""

    __slots__ = ("_parsed", "_where", "head", "packed")

    def __init__(self, record: AuditRecord, line: bytes, where: str | None) -> None:
        self.head = Head.of(record)
        self.packed = zlib.compress(line, 1)
        self._where = where
        self._parsed: weakref.ref[AuditRecord] | None = weakref.ref(record)

    def __getstate__(self) -> tuple[Head, bytes, str | None]:
        return self.head, self.packed, self._where

    def __setstate__(self, state: tuple[Head, bytes, str | None]) -> None:
        self.head, self.packed, self._where = state
        self._parsed = None

    @property
    def line(self) -> bytes:
        return zlib.decompress(self.packed)

    def record(self) -> AuditRecord:
        record = None if self._parsed is None else self._parsed()
        if record is None:
            line = self.line
            record = parse_line(line) or AuditRecord.from_json(line, self._where)
            self._parsed = weakref.ref(record)
        return record


class StoredRecords(Sequence[AuditRecord]):
    """A sequence of records, equal to a list of them; each is parsed when it is looked at.

    Example:
        >>> StoredRecords() == []
        True
    """

    def __init__(self, kept: Iterable[_Kept] = (), recent: deque[AuditRecord] | None = None) -> None:
        self._kept = list(kept)
        self._recent: deque[AuditRecord] = deque(maxlen=KEPT_PARSED) if recent is None else recent
        """Holds the records looked at last; shared with whatever was chosen from these."""

    def append(self, record: AuditRecord, line: bytes, where: str | None = None) -> None:
        """Add a record.

        Args:
            line: what it is read from again.
            where: what error messages say that it was read from.
        """
        self._kept.append(_Kept(record, line, where))
        self._recent.append(record)

    @property
    def heads(self) -> list[Head]:
        """Of each record, in their order."""
        return [kept.head for kept in self._kept]

    @property
    def lines(self) -> list[tuple[Head, bytes]]:
        """Each record's head, and the line it is read from."""
        return [(kept.head, kept.line) for kept in self._kept]

    @property
    def alerts(self) -> list[Alert]:
        """What happened to alerts, of all records in their order: opened, worse, resolved; not that one stays open."""
        return [alert for kept in self._kept for alert in events_of(kept.head.alerts)]

    def where(self, test: Callable[[Head], bool]) -> StoredRecords:
        """Those whose head passes a test, in the same order."""
        return StoredRecords([kept for kept in self._kept if test(kept.head)], self._recent)

    def by_step(self) -> StoredRecords:
        """By step, then by creation."""
        return StoredRecords(sorted(self._kept, key=lambda kept: (kept.head.step, kept.head.created)), self._recent)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> AuditRecord: ...
    @overload
    def __getitem__(self, place: slice) -> StoredRecords: ...
    def __getitem__(self, place: int | slice) -> AuditRecord | StoredRecords:
        """A record, or for a slice a sequence like this one."""
        if isinstance(place, slice):
            return StoredRecords(self._kept[place], self._recent)
        record = self._kept[place].record()
        self._recent.append(record)
        return record

    def __iter__(self) -> Iterator[AuditRecord]:
        for place in range(len(self._kept)):
            yield self[place]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(
            mine is its or mine == its for mine, its in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[AuditRecord]) -> list[AuditRecord]:
        return [*self, *other]

    def __radd__(self, other: Iterable[AuditRecord]) -> list[AuditRecord]:
        return [*other, *self]

    def __repr__(self) -> str:
        steps = [head.step for head in self.heads]
        between = f", steps {min(steps)} to {max(steps)}" if steps else ""
        return f"<{len(self)} records{between}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept, self._recent = state["kept"], deque(maxlen=KEPT_PARSED)


def events_of(alerts: Iterable[Alert]) -> list[Alert]:
    """Those to which something happened: opened, worse or resolved."""
    return [alert for alert in alerts if alert.event != "open"]


def chosen(records: Sequence[AuditRecord], test: Callable[[Head], bool]) -> Sequence[AuditRecord]:
    """The records whose head passes a test, in the same order; stored ones stay as they are."""
    if isinstance(records, StoredRecords):
        return records.where(test)
    return [record for record in records if test(Head.of(record))]


def heads_of(records: Iterable[AuditRecord]) -> list[Head]:
    """The head of each record, in their order."""
    return records.heads if isinstance(records, StoredRecords) else [Head.of(record) for record in records]
