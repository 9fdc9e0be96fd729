"""What two runs beside each other say, as one plain value: the sentences and tables of ``align-audit compare``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_audit.errors import RecordError
from align_audit.record.compare import Side, by_probes, compare
from align_audit.record.run import AuditRun
from align_audit.record.run_sums import Intervals
from align_audit.writers.comparison import meeting_tables, sentence
from align_audit.writers.web.json_values import text

NAMES = ("A", "B")


def comparison_data(runs: Sequence[AuditRun], intervals: Intervals) -> dict[str, Any]:
    """What comparing two runs says, all of it text.

    Returns:
        ``reason`` why they cannot be compared (None: they can), and ``sets``, one for each probe set that both were audited
        on, with ``name`` (of the first run's), ``sentence``, ``tables`` (``heading``, ``head``, ``rows``, ``notes``) and
        ``notes``.
    """
    try:
        pairs = by_probes(runs, NAMES)
        compared = {
            name: compare([Side(*side) for side in zip(NAMES, pair, strict=True)], intervals)
            for name, pair in pairs.items()
        }
    except RecordError as error:
        return {"reason": text(error), "sets": []}
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
            "notes": [text(words) for words in each.notes],
        }
        for name, each in compared.items()
    ]
    return {"reason": None, "sets": sets}
