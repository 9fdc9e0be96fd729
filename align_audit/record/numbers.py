"""The numbers of a record, one after the other, each with its path, unit, interval and the reason where it is not known.

:func:`walk` goes through a record once, by its schema alone: a part that the schema gains is in it at once. TensorBoard's
curves, what is listed as not known, the tables of a run and the terminal's rows are views of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic.fields import FieldInfo

from align_audit.record.audit_record import AuditRecord, Control
from align_audit.record.estimate import Estimate
from align_audit.record.schema import Part
from align_audit.record.site_curve import SiteUnit
from align_audit.record.units import Along, In, Labels, Unit

NO_REASON = "the record gives no reason"

_NO_NUMBERS = frozenset({"alerts", "reasons", "reason", "config", "versions", "pairs_dropped"})
"""Fields with keys of their own, reasons, which stand with their numbers, and alerts, which repeat numbers of the record."""

_SAME_REASON = {
    "contraction_r2": "contraction", "contraction_stderr": "contraction", "transport_stderr": "transport",
}  # fmt: skip
"""Of fields that are NaN together, the one with which the reason stands."""


@dataclass(frozen=True, slots=True)
class Number:
    """One number of a record."""

    path: str
    """Dotted, through the record's fields, as its ``reasons`` use it: ``patching.effect.3``,
    ``low_rank.shift.4.effect_fraction.2``. Of a sequence the place in it comes last."""
    unit: Unit
    value: bool | float | None
    """As the record has it, of an estimate its mean. Not known: NaN, or None (which may also stand for "none")."""
    low: float | None = None
    high: float | None = None
    """The ends of an estimate's interval; None for a number that has none."""
    reason: str | None = None
    """Why the value or its interval is not known; None also where the record does not say."""
    layer: int | None = None
    """Of which layer it speaks, where that is one."""
    index: int | None = None
    """Of a number in a sequence: of which layer, rank or unit, or only which place it has."""
    index_kind: Along | None = None

    @property
    def series(self) -> str:
        """The path of the sequence that it belongs to; its own where it is alone."""
        return self.path if self.index is None else self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Word:
    """What a record says in a word, between its numbers: a verdict, a device, the hash of a model."""

    path: str
    value: str | None


def decimals(value: float) -> str:
    """A number in a sentence: with two decimals, or of so small a one two digits, so that it does not read as nothing.

    Example:
        >>> decimals(1.234), decimals(-0.0041), decimals(0.0)
        ('1.23', '-0.0041', '0.00')
    """
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def numbers(record: AuditRecord) -> Iterator[Number]:
    """Every number of the record, in the order of its fields.

    Not among them: what says along what others run (ranks, units of a curve), alerts, settings, and counts of dropped pairs.

    Example:
        >>> {number.path: number.unit for number in numbers(record)}["margins.kl"]     # doctest: +SKIP
        'nats per token'
    """
    return (item for item in walk(record) if isinstance(item, Number))


def by_path(record: AuditRecord) -> dict[str, Number]:
    """Every number of the record under its path."""
    return {number.path: number for number in numbers(record)}


def by_series(record: AuditRecord) -> dict[str, list[Number]]:
    """Every number of the record under the path of its sequence; one that stands alone is a sequence of one."""
    series: dict[str, list[Number]] = {}
    for number in numbers(record):
        series.setdefault(number.series, []).append(number)
    return series


def walk(record: AuditRecord, sequences: bool = True) -> Iterator[Number | Word]:
    """Every number and every word of the record, in the order of its fields: see :func:`numbers`.

    Args:
        sequences: also those numbers that have an ``index``; most are of this kind.
    """
    return _Walk(record, sequences).part(record, _Place())


# --- the walk ---------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where the walk stands, and what was said on the way about what lies there."""

    path: str = ""
    unit: Unit = ""
    along: Along = "place"
    layer: int | None = None
    labels: Mapping[Along, Sequence[Any]] = MappingProxyType({})
    """What the sequences of this part run along."""

    def into(self, name: object) -> _Place:
        _, unit, along, layer, labels = self
        return _Place(f"{self.path}.{name}" if self.path else str(name), unit, along, layer, labels)

    def said(self, marker: In | None) -> _Place:
        """With what a field says of itself; the rest is what the part around it says."""
        if marker is None:
            return self
        path, unit, along, layer, labels = self
        unit, along = unit if marker.unit is None else marker.unit, along if marker.along is None else marker.along
        return _Place(path, unit, along, layer, labels)


@dataclass(frozen=True)
class _Field:
    """What the walk needs to know of a field of a part."""

    name: str
    info: FieldInfo
    marker: In | None


@functools.cache
def _fields(kind: type[Part]) -> tuple[list[_Field], dict[Along, str]]:
    """The fields that the walk goes into, and those that say along what others run."""
    info = kind.model_fields
    labels = {marker.along: name for name in info if (marker := _marker(info[name], Labels))}
    passed = _NO_NUMBERS | set(labels.values())
    return [_Field(name, info[name], _marker(info[name], In)) for name in info if name not in passed], labels


def fields_of(kind: type[Part]) -> list[tuple[str, Any]]:
    """The fields of a part that :func:`walk` goes into, with what each may hold; without ``extra``, which has no schema."""
    return [(field.name, field.info.annotation) for field in _fields(kind)[0] if field.name != "extra"]


@dataclass(frozen=True)
class _Walk:
    record: AuditRecord
    sequences: bool

    def part(self, part: Part, place: _Place) -> Iterator[Number | Word]:
        fields, labels = _fields(type(part))
        place = place._replace(labels={along: getattr(part, name) for along, name in labels.items()})
        # A control always says why, in its own words.
        why = part.reason if isinstance(part, Control) else None
        for field in fields:
            value, inner = getattr(part, field.name), place.into(field.name).said(field.marker)
            if value is None:
                yield from self.nothing(field.info, inner, why)
            elif field.name == "extra":
                # Its parts stand under their own names, as in the reasons.
                yield from self.value(_parsed(value), place)
            else:
                yield from self.value(value, inner, why)

    def nothing(self, info: FieldInfo, place: _Place, why: str | None) -> Iterator[Number | Word]:
        """A field that is None: a number or a word that there is not. An absent part or sequence holds nothing."""
        may_be = set(get_args(info.annotation))
        if str in may_be:
            yield Word(place.path, None)
        elif may_be & {bool, int, float}:
            yield self.number(None, place, why)

    def value(self, value: Any, place: _Place, why: str | None = None) -> Iterator[Number | Word]:
        """What lies at a place; ``why``: the reason of what is not known there, where the record gives none."""
        if isinstance(value, Estimate):
            yield self.estimate(value, place)
        elif isinstance(value, Part):
            yield from self.part(value, place)
        elif isinstance(value, dict):
            for key, item in value.items():
                # Keys that are numbers are layers.
                inner = place.into(key)
                yield from self.value(item, inner._replace(layer=key) if isinstance(key, int) else inner)
        elif isinstance(value, list):
            yield from self.sequence(value, place)
        elif isinstance(value, str):
            yield Word(place.path, value)
        elif value is not None:
            yield self.number(value, place, why)

    def sequence(self, values: Sequence[Any], place: _Place) -> Iterator[Number | Word]:
        labels = place.labels.get(place.along)
        if labels is None:
            labels = self.ranks(len(values)) if place.along == "rank" else range(len(values))
        for at, (label, value) in enumerate(zip(labels, values, strict=True)):
            if not isinstance(value, _IN_A_SEQUENCE):
                yield from self.value(value, place.into(at))
            elif self.sequences:
                of_layer = place.along == "layer"
                layer = label if of_layer else label.layer if isinstance(label, SiteUnit) else place.layer
                index = at if isinstance(label, SiteUnit) else label
                inner = _Place(f"{place.path}.{at}", place.unit, place.along, layer, place.labels)
                if isinstance(value, Estimate):
                    yield self.estimate(value, inner, index)
                else:
                    yield self.number(value, inner, index=index)

    def number(
        self, value: bool | float | None, place: _Place, why: str | None = None, index: int | None = None
    ) -> Number:
        reason = (_reason(self.record, place.path) or why) if is_unknown(value) else None
        kind = None if index is None else place.along
        return Number(place.path, place.unit, value, None, None, reason, place.layer, index, kind)

    def estimate(self, value: Estimate, place: _Place, index: int | None = None) -> Number:
        missing = math.isnan(value.mean) or math.isnan(value.low) or math.isnan(value.high)
        reason = value.reason or (_reason(self.record, place.path) if missing else None)
        kind = None if index is None else place.along
        return Number(place.path, place.unit, value.mean, value.low, value.high, reason, place.layer, index, kind)

    def ranks(self, count: int) -> Sequence[int]:
        """The ranks that the random-subspace control ran along: those of the curves, which share them."""
        curves = (curve for by_layer in self.record.low_rank.values() for curve in by_layer.values())
        return next((curve.ranks for curve in curves if len(curve.ranks) == count), range(1, count + 1))


_Marker = TypeVar("_Marker", In, Labels)


def _marker(info: FieldInfo, kind: type[_Marker]) -> _Marker | None:
    return next((marker for marker in info.metadata if isinstance(marker, kind)), None)


_IN_A_SEQUENCE = (Estimate, int, float)
"""What a sequence of numbers holds; anything else in it has a place of its own."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def json_number(value: float) -> float | str:
    """A number as JSON can hold it: one that is not finite as a word.

    Example:
        >>> json_number(0.5), json_number(-math.inf)
        (0.5, '-Infinity')
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parsed(value: Any) -> Any:
    """What plain JSON stands for, where no schema says it: estimates, and numbers that JSON does not know."""
    if isinstance(value, dict):
        if {"mean", "low", "high"} <= value.keys():
            return Estimate.model_validate(value)
        return {key: _parsed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


# --- what is not known ------------------------------------------------------------------------------------------------


def why_unknown(record: AuditRecord, path: str, value: Estimate | float | None = None) -> str:
    """Why the number at a dotted path is NaN or None: its own reason, or that of the nearest part that has one.

    Example:
        ``why_unknown(record, "spinal.policy.contraction.3")`` looks for that path in ``record.reasons``, then for
        ``spinal.policy.contraction``, ``spinal.policy`` and ``spinal``.
    """
    if isinstance(value, Estimate) and value.reason:
        return value.reason
    return _reason(record, path) or NO_REASON


def _reason(record: AuditRecord, path: str) -> str | None:
    parts = [_SAME_REASON.get(part, part) for part in path.split(".")]
    nearest = (record.reasons.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
    return next((reason for reason in nearest if reason), None)


def is_unknown(value: Estimate | float | int | None) -> bool:
    """Is this number one that could not be known?"""
    if isinstance(value, Estimate):
        value = value.mean
    return value is None or math.isnan(value)


def span(indices: Sequence[int], most: int = 6) -> str:
    """Integers in words, runs contracted: ``0–3, 7``; a long list is cut short."""
    if not indices:
        return "none"
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs]
    if len(words) > most:
        words = [*words[: most - 1], "…", words[-1]]
    return ", ".join(words)
