"""What a run has left on disk, and how two records differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines(folder: Path, case: str, name: str) -> list[dict[str, Any]]:
    path = folder / case / "run" / "align_audit" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, item in items:
        yield from leaves(item, f"{path}.{name}" if path else str(name))


def differing(
    one: dict[str, Any], other: dict[str, Any], skipped: tuple[str, ...], tolerance: dict[str, float] | None = None
) -> list[str]:
    """Paths at which two records hold something else; NaN equals NaN.

    Args:
        tolerance: how far numbers may lie apart under paths that begin so, as a share of them.
    """
    first, second = dict(leaves(one)), dict(leaves(other))

    def differ(path: str) -> bool:
        a, b = first.get(path, "absent"), second.get(path, "absent")
        if isinstance(a, float) and isinstance(b, float):
            near = next((share for name, share in (tolerance or {}).items() if path.startswith(name)), 0.0)
            return not (math.isclose(a, b, rel_tol=near, abs_tol=near) or (math.isnan(a) and math.isnan(b)))
        return bool(a != b)

    paths = sorted(first.keys() | second.keys())
    return [path for path in paths if not path.startswith(skipped) and "principal_angles" not in path and differ(path)]


MADE_ELSEWHERE = (
    "provenance.created", "cost.", "reasons.cost.", "reference_check.", "alerts", "finding", "occasion",
)  # fmt: skip
"""What another program says of itself, and what is made of the record before."""
