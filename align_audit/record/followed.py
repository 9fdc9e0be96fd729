"""The logs of runs that are under way, read as they grow: what was parsed once is not parsed again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from align_audit.errors import RecordError, counted, first_line, listed, plain
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.lines import parsed
from align_audit.record.lock import identity_of
from align_audit.record.log import FAILURES, RECORDS, Failure
from align_audit.record.run import AuditRun
from align_audit.record.status import unread_end, unread_log
from align_audit.record.stored_records import StoredRecords, events_of, head_of_line
from align_audit.record.training_log import TRAINING, LogRow, follow, rows_of
from align_audit.record.turns import COURSE, Turn


class FollowedRun:
    """One run's log, which another process may be writing, or delete, or begin anew.

    Attributes:
        directory: of the log.
        run: as it was at the last :meth:`refresh`.
        trouble: why the log, or a part of it, cannot be read, in a sentence; None: it can. Whether the run's status goes by it
            :func:`~align_audit.record.status.unread_end` says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trouble: str | None = None
        self._files = {name: _Tail(directory / name) for name in (RECORDS, COURSE, FAILURES, TRAINING)}
        self._records = StoredRecords()
        self._failures: list[Failure] = []
        self._rows: list[LogRow] = []
        self._told: set[str] = set()
        self._damaged: Counter[str] = Counter()
        """Lines of each file that could not be read."""
        self._reason: str | None = None
        """What is wrong with the last record that could not be read."""
        self._at_end = 0
        """Lines after the last record that could be read."""
        self._unread: str | None = None
        self.run = self._as_run()

    def refresh(self) -> tuple[bool, list[Alert]]:
        """Read what is new.

        Returns:
            Whether anything is, and the alerts that opened or got worse in it. An alert is told of once, also of a log that
            was written again.
        """
        trouble, unread, refusal = self.trouble, self._unread, None
        changed, alerts = False, []
        try:
            for name, tail in self._files.items():
                began_anew, lines = tail.read()
                if began_anew:
                    self._forget(name)
                alerts += self._take(name, lines)
                changed = changed or began_anew or bool(lines)
        except (OSError, RecordError) as error:
            refusal = unread_log(error)
        self._unread = refusal or unread_end(self._at_end, self._reason)
        self.trouble = refusal or self._damage()
        if changed or unread != self._unread:
            self.run = self._as_run()
        return changed or trouble != self.trouble, alerts

    @property
    def skipped(self) -> int:
        """Records that could not be read."""
        return self._damaged[RECORDS]

    def _damage(self) -> str | None:
        """What is said of lines that cannot be read."""
        said = [f"{counted(lines, 'line')} of {name}" for name, lines in self._damaged.items() if lines]
        reason = f": {self._reason.rstrip('.')}" if self._reason is not None else ""
        return f"{listed(said)} cannot be read{reason}." if said else None

    def _as_run(self) -> AuditRun:
        records, rows = self._records.by_step(), list(self._rows)
        failures = list(self._failures)
        return AuditRun(self.directory, records, records.alerts, failures, training_log=rows, unread=self._unread)

    def _forget(self, name: str) -> None:
        self._damaged[name] = 0
        if name == RECORDS:
            self._records, self._reason, self._at_end = StoredRecords(turns=self._records.turns), None, 0
        elif name == COURSE:
            self._records.turns.clear()
        elif name == FAILURES:
            self._failures = []
        else:
            self._rows = []

    def _take(self, name: str, lines: list[bytes]) -> list[Alert]:
        if name == TRAINING:
            for row in rows_of(lines):
                follow(self._rows, row)
            return []
        if name == COURSE:
            for turn in parsed(lines, Turn):
                self._records.turns.add(turn)
            return []
        if name == FAILURES:
            failures = parsed(lines, Failure)
            self._damaged[name] += len(lines) - len(failures)
            self._failures += failures
            return []
        first = len(self._records)
        for line in lines:
            self._take_record(line)
        return self._news(alert for head in self._records.heads[first:] for alert in head.alerts)

    def _take_record(self, line: bytes) -> None:
        where = f"a line of {plain(self.directory / RECORDS)}"
        head = head_of_line(line)
        if head is not None:
            self._records.append_line(head, line, where)
            self._at_end = 0
            return
        try:
            self._records.append(AuditRecord.from_json(line, where), line, where)
            self._at_end = 0
        except RecordError as error:
            self._damaged[RECORDS] += 1
            self._at_end += 1
            self._reason = first_line(error)

    def _news(self, alerts: Iterable[Alert]) -> list[Alert]:
        news = []
        for alert in events_of(alerts):
            words = alert.model_dump_json()
            if alert.event != "resolved" and words not in self._told:
                news.append(alert)
            self._told.add(words)
        return news


class _Tail:
    """A file that grows: its whole lines, each given once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._end = 0
        """Of the last whole line that was given."""

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the file is another than it was (or shorter, or gone), and the lines that are new.

        Raises:
            OSError: it is there and cannot be read.
        """
        identity = identity_of(self._path)
        began_anew = self._identity is not None and identity != self._identity
        if identity is None or began_anew:
            self._end = 0
        self._identity = identity
        if identity is None:
            return began_anew, []
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._end:
                    began_anew, self._end = True, 0
                if size == self._end:
                    return began_anew, []
                file.seek(self._end)
                data = file.read(size - self._end)
        except FileNotFoundError:  # deleted just now: the next look says so
            return began_anew, []
        # What has no newline yet is being written.
        lines = data[: data.rfind(b"\n") + 1]
        self._end += len(lines)
        return began_anew, [line for line in lines.split(b"\n") if line.strip()]
