"""What the numbers of a record may be called, from its schema alone: a name is checked before anything is measured."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from align_audit.errors import ConfigurationError, quoted
from align_audit.options.rules import did_you_mean
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.figures import BY_NAME as FIGURES
from align_audit.record.numbers import Number, by_path, fields_of, why_unknown
from align_audit.record.schema import Part

ANY = "N"
"""In a name: a place in a sequence, a layer, or another key."""

_ENDS = ("mean", "low", "high")
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]*")
_Path = tuple[tuple[str, ...] | None, ...]
_KEYS = {"low_rank": ("activation", "shift")}
"""Of fields with keys that are words: which words. Keys of others are layers."""


@dataclass(frozen=True)
class _Measure:
    """A number of a record, or one of many under the same fields.

    Attributes:
        parts: of its path, each the words that may stand there; None: a whole number.
        estimated: whether it has an interval.
    """

    parts: _Path
    estimated: bool

    @property
    def name(self) -> str:
        """Dotted, with ``N`` for what may be one of several."""
        return ".".join(words[0] if words is not None and len(words) == 1 else ANY for words in self.parts)

    def may_be(self, path: str, end: bool) -> bool:
        """Whether a record may have a number at this path, of which an ``end`` is asked or not."""
        parts = path.split(".")
        return (
            (self.estimated or not end)
            and len(parts) == len(self.parts)
            and all(
                _WHOLE_NUMBER.fullmatch(part) is not None if words is None else part in words
                for part, words in zip(parts, self.parts, strict=True)
            )
        )


@functools.cache
def measure_names() -> tuple[str, ...]:
    """Dotted names of all numbers of a record, in the order of its fields; ``N`` stands for places, layers and keys.

    Example:
        >>> [name for name in measure_names() if name.startswith("patching.eff")]
        ['patching.effect.N', 'patching.effect_p_adjusted.N']
    """
    return tuple(dict.fromkeys(measure.name for measure in _measures()))


@functools.cache
def _measures() -> tuple[_Measure, ...]:
    return tuple(_measures_in(AuditRecord, ()))


def check_measure(name: str) -> None:
    """Refuse a name that no number of any record has, and no curve; ``mean``, ``low`` and ``high`` of an estimate have names.

    Raises:
        ConfigurationError: it is none; the message names the nearest.

    Example:
        >>> check_measure("spinal.coherence"), check_measure("patching.effect.3.low")
        (None, None)
    """
    if is_measure(name):
        return
    bare, end = _split(name)
    if bare != name and is_measure(bare):
        raise ConfigurationError(
            f"no record has a measure called {quoted(name)}: {quoted(bare)} is a number without an interval, and has no "
            f"{end}; expected {quoted(bare)}"
        )
    near = did_you_mean(re.sub(r"(?<=\.)\d+(?=\.|$)", ANY, bare), [*FIGURES, *measure_names()])
    raise ConfigurationError(
        f"no record has a measure called {quoted(name)}{near}; expected {', '.join(FIGURES)}, or the path of "
        "a number as the columns of AuditRun.to_pandas() name it, such as margins.shift.low"
    )


def is_measure(name: str) -> bool:
    """Whether a record may have a number under this name: a curve, the path of a number, or of its interval an end."""
    bare = _split(name)[0]
    if bare in FIGURES:
        return bare == name or FIGURES[bare].estimated
    return any(each.may_be(bare, bare != name) for each in _measures())


def measure(record: AuditRecord, name: str) -> tuple[float | None, str | None]:
    """The number of a record under a name, and why it is not known where it is None or NaN."""
    bare, end = _split(name)
    number = FIGURES[bare].read(record) if bare in FIGURES else by_path(record).get(bare)
    if number is None:
        return None, why_unknown(record, bare)
    value = _end_of(number, end)
    return (None if value is None else float(value)), number.reason


def _end_of(number: Number, end: str) -> bool | float | None:
    return number.value if end == "mean" else number.low if end == "low" else number.high


def _split(name: str) -> tuple[str, str]:
    """Without the end of an estimate's interval that it names, and that end; ``mean`` where it names none."""
    bare, _, end = name.rpartition(".")
    return (bare, end) if bare and end in _ENDS else (name, "mean")


def _measures_in(kind: type[Part], path: _Path) -> Iterator[_Measure]:
    for name, annotation in fields_of(kind):
        yield from _measures_of(annotation, (*path, (name,)))


def _measures_of(annotation: Any, path: _Path) -> Iterator[_Measure]:
    """Of what a field may hold."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in (bool, int, float) or annotation is Estimate:
        yield _Measure(path, annotation is Estimate)
    elif isinstance(annotation, type) and issubclass(annotation, Part):
        yield from _measures_in(annotation, path)
    elif origin is list:
        yield from _measures_of(inside[0], (*path, None))
    elif origin is dict:
        yield from _measures_of(inside[1], (*path, None if inside[0] is int else _KEYS[".".join(map(_word, path))]))
    else:  # what may be one of several, or is annotated
        for each in inside:
            if not isinstance(each, str):
                yield from _measures_of(each, path)


def _word(words: tuple[str, ...] | None) -> str:
    return ANY if words is None else words[0]
