"""A run as one plain value: all that a page of it shows, and no HTML. The report, the tab and comparisons draw the same.

Curves are plain series (``steps`` with ``mean``, ``low``, ``high``), not figures of a chart library: one series serves a chart,
its table for readers of screens, and a row in a terminal; a theme, a narrow screen or a slider redraws it without asking for
it again; and it takes half of a figure's room. Text is text: the front end sets it with ``textContent``, and none of it
reaches a chart, whose library reads tags in labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from align_audit.record.course import present_course
from align_audit.record.finding import confidence_in_words
from align_audit.record.run import AuditRun
from align_audit.record.status import WORST_FIRST, Status
from align_audit.record.stored_records import chosen, heads_of
from align_audit.writers.latest_healthy import latest_healthy
from align_audit.writers.standing import audit_of_each_step, heads_of_each_step
from align_audit.writers.web.folded_data import (
    continuations_data,
    cost_data,
    failures_data,
    provenance_data,
    transfer_data,
    unknown_data,
)
from align_audit.writers.web.health_panels import health_panels, training_curves
from align_audit.writers.web.json_values import text
from align_audit.writers.web.standing_data import alert_rows, first_error, standing_now, status_data
from align_audit.writers.web.texts_data import texts_data
from align_audit.writers.web.where_data import evidence_data, low_rank_data, spinal_data, where_data

FORMAT = 1
"""Version of the shape of this value; a front end refuses one that it does not know."""


def page_data(
    run: AuditRun, written: str | None = None, *, texts: bool = True, checkpoints: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """All that a page shows of a run. Numbers that are not known, or not finite, are None.

    Args:
        run: of all probe sets, or of one.
        written: when the page was made, ISO 8601; None: now.
        texts: with what changed in text: pairs of the data.
        checkpoints: step → name, of those that exist; None: those in the run's folder.

    Returns:
        ``format``; ``run`` (``name``, ``written``, ``status``, that of all sets together, ``latest_healthy``
        in words, empty where there is no audit, and ``failures``); ``sets``, one for
        each probe set, the worst first, and last those that the run goes on without, with
        ``name``, ``confidence`` (of intervals, in words), ``status``, ``panels``,
        ``training``, ``first_error``, ``alerts``, ``texts``, ``where``, ``evidence`` and ``more``. A run without any audit has
        one set, whose status says so.

    Example:
        >>> page_data(AuditRun.load("runs/dpo"))["run"]["status"]["word"]                    # doctest: +SKIP
        'HEALTHY'
    """
    names = [run.probe_name] if run.probe_name is not None or not run.records else run.probe_names
    runs = {name: run.select(name) if run.records else run for name in names}
    # What the run goes on without says least of it, however it stood.
    names.sort(key=lambda name: (not runs[name].in_use, WORST_FIRST.index(runs[name].status.word)))
    sets = [_set_data(runs[name], name, texts) for name in names]
    return {
        "format": FORMAT,
        "run": {
            "name": text(_name_of(run), 200),
            "written": datetime.now(UTC).isoformat(timespec="seconds") if written is None else written,
            "status": _word(run.status),
            "latest_healthy": text(latest_healthy(run, checkpoints)) if run.records else "",
            "failures": failures_data(run),
        },
        "sets": sets,
    }


def _name_of(run: AuditRun) -> str:
    """What a person calls the run: the folder that it was trained into."""
    name = run.output_dir.name or str(run.output_dir)
    return f"{name} ({run.directory.name})" if run.is_set_aside else name


def _word(status: Status) -> dict[str, Any]:
    return {"word": status.word, "since": status.since, "reason": text(status.reason), "blind": text(status.blind)}


def _set_data(run: AuditRun, name: str | None, texts: bool) -> dict[str, Any]:
    """What a page shows of one probe set."""
    course = present_course(run.records)
    # One course: what a run left when it was resumed is not shown beside what came of it.
    run = replace(run, records=course)
    full = audit_of_each_step(chosen(course, lambda head: head.kind == "full"))
    standing, heads = standing_now(run, course), heads_of(course)
    patched = [record for record in full if record.patching is not None]
    with_curves = [record for record in full if record.low_rank]
    each_step = heads_of_each_step(course)
    last = (
        None
        if standing is None
        else audit_of_each_step(chosen(course, lambda head: head.step == each_step[-1].step))[-1]
    )
    return {
        "name": None if name is None else text(name, 200),
        "confidence": "95 %" if last is None else confidence_in_words(last),
        "status": status_data(run, standing),
        "panels": [] if last is None else health_panels(each_step, last),
        "training": training_curves(run.training_log),
        "first_error": first_error(heads),
        "alerts": alert_rows(heads, standing) if heads else [],
        "texts": texts_data(run, course) if texts else None,
        "where": where_data(patched),
        "evidence": evidence_data(patched),
        "more": {
            "low_rank": low_rank_data(with_curves[-1] if with_curves else None),
            "spinal": spinal_data(full),
            "transfer": transfer_data(run),
            "continuations": continuations_data(last),
            "cost": cost_data(heads),
            "provenance": provenance_data(full[-1] if full else last, run),
            "unknown": unknown_data(full[-1] if full else last),
        },
    }
