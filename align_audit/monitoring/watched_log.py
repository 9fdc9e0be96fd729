"""What the log of a watched training says of a checkpoint, by its files: enough to go on where another process was killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from align_audit.monitoring.arrivals import Checkpoint
from align_audit.monitoring.monitor import Monitor
from align_audit.record.audit_record import AuditRecord
from align_audit.record.lines import read_records
from align_audit.record.log import RECORDS, RunLog
from align_audit.record.stored_records import Head, chosen
from align_audit.record.training_log import LogRow, TrainingLog

_KEPT = "checkpoint"
"""What a record says, under ``extra``, of the files that its policy was read from."""


def kept_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the record of a checkpoint's audit keeps of its files, under ``extra``."""
    written = datetime.fromtimestamp(checkpoint.written, UTC).isoformat(timespec="microseconds")
    return {_KEPT: {"folder": checkpoint.folder.name, "files": checkpoint.signature, "written": written}}


class WatchedLog:
    """The log that audits of a training's checkpoints go into.

    Args:
        training_log: what the checkpoints' trainer has logged goes there.
    """

    def __init__(self, log: RunLog, training_log: TrainingLog) -> None:
        self.log = log
        self.training_log = training_log

    def holds(self, checkpoint: Checkpoint, monitor: Monitor, *, on_disk: bool = False) -> bool:
        """Were these very files audited, on all probe sets and as now? They need not be loaded to know it.

        Args:
            on_disk: read the log again: an interrupt may have come between its file and what is held of it.
        """
        sets, config = monitor.probe_sets, monitor.config
        records = read_records(self.log.directory / RECORDS) if on_disk else self.log.records
        audited = {
            record.provenance.probe_name
            for record in records.where(lambda head: head.step == checkpoint.step and head.probe_name in sets)
            if _files_of(record) == checkpoint.signature
            and record.provenance.probe_hash == sets[record.provenance.probe_name].content_hash
            and config.measures_as(record.provenance.config)
        }
        return audited == set(sets)

    def later_step(self, checkpoint: Checkpoint) -> int | None:
        """A later step that was audited of files as new as these; None: this one is next, or of a training that was resumed."""
        later = self._records(lambda head: head.step > checkpoint.step)
        return next((each.step for each in later if _written_of(each) >= checkpoint.written), None)

    def is_older_than(self, checkpoint: Checkpoint) -> bool:
        """Was the checkpoint written anew since its step was audited?"""
        audited = self._records(lambda head: head.step == checkpoint.step)
        return bool(audited) and all(_written_of(each) < checkpoint.written for each in audited)

    def keep_training_log(self, checkpoint: Checkpoint) -> None:
        """Keep what the trainer has logged until this checkpoint, as a callback in the training would have.

        Raises:
            OSError: it cannot be written.
        """
        history = checkpoint.state.get("log_history")
        rows = [_row(each) for each in history if isinstance(each, dict)] if isinstance(history, list) else []
        rows = [row for row in rows if row.step >= 0]
        there = self.training_log.rows
        same = 0
        while same < min(len(rows), len(there)) and repr(rows[same]) == repr(there[same]):
            same += 1
        # What differs is of a training that was resumed earlier; what there is more of is of a later checkpoint.
        for row in rows[same:]:
            self.training_log.append(row.step, row.logs)

    def _records(self, test: Callable[[Head], bool]) -> Sequence[AuditRecord]:
        return chosen(self.log.records, test)


def _row(logged: Mapping[str, Any]) -> LogRow:
    """What a trainer's state has of one log; of step −1 where it does not say which."""
    step = logged.get("step")
    numbers = {
        name: float(value)
        for name, value in logged.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return LogRow(step if isinstance(step, int) and numbers else -1, numbers)


def _files_of(record: AuditRecord) -> str | None:
    """The signature of the files that a record's policy was read from; None: it does not say."""
    kept = record.extra.get(_KEPT)
    return kept.get("files") if isinstance(kept, dict) else None


def _written_of(record: AuditRecord) -> float:
    """When these files were written; of a record that does not say, when it was made."""
    kept = record.extra.get(_KEPT)
    said = kept.get("written") if isinstance(kept, dict) else None
    return datetime.fromisoformat(said if isinstance(said, str) else record.provenance.created).timestamp()
