"""Which of the checkpoints in a folder are of the course that a run is on: folders say their step, and not whose they are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from align_audit.record.audit_record import AuditRecord
from align_audit.record.checkpoint_names import checkpoints_in
from align_audit.record.log import RECORDS
from align_audit.record.stored_records import Head, heads_of, parse_line, turns_of

_CLOCKS_APART = 10.0
"""Seconds by which the clocks of this machine and of a file server may differ."""
_STATE = "trainer_state.json"
"""Is written once, with the checkpoint that it lies in."""


def checkpoints_of_course(folder: Path, course: Sequence[AuditRecord]) -> dict[int, str]:
    """Step → name of the checkpoints in a folder that are of a course: those that exist now, as the trainer deletes old ones
    (``save_total_limit``), and were not left there by a course of before. None where the folder cannot be read.

    One that is deleted while this looks at it is none.

    Args:
        course: its records; stored ones say where the run went back.
    """
    back = [(step, _seconds(time)) for step, time in turns_of(course).went_back]
    # An audit in training of an earlier step that was made later: training has come there again since.
    back += [(head.step, _seconds(head.created)) for head in heads_of(course) if head.occasion is not None]

    kept: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for step, name in checkpoints_in(folder).items():
            written = _written(folder / name)
            if written is not None and not any(at < step and written + _CLOCKS_APART < when for at, when in back):
                kept[step] = name
    return kept


def _written(checkpoint: Path) -> float | None:
    """When it was written, in seconds since 1970; None: it is not there (any more)."""
    for place in (checkpoint / _STATE, checkpoint):
        with contextlib.suppress(OSError):
            return place.stat().st_mtime
    return None


def _seconds(created: str) -> float:
    """A time in seconds since 1970."""
    try:
        return datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError, OSError):  # of a log that was made elsewhere
        return -math.inf


def saved_before_the_next(aside: Path, folder: Path, checkpoints: dict[int, str]) -> dict[int, str]:
    """Those of a run's checkpoints that the run which began in its place did not write: it saves under the same names.

    Args:
        aside: the log of the run, ``previous-<n>``.
        folder: that holds the checkpoints.
    """
    number = aside.name.removeprefix("previous-")
    later = aside.with_name(f"previous-{int(number) + 1}") if number.isdecimal() else aside
    following = (later if later.is_dir() else aside.parent) / RECORDS
    began = _began(following)
    if began is None:
        return checkpoints
    times = {step: _written(folder / name) for step, name in checkpoints.items()}
    return {step: checkpoints[step] for step, written in times.items() if written is not None and written < began}


def _began(records: Path) -> float | None:
    """When the first audit of a log was made; None: there is none, or it does not say."""
    try:
        with records.open("rb") as file:
            record = parse_line(file.readline())
    except OSError:
        return None
    return None if record is None else _seconds(Head.of(record).created)
