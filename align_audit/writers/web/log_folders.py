"""Where a TensorBoard looks for runs: its log folders, and the audit logs in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_audit.record.log import FAILURES, FOLDER, RECORDS, output_dir_of
from align_audit.record.places import log_folders
from align_audit.record.training_log import TRAINING
from align_audit.record.turns import COURSE

_ADDRESS = re.compile("[a-zA-Z][0-9a-zA-Z.]*://")
"""Of another machine's folder, as TensorBoard knows it."""


@dataclass(frozen=True)
class LogFolder:
    """A folder that TensorBoard was started on.

    Attributes:
        path: absolute, without links.
        label: what its runs' names begin with; None: nothing.
    """

    path: Path
    label: str | None = None


@dataclass(frozen=True)
class AuditLog:
    """An audit log that lies in a log folder.

    Attributes:
        key: what it is asked for by; it says nothing of where the log is.
        name: of the run: its folder, from the log folder on.
        directory: of the log.
    """

    key: str
    name: str
    directory: Path


def folders_of(logdir: str, spec: str = "") -> list[LogFolder]:
    """The folders that TensorBoard's options name.

    Args:
        logdir: of ``--logdir``: one path; empty: none.
        spec: of ``--logdir_spec``: paths with or without names, ``name:path,path``.

    Returns:
        Those on this machine; TensorBoard reads other ones by itself, and nobody else can.

    Example:
        >>> [(each.label, str(each.path)) for each in folders_of("", "a:/nowhere/1,/nowhere/2,gs://bucket")]
        [('a', '/nowhere/1'), (None, '/nowhere/2')]
    """
    named: list[tuple[str | None, str]] = [(None, logdir)] if logdir else []
    for part in filter(None, spec.split(",")):
        label, colon, path = part.partition(":")
        with_name = colon and not (_ADDRESS.match(part) or part.startswith("/") or os.path.splitdrive(part)[0])
        named.append((label, path) if with_name else (None, part))
    here = [(label, path) for label, path in named if not _ADDRESS.match(path)]
    return [LogFolder(Path(os.path.realpath(os.path.expanduser(path))), label) for label, path in here]


def logs_in(folders: Sequence[LogFolder]) -> list[AuditLog]:
    """The audit logs in log folders, by the names of their runs.

    A trainer writes events to ``<output_dir>/runs/<date>`` and audits to ``<output_dir>/align_audit``: beside each other, so
    that whoever sees the one sees the other where the log folder holds the run. Logs outside of the log folders are not read,
    whatever links say.
    """
    logs = {log.directory: log for folder in reversed(folders) for log in _logs_of(folder)}
    return sorted(logs.values(), key=lambda log: (log.name, log.key))


def _logs_of(folder: LogFolder) -> Iterator[AuditLog]:
    for directory in log_folders(folder.path):
        if not all(_inside(directory / name, folder.path) for name in (RECORDS, COURSE, FAILURES, TRAINING)):
            continue
        run = output_dir_of(directory)
        # A log folder may be a run, or the log in it.
        inside = run != folder.path and run.is_relative_to(folder.path)
        name = run.relative_to(folder.path).as_posix() if inside else folder.path.name
        if folder.label is not None:
            name = f"{folder.label}/{name}" if inside else folder.label
        key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        yield AuditLog(key, name, directory)


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(folder)


def log_beside(folders: Sequence[LogFolder]) -> Path | None:
    """The folder above a log folder, where that is the run's: ``--logdir <output_dir>/runs`` sees its events alone."""
    return next((folder.path.parent for folder in folders if log_folders(folder.path.parent / FOLDER, 0)), None)
