"""Where a process has gone on with a run from, and what the course that was left there is no part of any more."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from align_audit.record.audit_record import AuditRecord, RecordKey
from align_audit.record.checkpoint_names import checkpoints_in
from align_audit.record.stored_records import Head, chosen

_CLOCKS_APART = 10.0
"""Seconds by which the clocks of this machine and of a file server may differ."""
_STATE = "trainer_state.json"
"""Is written once, with the checkpoint that it lies in."""


class GoneOn:
    """A run that goes on from a step, in this process.

    A run that is resumed from an earlier step has its audits and checkpoints of later ones in its log and folder. What training
    comes by again, with the same weights, is of its course. What it does not is of the course that it left.

    Args:
        step: the last one that was made before.
        stored: the audits that earlier processes made.
    """

    def __init__(self, step: float = math.inf, stored: Collection[RecordKey] = ()) -> None:
        self._step, self._stored = step, frozenset(stored)
        self._began = time.time()
        self._met: set[tuple[int, str]] = set()

    def meet(self, step: int, policy_hash: str) -> None:
        """Training is at a step, with these weights, and an audit is due."""
        self._met.add((step, policy_hash))

    def course(self, records: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
        """The records without those of the course that was left."""
        return chosen(records, lambda head: not self._is_left(head))

    def checkpoints(self, folder: Path, heads: Sequence[Head]) -> dict[int, str]:
        """Step → name of the checkpoints in a folder that this training may go back to: those that exist now, as the trainer
        deletes old ones (``save_total_limit``), and are of its course. None where the folder cannot be read.

        Args:
            heads: of the audits of its course.
        """
        made = [(head.step, _time_of(head)) for head in heads if head.occasion is not None]

        def is_left(step: int, name: str) -> bool:
            written = _written(folder / name) + _CLOCKS_APART
            # An audit of an earlier step that was made later: training has come there again since.
            return (step > self._step and written < self._began) or any(
                at < step and written < when for at, when in made
            )

        try:
            return {step: name for step, name in checkpoints_in(folder).items() if not is_left(step, name)}
        except OSError:
            return {}

    def _is_left(self, head: Head) -> bool:
        again = (head.step, head.policy_hash) in self._met
        return head.step > self._step and head.key in self._stored and not again


def _written(checkpoint: Path) -> float:
    """When it was written, in seconds since 1970."""
    state = checkpoint / _STATE
    return (state if state.exists() else checkpoint).stat().st_mtime


def _time_of(head: Head) -> float:
    try:
        return datetime.fromisoformat(head.created).timestamp()
    except ValueError:  # of a log that was made elsewhere
        return -math.inf
