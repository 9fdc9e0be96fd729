"""Words that several pictures share: titles, warnings about failed controls, and which records are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from align_audit.record.audit_record import AuditRecord
from align_audit.writers import one_per_step


def to_draw(records: Sequence[AuditRecord]) -> list[AuditRecord]:
    """One record a step.

    Raises:
        ValueError: there are none.
    """
    found = one_per_step(records)
    if not found:
        raise ValueError("no records to draw; expected at least one audit")
    return found


def titled(title: str, record: AuditRecord) -> str:
    """The title, with the name of the probe set where it has one."""
    name = record.provenance.probe_name
    return title if name is None else f"Probes {name!r}. {title}"


def failed_controls(records: Sequence[AuditRecord], names: Sequence[str]) -> list[str]:
    """One warning per failed control: what it takes the ground from is not evidence."""
    warnings = []
    for name in names:
        failed = [record for record in records if getattr(record.controls, name).verdict == "failed"]
        if not failed:
            continue
        title = name.replace("_", " ")
        # Unstable halves cast doubt on which layer is the peak, not on the layers' values.
        doubt = "Peak layer is not evidence" if name == "split_half" else "Not evidence"
        if len(records) == 1:
            warnings.append(f"{doubt}: {title} control failed ({getattr(failed[0].controls, name).reason})")
        else:
            steps = [record.step for record in failed]
            where = (
                f"steps {', '.join(map(str, steps))}"
                if 1 < len(steps) <= 6
                else f"step {steps[0]}"
                if len(steps) == 1
                else f"{len(steps)} of {len(records)} audits, steps {steps[0]} to {steps[-1]}"
            )
            warnings.append(f"{doubt} at {where}: {title} control failed")
    return warnings
