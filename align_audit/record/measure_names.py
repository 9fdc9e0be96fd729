"""What the numbers of a record may be called, from its schema alone: a name is checked before anything is measured."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from align_audit.errors import ConfigurationError, quoted
from align_audit.options.rules import did_you_mean
from align_audit.record.audit_record import AuditRecord, Estimate
from align_audit.record.figures import BY_NAME as FIGURE_NAMES
from align_audit.record.numbers import Number, by_path, fields_of, why_unknown
from align_audit.record.schema import Part

ANY = "N"
"""In a name: a place in a sequence, a layer, or another key."""

_ENDS = ("mean", "low", "high")


@functools.cache
def measure_names() -> tuple[str, ...]:
    """Dotted names of all numbers of a record, in the order of its fields; ``N`` stands for places, layers and keys.

    Example:
        >>> [name for name in measure_names() if name.startswith("patching.eff")]
        ['patching.effect.N', 'patching.effect_p_adjusted.N']
    """
    return tuple(dict.fromkeys(_names_in(AuditRecord, "")))


def check_measure(name: str) -> None:
    """Refuse a name that no number of any record has, and no curve; ``mean``, ``low`` and ``high`` of an estimate have names.

    Raises:
        ConfigurationError: it is none; the message names the nearest.

    Example:
        >>> check_measure("spinal.coherence"), check_measure("patching.effect.3.low")
        (None, None)
    """
    bare = _split(name)[0]
    if bare in FIGURE_NAMES or any(_matches(bare.split("."), pattern.split(".")) for pattern in measure_names()):
        return
    near = did_you_mean(re.sub(r"(?<=\.)\d+(?=\.|$)", ANY, bare), [*FIGURE_NAMES, *measure_names()])
    raise ConfigurationError(
        f"no record has a measure called {quoted(name)}{near}; expected {', '.join(FIGURE_NAMES)}, or the path of "
        "a number as the columns of AuditRun.to_pandas() name it, such as margins.shift.low"
    )


def measure(record: AuditRecord, name: str) -> tuple[float | None, str | None]:
    """The number of a record under a name, and why it is not known where it is None or NaN."""
    bare, end = _split(name)
    number = FIGURE_NAMES[bare].read(record) if bare in FIGURE_NAMES else by_path(record).get(bare)
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


def _matches(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) == len(pattern) and all(
        part == expected or (expected == ANY and part != "") for part, expected in zip(parts, pattern, strict=True)
    )


def _names_in(kind: type[Part], path: str) -> Iterator[str]:
    for name, annotation in fields_of(kind):
        yield from _names_of(annotation, f"{path}.{name}" if path else name)


def _names_of(annotation: Any, path: str) -> Iterator[str]:
    """Of what a field may hold."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in (bool, int, float) or annotation is Estimate:
        yield path
    elif isinstance(annotation, type) and issubclass(annotation, Part):
        yield from _names_in(annotation, path)
    elif origin is list:
        yield from _names_of(inside[0], f"{path}.{ANY}")
    elif origin is dict:
        yield from _names_of(inside[1], f"{path}.{ANY}")
    else:  # what may be one of several, or is annotated
        for each in inside:
            if not isinstance(each, str):
                yield from _names_of(each, path)
