"""The records of a run, as many as there are: kept as they were stored, and parsed when they are looked at.

A parsed record takes many times the memory of its line, and most readers look at few: the last ones, or those of a step. What
records are searched by stands in a :class:`Head` each, which is always there. Lines are validated whole before they come here
(:func:`head_of_line`), so that looking at a record does not fail.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

from pydantic import TypeAdapter, ValidationError

from align_audit.errors import counted
from align_audit.record.alert import Alert
from align_audit.record.audit_record import (
    SCHEMA_VERSION,
    AuditKind,
    AuditRecord,
    Cost,
    Margins,
    Occasion,
    Provenance,
    RecordKey,
    ReferenceCheck,
)
from align_audit.record.estimate import Estimate
from align_audit.record.plain_schema import plain_validator
from align_audit.record.turns import Turns

UNPACKED = 64
"""Records of a run, its first, whose lines stay as they are: most runs have no more, and need no library to pack them."""

EQUAL_MODELS = "policy and reference are equal"

KEPT_PARSED = 256
"""Records of a run, those looked at last, that stay parsed. A loop over more of them than that keeps none."""


@dataclass(frozen=True, slots=True)
class Head:
    """What records are searched, ordered and judged by, and what is drawn of all of them at every audit.

    Attributes:
        key: :attr:`AuditRecord.key`.
        accuracy, shift, kl, chosen_logp_change_per_token, token_accuracy, reference_token_accuracy: of the ``margins``.
        same_weights: of the ``reference_check``.
        seconds, peak_memory: of the ``cost``.
        judged: whether alert rules were asked: False where ``alerts.enabled`` was.
    """

    step: int
    created: str
    key: RecordKey
    probe_hash: str
    accuracy: Estimate
    shift: Estimate
    kl: Estimate
    chosen_logp_change_per_token: Estimate
    token_accuracy: Estimate
    reference_token_accuracy: Estimate
    same_weights: bool
    seconds: float
    peak_memory: int
    occasion: Occasion | None
    alerts: tuple[Alert, ...]
    judged: bool

    @classmethod
    def of(cls, record: AuditRecord) -> Self:
        """That of a record."""
        there, margins = record.provenance, record.margins
        return cls(
            record.step,
            there.created,
            record.key,
            there.probe_hash,
            margins.accuracy,
            margins.shift,
            margins.kl,
            margins.chosen_logp_change_per_token,
            margins.token_accuracy,
            margins.reference_token_accuracy,
            record.reference_check.same_weights,
            record.cost.seconds,
            record.cost.peak_memory,
            record.occasion,
            tuple(record.alerts),
            _judged(there.config),
        )

    @property
    def policy_hash(self) -> str:
        """``provenance.policy_hash``."""
        return self.key[1]

    @property
    def reference_hash(self) -> str:
        """``provenance.reference_hash``."""
        return self.key[2]

    @property
    def probe_name(self) -> str | None:
        """``provenance.probe_name``."""
        return self.key[3]

    @property
    def kind(self) -> AuditKind:
        """Whether everything was measured, or health only."""
        return self.key[4]

    @property
    def reward_accuracy(self) -> Estimate:
        """``accuracy`` as it is shown. Of equal models no margin has grown, which is no accuracy of 0: it is not known."""
        return Estimate.unknown(EQUAL_MODELS) if self.same_weights else self.accuracy


def _judged(config: dict[str, Any]) -> bool:
    """Stored options are whatever the version that wrote them had."""
    alerts = config.get("alerts")
    return not (isinstance(alerts, dict) and alerts.get("enabled") is False)


def parse_line(line: bytes) -> AuditRecord | None:
    """A record of this version, read at once; None: the line is another, or none (:meth:`AuditRecord.from_json` says which)."""
    try:
        record = AuditRecord.model_validate_json(line)
    except ValidationError:
        return None
    current = record.schema_version == SCHEMA_VERSION and "schema_version" in record.model_fields_set
    return record if current else None


def head_of_line(line: bytes) -> Head | None:
    """The head of a record of this version, whose every field is validated, though no record is made of them.

    Returns:
        None: :func:`parse_line` gives none either.
    """
    try:
        values = _fields_of_record().validate_json(line)
    except ValidationError:
        return None
    return Head.of(AuditRecord.model_construct(**values)) if values.get("schema_version") == SCHEMA_VERSION else None


@functools.cache
def _fields_of_record() -> TypeAdapter[dict[str, Any]]:
    # Those that heads are made of stay what they are.
    return plain_validator(AuditRecord, kept=(Provenance, Margins, Occasion, Alert, Cost, ReferenceCheck))


class _Line:
    """A line in memory, packed to a quarter where that is asked for."""

    __slots__ = ("_bytes", "_unpacked_length")

    def __init__(self, line: bytes, packed: bool) -> None:
        self._bytes: bytes = _codec().compress(line, asbytes=True) if packed else line
        self._unpacked_length = len(line) if packed else None

    def __bytes__(self) -> bytes:
        if self._unpacked_length is None:
            return self._bytes
        line: bytes = _codec().decompress(self._bytes, decompressed_size=self._unpacked_length, asbytes=True)
        return line


@functools.cache
def _codec() -> Any:
    # A quarter of the time of zlib, which would take more of it than the validation.
    from pyarrow import Codec  # type: ignore[import-untyped]

    return Codec("zstd", compression_level=1)


class _Kept:
    """One record: its head, its line, and the parsed one as long as somebody holds it."""

    __slots__ = ("_line", "_parsed", "_where", "head")

    def __init__(self, head: Head, line: _Line, where: str | None) -> None:
        self.head, self._line, self._where = head, line, where
        self._parsed: weakref.ref[AuditRecord] | None = None

    def __getstate__(self) -> tuple[Head, _Line, str | None]:
        return self.head, self._line, self._where

    def __setstate__(self, state: tuple[Head, _Line, str | None]) -> None:
        self.head, self._line, self._where = state
        self._parsed = None

    @property
    def line(self) -> bytes:
        return bytes(self._line)

    def hold(self, record: AuditRecord) -> None:
        """What the line says, parsed already."""
        self._parsed = weakref.ref(record)

    def record(self) -> AuditRecord:
        record = None if self._parsed is None else self._parsed()
        if record is None:
            line = self.line
            record = parse_line(line) or AuditRecord.from_json(line, self._where)
            self.hold(record)
        return record


class StoredRecords(Sequence[AuditRecord]):
    """A sequence of records, equal to a list of them; each is parsed when it is looked at.

    Example:
        >>> StoredRecords() == []
        True
    """

    def __init__(
        self, kept: Iterable[_Kept] = (), recent: deque[AuditRecord] | None = None, turns: Turns | None = None
    ) -> None:
        self._kept = list(kept)
        self.turns = Turns() if turns is None else turns
        """Where the run went back; shared with whatever was chosen from these."""
        self._recent: deque[AuditRecord] = deque(maxlen=KEPT_PARSED) if recent is None else recent
        """Holds the records looked at last; shared with whatever was chosen from these."""

    def append(self, record: AuditRecord, line: bytes, where: str | None = None) -> None:
        """Add a record.

        Args:
            line: what it is read from again.
            where: what error messages say that it was read from.
        """
        self.append_line(Head.of(record), line, where)
        self._kept[-1].hold(record)
        self._recent.append(record)

    def append_line(self, head: Head, line: bytes, where: str | None = None) -> None:
        """Add a record that nobody has parsed: :meth:`append` with its head."""
        packed = _Line(line, packed=len(self._kept) >= UNPACKED)
        self._kept.append(_Kept(head, packed, where))

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
        return self._of([kept for kept in self._kept if test(kept.head)])

    def by_step(self) -> StoredRecords:
        """By step, then by creation."""
        return self._of(sorted(self._kept, key=lambda kept: (kept.head.step, kept.head.created)))

    def followed_by(self, record: AuditRecord) -> StoredRecords:
        """These and one more, with none of them parsed for it."""
        longer = self._of(self._kept)
        longer.append(record, record.to_json().encode())
        return longer

    def _of(self, kept: Iterable[_Kept]) -> StoredRecords:
        return StoredRecords(kept, self._recent, self.turns)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> AuditRecord: ...
    @overload
    def __getitem__(self, place: slice) -> StoredRecords: ...
    def __getitem__(self, place: int | slice) -> AuditRecord | StoredRecords:
        """A record, or for a slice a sequence like this one."""
        if isinstance(place, slice):
            return self._of(self._kept[place])
        record = self._kept[place].record()
        self._recent.append(record)
        return record

    def __iter__(self) -> Iterator[AuditRecord]:
        if len(self) <= KEPT_PARSED:
            yield from map(self.__getitem__, range(len(self)))
            return
        # Each would be gone before it is looked at again, and would have driven out another.
        for kept in self._kept:
            yield kept.record()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(
            left is right or left == right for left, right in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[AuditRecord]) -> list[AuditRecord]:
        return [*self, *other]

    def __radd__(self, other: Iterable[AuditRecord]) -> list[AuditRecord]:
        return [*other, *self]

    def __repr__(self) -> str:
        steps = [head.step for head in self.heads]
        between = f", steps {min(steps)} to {max(steps)}" if steps else ""
        return f"<{counted(len(self), 'record')}{between}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self._kept, "turns": self.turns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept, self._recent, self.turns = state["kept"], deque(maxlen=KEPT_PARSED), state["turns"]


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


def turns_of(records: Sequence[AuditRecord]) -> Turns:
    """Where the run of these records went back; of records that were not stored nothing is known."""
    return records.turns if isinstance(records, StoredRecords) else Turns()
