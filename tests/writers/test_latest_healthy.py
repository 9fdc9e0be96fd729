"""The latest healthy audit of a run with several probe sets, of which some come later and some are left out on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditRun
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import Failure
from align_audit.writers.latest_healthy import latest_healthy
from tests.helpers.alert_cases import about, healthy, judged, on_set, with_margins


def audits(name: str, *steps: int, ruined_from: int = 10**6) -> list[AuditRecord]:
    """Audits of one set; from a step on KL is far above its limit."""
    ruin: dict[str, Any] = {"kl": about(3.0)}
    return [
        on_set(healthy(step) if step < ruined_from else with_margins(healthy(step), **ruin), name) for step in steps
    ]


def run_of(*records: list[AuditRecord], failures: tuple[Failure, ...] = ()) -> AuditRun:
    together = sorted((record for each in records for record in each), key=lambda record: record.step)
    return AuditRun(Path("run"), judged(together), [], list(failures))


def broke(step: int, name: str) -> Failure:
    return Failure(step=step, time="2999-01-01T00:00:00+00:00", error="ValueError: bad batch.", probe_name=name)


@pytest.mark.parametrize(
    ("run", "step"),
    [
        (run_of(audits("a", 0, 10, 20), audits("b", 0, 10, 20)), 20),
        (run_of(audits("a", 0, 10, 20, 30, 40, 50), audits("b", 0, 10, 20)), 50),
        (run_of(audits("a", 0, 10, 20, 30), audits("b", 0, 10, 20)), 20),
        (run_of(audits("a", 0, 10, 20, 30, 40, 50), audits("b", 0, 10, 20), failures=(broke(40, "b"),)), 10),
        (run_of(audits("a", 0, 10, 20), audits("b", 30, 40, 50, ruined_from=30)), 20),
        (run_of(audits("a", 0, 10, 20), audits("b", 30, 40, 50)), 50),
        (run_of(audits("a", 0, 10, 20, 30, ruined_from=30), audits("b", 0, 10, 20, 30)), 20),
    ],
    ids=[
        "both",
        "b left out",
        "killed before b",
        "b breaks",
        "b in the place of a, ruined",
        "b in the place of a",
        "a ruined",
    ],
)
def test_a_set_counts_while_it_is_in_use(run: AuditRun, step: int) -> None:
    assert latest_healthy(run, {}).step == step
