"""The full audits of a run, of its checkpoints, as `align-audit run` makes them: each is in the log as soon as it is made."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replication.pairs import Dealt, Row
from replication.plan import FIRST, SECOND, Case, Setup
from replication.training import checkpoint

AUDITS = "audits"
"""The folder of the log, in that of a run."""
SPENT = "audits.json"
"""CPU and wall seconds of each audit, by probe set and step."""


def audit_options(setup: Setup) -> Any:
    """As the defaults say, but for the number of pairs, and for what shows things."""
    from align_audit import AuditConfig

    return AuditConfig.from_dict(
        {
            "max_pairs": setup.pairs, "max_length": setup.max_length, "progress": False, "tensorboard": "off",
            "report": False, "trackers": "off", "strict": True, "examples": {"pairs": 0},
            "patching": {"exact_pairs": setup.exact_pairs}, "spinal": setup.spinal,
            "generations": {"enabled": False},
        }
    )  # fmt: skip


def audits_of(case: Case) -> list[tuple[str, int]]:
    """(slice, step) of the audits of a run, in the order in which they are made: a log in another is that of a resumed run.

    Before the first step the three runs of a seed are one model on the same pairs, which the healthy one's audit shows.
    """
    last = case.setup.audited[-1]
    start = [0] if case.kind == "healthy" else []
    return [*((FIRST, step) for step in [*start, *case.setup.audited[1:]]), (SECOND, last)]


def audit_run(case: Case, model: Path, dealt: Dealt, folder: Path, tell: Callable[[str], None]) -> None:
    """Audit what is not audited yet of a trained run, one audit after the other."""
    from align_audit.monitoring.checkpoints import audit_saved

    spent = read_spent(folder)
    for name, step in audits_of(case):
        key = f"{name} {step}"
        if key in spent:
            continue
        probes = _written(folder / f"{name}.jsonl", dealt.first if name == FIRST else dealt.second)
        began, cpu = time.monotonic(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):  # the table that an audit ends with, once for each
            audit_saved(
                {checkpoint(folder, step): step},
                None if case.setup.method == "lora" else str(model),
                {name: probes},
                audit_options(case.setup),
                folder / AUDITS,
                tell=tell,
            )
        spent[key] = {
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        (folder / SPENT).write_text(json.dumps(spent), encoding="utf-8")
        tell(f"{time.strftime('%H:%M:%S')} {case.setup.name} {case.name}: {key}, {spent[key]['cpu_seconds']:.0f} CPU s")


def read_spent(folder: Path) -> dict[str, dict[str, float]]:
    """What the audits of a run took so far."""
    path = folder / SPENT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _written(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
