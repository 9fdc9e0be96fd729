"""A full audit: every measurement reads every batch, and what it asks for is patched, walked and looked at again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_audit.auditing.examples import texts_of
from align_audit.auditing.measurements.attribution import Attribution
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.controls import Controls
from align_audit.auditing.measurements.generations import Generations
from align_audit.auditing.measurements.localization import Localization
from align_audit.auditing.measurements.low_rank import LowRank
from align_audit.auditing.measurements.measurement import AuditTask, Measurement
from align_audit.auditing.measurements.patching import Patching
from align_audit.auditing.measurements.sites import FinerSites
from align_audit.auditing.measurements.spinal import Spinal
from align_audit.auditing.passes import expected_batches, first_pass, second_pass
from align_audit.auditing.previous import PreviousAudit
from align_audit.auditing.progress import ticker
from align_audit.auditing.provenance import agreed_record, arrays_of
from align_audit.auditing.request import AuditResult

MEASUREMENTS: list[type[Measurement]] = [
    Behaviour, Attribution, Patching, Localization, LowRank, Controls, FinerSites, Spinal, Generations,
]  # fmt: skip
"""What it measures. Each may ask for those before it."""


def full_of(task: AuditTask, began: float, progress: Callable[[int, str], Any] | None) -> AuditResult:
    """The audit of a session that measures everything.

    Args:
        began: ``time.perf_counter()`` when the audit began.
        progress: makes a progress bar of so many batches.
    """
    task.begin(MEASUREMENTS)
    tick = ticker(progress, expected_batches(task))
    first_pass(task, tick)
    for measurement in task:
        measurement.look_closer(tick)
    looks = [look for measurement in task for look in measurement.second_looks()]
    second_pass(task.session, looks, tick)
    record = agreed_record(task, began)
    left = PreviousAudit(task[LowRank].spanned, record.attribution)
    return AuditResult(record, arrays_of(task), left, texts_of(task))
