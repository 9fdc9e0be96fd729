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

    Args:
        course: its records; stored ones say where the run went back.
    """
    back = [(step, _seconds(time)) for step, time in turns_of(course).went_back]
    # An audit in training of an earlier step that was made later: training has come there again since.
    back += [(head.step, _seconds(head.created)) for head in heads_of(course) if head.occasion is not None]

    def is_left(step: int, name: str) -> bool:
        written = _written(folder / name) + _CLOCKS_APART
        return any(at < step and written < when for at, when in back)

    try:
        return {step: name for step, name in checkpoints_in(folder).items() if not is_left(step, name)}
    except OSError:
        return {}


def _written(checkpoint: Path) -> float:
    """When it was written, in seconds since 1970."""
    state = checkpoint / _STATE
    return (state if state.exists() else checkpoint).stat().st_mtime


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
    with contextlib.suppress(OSError):
        began = _began(following)
        return {step: name for step, name in checkpoints.items() if began is None or _written(folder / name) < began}
    return {}


def _began(records: Path) -> float | None:
    """When the first audit of a log was made; None: there is none, or it does not say."""
    try:
        with records.open("rb") as file:
            record = parse_line(file.readline())
    except FileNotFoundError:
        return None
    return None if record is None else _seconds(Head.of(record).created)
