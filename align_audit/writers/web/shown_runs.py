"""The runs of some log folders as the tab shows them: a row for each, the worst first, and the page of any of them.

A row is made of the end of a run's log, so that twenty long runs are listed at once; the log of a run is read from its
beginning when its page is first asked for, and from then on as it grows.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from align_audit import __version__
from align_audit.record.course import present_course
from align_audit.record.followed import FollowedRun
from align_audit.record.lines import parsed
from align_audit.record.log import FAILURES, RECORDS, Failure
from align_audit.record.newest import Newest, lines_from_end, read_newest
from align_audit.record.run_sums import Intervals
from align_audit.record.status import WORST_FIRST, Status, status_of, status_of_course, unread_log
from align_audit.record.training_log import TRAINING, rows_of
from align_audit.record.turns import COURSE
from align_audit.writers.web.comparison_data import comparison_data
from align_audit.writers.web.json_values import text
from align_audit.writers.web.log_folders import AuditLog, LogFolder, log_beside, logs_in
from align_audit.writers.web.page_data import FORMAT, page_data

_OPEN = 4
"""Runs, those asked for last, whose logs stay in memory."""
_LOOK_SECONDS = 3.0
"""So long the folders are not looked through again."""
_LOOK_SHARE = 0.1
"""Of the time that may go into looking for logs: a large folder on a slow disk takes seconds."""
_LAST_ROWS = 20
"""Lines of a training log among which is one that says how far training has come."""

Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class ListedRun:
    """How a run stands, as the end of its log says.

    Attributes:
        step: of the last audit.
        unread: what of the end of its log cannot be read, in a sentence; None: nothing.
        version: changes whenever the run's page does.
    """

    status: Status
    step: int | None
    unread: str | None
    version: str


@dataclass
class _Log:
    """What is kept of one log."""

    row_signature: Signature = ()
    row: ListedRun | None = None
    newest_signature: Signature = ()
    newest: Newest = field(default_factory=Newest)
    failures: list[Failure] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Page:
    """What is kept of a run whose page was asked for."""

    run: FollowedRun
    version: str = ""
    content: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)


class ShownRuns:
    """The runs of log folders, for any number of threads.

    Runs are asked for by keys that were given out; nothing that comes from a browser is part of a path.

    Args:
        intervals: makes the intervals of comparisons.
    """

    def __init__(self, folders: Sequence[LogFolder], intervals: Intervals) -> None:
        self.folders = folders
        self._intervals = intervals
        self._table: dict[str, AuditLog] = {}
        self._next_look = 0.0
        self._logs: dict[str, _Log] = {}
        self._pages: OrderedDict[str, _Page] = OrderedDict()
        self._lock = threading.Lock()

    def logs(self) -> list[AuditLog]:
        """Those there are, looked for anew every few seconds."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next_look:
                self._table = {log.key: log for log in logs_in(self.folders)}
                now = time.monotonic()
                self._next_look = now + max(_LOOK_SECONDS, (now - began) / _LOOK_SHARE)
                self._logs = {key: self._logs.get(key) or _Log() for key in self._table}
            return list(self._table.values())

    def listing(self) -> dict[str, Any]:
        """What the tab's list shows.

        Returns:
            ``runs``, the worst first, each with ``key``, ``name``, ``word``, ``since`` and ``step`` (None: not known),
            ``reason`` and ``version``; ``hint``, what to do where there are none, else empty.
        """
        rows = [(log, self._row(log)) for log in self.logs()]
        rows.sort(key=lambda pair: (WORST_FIRST.index(pair[1].status.word), pair[0].name))
        runs = [
            {
                "key": log.key,
                "name": text(log.name, 200),
                "word": row.status.word,
                # The end of a log does not say since when all has been well.
                "since": None if row.status.word == "HEALTHY" else row.status.since,
                "step": row.step,
                "reason": text(row.status.reason),
                "version": row.version,
            }
            for log, row in rows
        ]
        return {"runs": runs, "hint": "" if runs else self.hint()}

    def hint(self) -> str:
        """What to do where no run is to be seen."""
        beside = log_beside(self.folders)
        if beside is not None:
            return (
                f"An audit log lies beside this log folder, and the tab reads none outside of it. Start "
                f"tensorboard --logdir {text(beside)} to see it."
            )
        places = ", ".join(text(folder.path) for folder in self.folders) or "a folder of this machine"
        return (
            f"No audit log in {places}. Expected a folder align_audit with records.jsonl, which training with "
            "AlignmentAuditCallback and `align-audit run` write into the output directory: start tensorboard on that, or on "
            "a folder that holds it."
        )

    def page(self, key: str) -> bytes | None:
        """The data of a run's page.

        Returns:
            JSON: the value of :func:`~align_audit.writers.web.page_data.page_data` with ``trouble``, what of the log cannot be
            read (None: nothing). None: there is no such run.
        """
        log = self._log(key)
        if log is None:
            return None
        kept = self._opened(log)
        with kept.lock:
            row = self._row(log)
            if kept.version != row.version:
                kept.run.refresh()
                kept.content = _json(_data(kept.run, row))
                kept.version = row.version
            return kept.content

    def comparison(self, keys: Sequence[str]) -> bytes | None:
        """What comparing runs says; they are called A and B there, in the order of the keys.

        Returns:
            JSON: of :func:`~align_audit.writers.web.comparison_data.comparison_data`. None: two of them are not there.
        """
        logs = [log for log in map(self._log, keys) if log is not None]
        if len(keys) != 2 or len(logs) != 2:
            return None
        runs = []
        for log in logs:
            kept = self._opened(log)
            with kept.lock:
                kept.run.refresh()
                runs.append(kept.run.run)
        return _json(comparison_data(runs, self._intervals))

    def _log(self, key: str) -> AuditLog | None:
        return next((log for log in self.logs() if log.key == key), None)

    def _opened(self, log: AuditLog) -> _Page:
        """What is kept of a run that was asked for; of those asked for long ago nothing is."""
        with self._lock:
            kept = self._pages.setdefault(log.key, _Page(FollowedRun(log.directory)))
            self._pages.move_to_end(log.key)
            while len(self._pages) > _OPEN:
                self._pages.popitem(last=False)
            return kept

    def _row(self, log: AuditLog) -> ListedRun:
        kept = self._logs.get(log.key) or _Log()
        with kept.lock:
            signature = _signature(log.directory, RECORDS, COURSE, FAILURES, TRAINING)
            if kept.row is None or kept.row_signature != signature:
                try:
                    kept.row = _row_of(log.directory, kept)
                except Exception as error:  # whatever one log holds, the others are shown
                    unread = unread_log(error)
                    kept.row = ListedRun(status_of([], [], [], unread), None, unread, _version(signature, unread))
                kept.row_signature = signature
            return kept.row


def _row_of(directory: Path, kept: _Log) -> ListedRun:
    signature = _signature(directory, RECORDS, COURSE, FAILURES)
    if kept.newest_signature != signature:
        kept.failures = parsed(lines_from_end(directory / FAILURES), Failure)[::-1]
        kept.newest = read_newest(directory / RECORDS, {failure.probe_name for failure in kept.failures})
        kept.newest_signature = signature
    newest = kept.newest
    training = rows_of(reversed(list(islice(lines_from_end(directory / TRAINING), _LAST_ROWS))))
    records = present_course(newest.records)
    status = status_of_course(records, kept.failures, training, newest.unread)
    # Of the training log only what changes the status counts: it grows all the time.
    step = records[-1].step if records else None
    return ListedRun(status, step, newest.unread, _version(signature, f"{status} {status.reason}"))


def _data(followed: FollowedRun, row: ListedRun) -> dict[str, Any]:
    """Of a page; a status that the end of the log does not bear out is not shown as health."""
    run = replace(followed.run, unread=row.unread)
    data = page_data(run, written=_written(followed.directory))
    data["trouble"] = None if followed.trouble is None else text(followed.trouble)
    return data


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _written(directory: Path) -> str:
    """When the log last grew."""
    times = [stamp[1] for stamp in _signature(directory, RECORDS, FAILURES) if stamp is not None]
    return datetime.fromtimestamp(max(times, default=0) / 1e9, UTC).isoformat(timespec="seconds")


def _signature(directory: Path, *names: str) -> Signature:
    """What tells whether files have changed."""
    stamps: list[tuple[int, int, int] | None] = []
    for name in names:
        try:
            status = (directory / name).stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(stamps)


def _version(signature: Signature, words: str) -> str:
    return hashlib.sha256(repr((FORMAT, __version__, signature, words)).encode()).hexdigest()[:16]
