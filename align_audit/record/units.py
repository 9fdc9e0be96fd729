"""What stands beside the type of a record's field: the unit of its numbers, and along what a sequence of them runs.

The schema says it where the field is, so that :func:`align_audit.record.numbers.numbers` needs no list of its own: a part
that is added to a record appears wherever numbers are shown.

Example:
    >>> from typing import Annotated
    >>> from align_audit.record.audit_record import Estimate
    >>> effect: Annotated[list[Estimate], In("nats", along="layer")]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal[
    "", "nats", "nats per token", "share", "probability", "radians", "seconds", "bytes", "forwards",
    "count", "layer", "rank", "unit", "steps", "tokens",
]  # fmt: skip
"""Empty: of no unit (a slope, R², a score, a version). ``layer``, ``rank`` and ``unit`` say which one."""

Along = Literal["layer", "rank", "unit", "place"]
"""``unit``: the units of a curve of finer sites. ``place``: nothing with a name (the members of a set, draws, angles)."""


@dataclass(frozen=True)
class In:
    """Of a field, and of every field of the part in it that does not say so itself."""

    unit: Unit | None = None
    along: Along | None = None


@dataclass(frozen=True)
class Labels:
    """Of a field that holds no numbers of its own: it says what the sequences beside it run along."""

    along: Along
