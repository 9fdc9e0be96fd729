"""Cost against layers, pairs, length and ranks, with the exponent of each: hooks and align_audit side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine import flops
from engine.bench import Bench
from engine.job import RANKS, JobSpec, make_job

BASE = JobSpec(layers=12, width=256, vocab=8192, pairs=4, max_tokens=128)
AXES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "layers": ("layers", [{"layers": count} for count in (12, 24, 36)]),
    "pairs": ("layers", [{"pairs": count} for count in (4, 8, 16)]),
    "length": ("layers", [{"max_tokens": count} for count in (64, 128, 256)]),
    "ranks": ("ranks", [{"ranks": RANKS[:count], "layers": 6} for count in (1, 2, 5)]),
}
"""Per axis: the sweep, and what each point changes in ``BASE``. Lengths are of random tokens, so that they scale."""


def scaling(bench: Bench, repeats: int, dtype: str) -> dict[str, Any]:
    """Measure every axis; print a table an axis with the fitted exponents."""
    report = {}
    for axis, (sweep, points) in AXES.items():
        print(f"\n{axis} ({sweep} sweep; {BASE.layers} layers of {BASE.width} where not said otherwise)")
        base = replace(BASE, dtype=dtype, device=bench.device)
        print(
            f"{axis:>8}{f'hooks {base.clock} s':>13}{f'ours {base.clock} s':>12}{'ratio':>7}{'floor':>7}{'difference':>12}"
        )
        rows = [_point(bench, axis, sweep, replace(base, **point), repeats) for point in points]
        exponents = {}
        for name in ("hooks", "align_audit", "floor_flops"):
            exponents[name] = exponent([row["size"] for row in rows], [row[name] for row in rows])
        print("exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in exponents.items()))
        report[axis] = {"rows": rows, "exponents": exponents}
    return {"scaling": report}


def _point(bench: Bench, axis: str, sweep: str, spec: JobSpec, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        job = make_job(spec, with_bases=sweep == "ranks", random_tokens=axis == "length")
        bench.store(job, Path(place))
        timings = bench.measure(Path(place), [("hooks", sweep), ("align_audit", sweep)], repeats)
    for timing in timings.values():
        if timing.problem is not None:
            raise SystemExit(f"{timing.contender}: {timing.problem}")
    hooks, ours = timings["hooks", sweep], timings["align_audit", sweep]
    sizes = {"layers": spec.layers, "pairs": spec.pairs, "length": spec.max_tokens, "ranks": len(spec.ranks)}
    runs = len(spec.ranks) if sweep == "ranks" else 1
    shape = flops.Shape.of(spec)
    as_run, floor = flops.hooks_sweep(shape, job.pairs, runs), flops.floor_sweep(shape, job.pairs, runs)
    assert hooks.effects is not None and ours.effects is not None
    row = {
        "size": sizes[axis],
        "hooks": median(hooks.seconds),
        "align_audit": median(ours.seconds),
        "ratio": median(hooks.seconds) / median(ours.seconds),
        "floor_ratio": as_run.total / floor.total,
        "floor_flops": floor.total,
        "max_difference": float(np.abs(hooks.effects - ours.effects).max()),
        "clock": spec.clock,
        "hooks_seconds": hooks.seconds,
        "align_audit_seconds": ours.seconds,
    }
    print(
        f"{row['size']:>8}{row['hooks']:>13.2f}{row['align_audit']:>12.2f}{row['ratio']:>7.2f}"
        f"{row['floor_ratio']:>7.2f}{row['max_difference']:>12.1e}",
        flush=True,
    )
    return row


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of cost = a · size^b, by least squares of the logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
