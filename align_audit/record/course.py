"""The course that a run is on: a run that was resumed from an earlier step leaves records of the one it took before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from align_audit.record.audit_record import AuditRecord
from align_audit.record.stored_records import Head, StoredRecords, chosen, heads_of


def course_of(record: AuditRecord, earlier: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The earlier records that this one goes on from, by step.

    A run that was resumed from an earlier step left records of the course that it took before: made earlier, of later steps.
    Of audits of one step, set and kind the newest counts.
    """
    return _course_until(record.step, record.provenance.policy_hash, earlier)


def _course_until(now: int, policy: str, earlier: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The records that an audit of these weights at this step goes on from. No stored one is parsed for it."""
    # Other weights at this very step are of another course, too.
    heads = [head for head in heads_of(earlier) if head.step < now or (head.step == now and head.policy_hash == policy)]
    least = math.inf
    kept: dict[tuple[int, str | None, str], Head] = {}
    for _, made in groupby(sorted(heads, key=lambda head: head.created, reverse=True), key=lambda head: head.created):
        together = list(made)
        for head in sorted(together, key=lambda head: head.key[1:3]):
            if head.step <= least:
                kept.setdefault((head.step, head.probe_name, head.kind), head)
        least = min(least, *(head.step for head in together))
    names = {(head.key, head.created) for head in kept.values()}
    course = chosen(earlier, lambda head: (head.key, head.created) in names)
    if isinstance(course, StoredRecords):
        return course.by_step()
    return sorted(course, key=_place)


def _place(record: AuditRecord) -> tuple[int, str, str, str]:
    """The order of a course, whatever the order of the probe sets of a step."""
    there = record.provenance
    return record.step, there.created, there.probe_name or "", record.kind


def present_course(records: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The records of the course that a run is on now, by step: that of the audit made last."""
    heads = heads_of(records)
    if not heads:
        return records
    newest = max(heads, key=lambda head: (head.created, head.step))
    return _course_until(newest.step, newest.policy_hash, records)
