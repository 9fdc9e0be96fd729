"""Writers at the start of a run: they are given what its log holds, and told what a kill left untold."""

from __future__ import annotations

from align_audit.record.log import RunLog
from align_audit.record.run import AuditRun
from align_audit.writers.writer import Writers


def start_writers(writers: Writers, log: RunLog) -> Writers:
    """Start writers with what a log holds; what happened to alerts and nobody was told of is told then, once.

    Raises:
        ConfigurationError: one of them cannot write.
    """
    run = AuditRun.of(log)
    writers.start(run)
    for record in run.untold:
        log.note_told(record)
    return writers
