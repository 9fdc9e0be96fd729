"""The course that a run is on: a run that was resumed from an earlier step leaves records of the one it took before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from align_audit.record.audit_record import AuditRecord
from align_audit.record.stored_records import Head, StoredRecords, chosen, heads_of, turns_of
from align_audit.record.turns import Turns


def course_of(record: AuditRecord, earlier: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The earlier records that this one goes on from, by step.

    A run that was resumed from an earlier step left records of the course that it took before: made earlier, of later steps.
    Of audits of one step, set and kind the newest counts. Stored records also say where the run went back, to which step
    (:mod:`align_audit.record.turns`).
    """
    turns, heads = turns_of(earlier), heads_of(earlier)
    if turns.is_left(record.key):  # what was made since the run went back is of another course
        turns = turns.until_left(record.key)
        heads = [head for head in heads if head.created <= record.provenance.created]
    return _course_until(record.step, record.provenance.policy_hash, earlier, _on_course(heads, turns), turns)


def _on_course(heads: Sequence[Head], turns: Turns) -> list[Head]:
    return [head for head in heads if not turns.is_left(head.key)]


def _course_until(
    now: int, policy: str, records: Sequence[AuditRecord], heads: Sequence[Head], turns: Turns
) -> Sequence[AuditRecord]:
    """Those of the records with these heads that an audit of these weights at this step goes on from. None is parsed for it."""
    # Other weights at this very step are of another course, too.
    heads = [head for head in heads if head.step < now or (head.step == now and head.policy_hash == policy)]

    def made(head: Head) -> str:
        return turns.made(head.key, head.created)

    least = math.inf
    kept: dict[tuple[int, str | None, str], Head] = {}
    for _, at_once in groupby(sorted(heads, key=made, reverse=True), key=made):
        together = list(at_once)
        for head in sorted(together, key=lambda head: head.key[1:3]):
            if head.step <= least:
                kept.setdefault((head.step, head.probe_name, head.kind), head)
        least = min(least, *(head.step for head in together))
    names = {(head.key, head.created) for head in kept.values()}
    course = chosen(records, lambda head: (head.key, head.created) in names)
    if isinstance(course, StoredRecords):
        return course.by_step()
    return sorted(course, key=_place)


def _place(record: AuditRecord) -> tuple[int, str, str, str]:
    """The order of a course, whatever the order of the probe sets of a step."""
    there = record.provenance
    return record.step, there.created, there.probe_name or "", record.kind


def present_course(records: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The records of the course that a run is on now, by step: that of the audit made last, or come by, since it went back."""
    turns = turns_of(records)
    heads = _on_course(heads_of(records), turns)
    if not heads:
        return records[:0]
    newest = max(heads, key=lambda head: (turns.made(head.key, head.created), head.step))
    return _course_until(newest.step, newest.policy_hash, records, heads, turns)
