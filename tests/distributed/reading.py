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


def assert_found_alone(folder: Path, case: str, skipped: tuple[str, ...] = ()) -> None:
    """The last record of a case is what one process finds in the gathered weights (``alone.json``)."""
    here = lines(folder, case, "records.jsonl")[-1]
    alone = json.loads((folder / case / "alone.json").read_text())
    # Sums of token rows are added up in another order.
    tolerance = {"low_rank.": 1e-9, "controls.random_subspace.": 1e-9}
    assert differing(here, alone, (*MADE_ELSEWHERE, *skipped), tolerance) == []
    assert here["patching"]["effect"][1]["mean"] not in (0.0, None)


def assert_a_layer_at_a_time(ranks: list[dict[str, Any]]) -> None:
    """On every process, beside what is outside of the layers, one layer of each model was whole."""
    for said in ranks:
        assert len(said["held"]) >= 3
        for held in said["held"]:
            assert held["gathers"] > 3
            assert held["most"] == held["outside"] + max(held["layers"])
            assert len(held["layers"]) == 3
