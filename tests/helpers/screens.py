"""A run that goes well, one that is ruined, and a terminal to look at them on."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from align_audit.alerts.advice import advise
from align_audit.record.audit_record import AuditRecord
from align_audit.record.checkpoint_names import by_step
from align_audit.record.training_log import LogRow
from align_audit.writers.terminal import Terminal
from tests.helpers.alert_cases import about, health, healthy, judged, with_margins, with_part
from tests.helpers.make_record import make_record

BETA = 0.1
LOG = [
    LogRow(5, {"rewards/margins": 0.3, "learning_rate": 3e-3}),
    LogRow(20, {"rewards/margins": 4.9, "learning_rate": 3e-3}),
]
"""The trainer's, of the ruined run."""


def calm(step: int, **parts: Any) -> AuditRecord:
    """An audit of a healthy run, of which every figure is a round one."""
    margins = {
        "chosen_logp_change_per_token": about(0.01),
        "kl": about(0.04),
        "token_accuracy": about(0.82),
        "reference_token_accuracy": about(0.82),
        "accuracy": about(0.9),
        "shift": about(5.0),
    }
    record = with_margins(make_record(0, progress=0.0) if step == 0 else healthy(step, **parts), **margins)
    return with_part(record, "provenance", beta=BETA, created=f"2026-01-01T00:{step:02}:00+00:00")


def ruined(step: int) -> AuditRecord:
    """An audit of a policy that no longer writes."""
    margins = {"chosen_logp_change_per_token": about(-5.4), "kl": about(9.4), "token_accuracy": about(0.4)}
    return with_margins(calm(step), shift=about(79.0), **margins)


def a_run(ends: str = "ruined", checkpoints: Sequence[str] = ()) -> list[AuditRecord]:
    """Audits at 0, 5, 10, 20 and 40; ``ends``: ``well``, ``ruined`` from step 20 on, or ``resolved`` at 40 and 60."""
    last = {
        "well": [calm(20), calm(40)],
        "ruined": [ruined(20), ruined(40)],
        # With as much of a margin as before: another alert is of that.
        "resolved": [ruined(20), *(with_margins(calm(step), shift=about(79.0)) for step in (40, 59))],
    }
    records = judged([calm(0), calm(5), calm(10), *last[ends]])
    return [
        record.model_copy(
            update={
                "alerts": advise(
                    record.alerts,
                    records[:place],
                    LOG,
                    checkpoints=by_step(checkpoints),
                    output_dir="runs/dpo",
                    beta=BETA,
                )
            }
        )
        for place, record in enumerate(records)
    ]


def later_on(records: Sequence[AuditRecord], steps: int = 100) -> list[AuditRecord]:
    """The same audits so many steps and an hour later."""
    return [
        with_part(record, "provenance", created=record.provenance.created.replace("T00:", "T01:")).model_copy(
            update={"step": record.step + steps}
        )
        for record in records
    ]


def quick_look(record: AuditRecord) -> AuditRecord:
    """The health audit that comes before a full one at the same step: a little earlier."""
    return with_part(health(record), "provenance", created=record.provenance.created.replace(":00+", ":00.5+"))


def screen(
    records: Iterable[AuditRecord], width: int = 80, tty: bool = False, log: Sequence[LogRow] = LOG, **options: Any
) -> str:
    """What the terminal shows of a run, audit after audit."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=options.pop("encoding", "utf-8"))
    colours = options.pop("color_system", "standard" if tty else None)
    console = Console(file=file, width=width, force_terminal=tty, color_system=colours, highlight=False)
    terminal = Terminal(console, training_log=lambda: log, **options)
    told: list[AuditRecord] = []
    for record in records:
        told.append(record)
        terminal.record(record, told)
        for alert in record.alerts:
            terminal.alert(alert, record)
    terminal.close()
    file.flush()
    return raw.getvalue().decode(file.encoding)
