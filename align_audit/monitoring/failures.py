"""What breaks beside training: kept in the run's log, and said once a kind."""

from __future__ import annotations

import logging

from align_audit.errors import named
from align_audit.monitoring.outcome import AuditFailure
from align_audit.record.log import RunLog
from align_audit.writers.writer import Writers

logger = logging.getLogger(__name__)


class Failures:
    """The failures of one process's audits.

    Args:
        log: where they are kept; None on processes that keep none.
        writers: are told that there is one more.
        rank, size: of this process, and how many there are.
        strict: whoever gets the error shows it, so that nothing is said here.
    """

    def __init__(
        self, log: RunLog | None, writers: Writers, *, rank: int = 0, size: int = 1, strict: bool = False
    ) -> None:
        self._log = log
        self._writers = writers
        self._rank, self._size = rank, size
        self._strict = strict
        self._said: set[str] = set()
        self.broken: dict[str | None, int] = {}
        """Probe set → the step at which an audit on it broke last."""

    def fail(self, step: int, error: BaseException) -> None:
        """Record and say what broke on this process alone."""
        self.record(step, AuditFailure.of(error, rank=self._rank))

    def record(self, step: int, failure: AuditFailure, *, heard: bool = False) -> None:
        """Keep it where this process keeps the log, and say it once.

        Args:
            heard: all processes know of it, so that the one with the log keeps it.
        """
        rank = failure.rank
        self.broken[failure.probe_name] = step
        done, where_to_look = "was recorded", "the traceback is in align_audit/failures.jsonl"
        if self._log is not None:
            if (refusal := self._keep(self._log, step, failure)) is not None:
                done = f"could not be recorded ({named(refusal)})"
                where_to_look = f"its traceback:\n{failure.traceback}"
        elif rank != self._rank:
            return  # that process says it
        elif not heard or self._size == 1:
            done = "could not be recorded (this process keeps no log)"
            where_to_look = f"its traceback:\n{failure.traceback}"
        if self._strict or not self.is_first(failure.kind):
            return
        on = "" if failure.probe_name is None else f" on the probes {failure.probe_name!r}"
        where = "" if rank == 0 else f" on rank {rank}"
        logger.error(
            "the audit at step %d%s broke%s and %s; training goes on. %s (shown once; %s)",
            *(step, on, where, done, failure.kind, where_to_look),
        )

    def is_first(self, kind: str) -> bool:
        """Whether nothing of this kind was said so far; from now on something was."""
        first = kind not in self._said
        self._said.add(kind)
        return first

    def _keep(self, log: RunLog, step: int, failure: AuditFailure) -> Exception | None:
        """What the log or a writer says against it; None: it is kept."""
        text = failure.traceback if failure.rank == 0 else f"On rank {failure.rank}:\n{failure.traceback}"
        try:
            log.append_failure(step, text, failure.probe_name)
            self._writers.failure()
        except Exception as refusal:
            return refusal
        return None
