"""The two pictures that tell how a run stands, for whatever shows pictures beside curves.

``align_audit health/over_steps`` and ``align_audit where/by_layer``, with the name of the probe set between, as the curves of
:mod:`align_audit.writers.few_scalars` have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord
from align_audit.record.course import course_of
from align_audit.record.stored_records import Head, chosen, heads_of
from align_audit.writers.few_scalars import HEALTH, WHERE, group_of
from align_audit.writers.standing import Standing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn_records(record: AuditRecord, history: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The audits before one that a picture at it shows beside it: those of its probe set and course, up to its step.

    Later audits may be in the log when an earlier step is written again, and so are those of a course that was left when the
    run was resumed; a picture at a step shows none of them.

    Args:
        history: audits of the run, of all probe sets, in any order, with this one or without.
    """
    name = record.provenance.probe_name
    return chosen(course_of(record, history), lambda head: head.key != record.key and head.probe_name == name)


def few_pictures(standing: Standing, earlier: Sequence[AuditRecord]) -> dict[str, Figure]:
    """Tag → picture, 640 × 420 pixels; that of layers only where something is known of them.

    Of the audits before they show what their heads hold: none is parsed.

    Args:
        earlier: those of :func:`drawn_records`, of the audit of ``standing``.
    """
    from align_audit.writers.plots.at_a_glance import drawable, health_at_a_glance, where_at_a_glance

    record = standing.record
    name = record.provenance.probe_name
    heads = sorted([*heads_of(earlier), Head.of(record)], key=lambda head: (head.step, head.created))
    newest = list({head.step: head for head in heads}.values())
    figures = {f"{group_of(HEALTH, name)}/over_steps": health_at_a_glance(newest, standing)}
    if drawable(record):
        figures[f"{group_of(WHERE, name)}/by_layer"] = where_at_a_glance(record)
    return figures
