"""A health audit: what both models say of the pairs and how they go on by themselves; nothing is patched.

From a run's second one on it costs about one forward of the policy over the probe pairs, and what the policy takes to write
its continuations and the reference to read them: what else it needs of the reference is kept
(:mod:`align_audit.auditing.session.kept`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_audit.auditing.examples import texts_of
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.generations import Generations
from align_audit.auditing.measurements.measurement import AuditTask, Measurement
from align_audit.auditing.passes import health_pass
from align_audit.auditing.progress import ticker
from align_audit.auditing.provenance import agreed_record, arrays_of
from align_audit.auditing.request import AuditResult

HEALTH: list[type[Measurement]] = [Behaviour, Generations]
"""What it measures."""


def health_of(task: AuditTask, began: float, progress: Callable[[int, str], Any] | None) -> AuditResult:
    """The audit of a session that measures health only. It hands on what the audit before it left.

    Args:
        began: ``time.perf_counter()`` when the audit began.
        progress: makes a progress bar of so many batches.
    """
    task.begin(HEALTH)
    health_pass(task, ticker(progress, len(task.session.plan)))
    for measurement in task:
        measurement.look_closer(lambda: None)
    return AuditResult(agreed_record(task, began), arrays_of(task), task.request.previous, texts_of(task))
