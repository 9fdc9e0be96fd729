"""Runs beside each other as one plain value: what ``align-audit compare`` says of them, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from align_audit.errors import RecordError
from align_audit.record.compare import Side, by_probes, compare
from align_audit.record.run import AuditRun
from align_audit.record.run_sums import Intervals
from align_audit.writers.comparison import closing_notes, letters, meeting_tables, sentence
from align_audit.writers.web.json_values import text
from align_audit.writers.web.page_data import page_data


def comparison_page_data(
    runs: Sequence[AuditRun], names: Sequence[str], intervals: Intervals, written: str | None = None
) -> dict[str, Any]:
    """All that a page of a comparison shows.

    Args:
        runs: at least two.
        names: what they are called, one for each.
        written: when the page was made, ISO 8601; None: now.

    Returns:
        ``written``; ``sides``, of each run its ``name`` and its ``data``, as much of its page's as is shown; and ``said``,
        what comparing them says: :func:`comparison_data`.
    """
    written = datetime.now(UTC).isoformat(timespec="seconds") if written is None else written
    return {
        "written": written,
        "sides": [
            {"name": text(name, 200), "data": {"sets": [_shown(each) for each in page_data(run, texts=False)["sets"]]}}
            for name, run in zip(names, runs, strict=True)
        ],
        "said": comparison_data(runs, intervals),
    }


def _shown(of_set: dict[str, Any]) -> dict[str, Any]:
    """Of a probe set's part of a page what stands in a comparison."""
    return {name: of_set[name] for name in ("name", "status", "confidence", "panels", "where")}


def comparison_data(runs: Sequence[AuditRun], intervals: Intervals) -> dict[str, Any]:
    """What comparing runs says, all of it text.

    Returns:
        ``names``, the :func:`letters` that the runs are called by; ``reason`` why they cannot be compared (None: they can), and
        ``sets``, one for each probe set that all were audited on, with ``name`` (of the first run's), ``sentence``, ``tables``
        (``heading``, ``head``, ``rows``, ``notes``) and ``notes``.
    """
    names = letters(len(runs))
    try:
        compared = {
            name: compare([Side(*side) for side in zip(names, of_set, strict=True)], intervals)
            for name, of_set in by_probes(runs, names).items()
        }
    except RecordError as error:
        return {"names": names, "reason": text(error), "sets": []}
    sets = [
        {
            "name": None if name is None else text(name, 200),
            "sentence": text(sentence(each)),
            "tables": [
                {
                    "heading": text(table.heading),
                    "head": [text(words) for words in table.head],
                    "rows": [[text(words) for words in row] for row in table.rows],
                    "notes": [text(words) for words in table.notes],
                }
                for table in meeting_tables(each)
            ],
            "notes": [text(words) for words in closing_notes(each)],
        }
        for name, each in compared.items()
    ]
    return {"names": names, "reason": None, "sets": sets}
