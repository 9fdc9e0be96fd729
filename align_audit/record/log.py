"""The audits of one training run on disk, written line by line while it trains.

``<output_dir>/align_audit/`` holds

- ``records.jsonl``: one :class:`~align_audit.record.audit_record.AuditRecord` a line;
- ``alerts.jsonl``: the alerts of those records, one a line (a copy, for ``tail -f``; the records are the source);
- ``failures.jsonl``: audits that broke, with their traceback;
- ``step-<N>/*.safetensors``: what is too large for a line (per-pair values, subspace bases), of a named probe set in
  ``arrays-<name>``;
- ``previous-<n>/``: the same of runs that began again in the same output directory.

The logs only grow, and survive a kill between any two bytes: a line is whole once its newline is there, and a torn end
is moved aside, never lost and never in the way of the next audit.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from align_audit.errors import ConfigurationError, RecordError
from align_audit.files import write_atomically
from align_audit.record.audit_record import SCHEMA_VERSION, Alert, AuditRecord

if TYPE_CHECKING:
    import numpy as np

FOLDER = "align_audit"
RECORDS = "records.jsonl"
ALERTS = "alerts.jsonl"
FAILURES = "failures.jsonl"

_Line = TypeVar("_Line", Alert, "Failure")


def arrays_name(probe_name: str | None, name: str = "arrays") -> str:
    """What a set's arrays are called in a step's folder.

    Example:
        >>> arrays_name(None), arrays_name("helpful")
        ('arrays', 'arrays-helpful')
    """
    return name if probe_name is None else f"{name}-{probe_name}"


class Failure(BaseModel):
    """An audit that broke: training went on without it."""

    model_config = ConfigDict(frozen=True)

    step: int
    time: str
    """When it broke: ISO 8601, UTC."""
    error: str
    """The traceback."""
    probe_name: str | None = None
    """The probe set it was on, where that has a name."""


class RunLog:
    """The log of one run, open for appending.

    Opening repairs what a kill left behind (see :mod:`align_audit.record.log`) and reads the records there are, so that a
    resumed run goes on where it stopped.

    Args:
        output_dir: the training's output directory; the log lies in its ``align_audit`` folder, made when absent.

    Raises:
        ConfigurationError: the folder cannot be made or written to.
        RecordError: the log holds records of a newer align_audit.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.directory = Path(output_dir) / FOLDER
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Permission bits do not tell (read-only mounts, quotas, root): only writing does.
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b"\n")
            for name in (RECORDS, ALERTS, FAILURES):
                _repair(self.directory / name)
            (self.directory / RECORDS).touch()
            _sync_directory(self.directory)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write the audit log in {self.directory}: {error}. Expected a folder that this process may "
                "write to; choose another output_dir, or free the path, its permissions or disk space."
            ) from error
        self._records = read_records(self.directory / RECORDS)
        self._keys = {record.key for record in self._records}
        self._add_missing_alerts()

    @property
    def records(self) -> list[AuditRecord]:
        """The records so far, by step, then by creation."""
        return sorted(self._records, key=by_step)

    def contains(self, key: tuple[int, str, str, str | None]) -> bool:
        """Is an audit of this step, policy, reference and probe set (:attr:`AuditRecord.key`) in the log already?"""
        return key in self._keys

    def append(self, record: AuditRecord) -> bool:
        """Add a record and its alerts, and wait until they are on disk.

        Returns:
            False when the log already holds an audit with the same key; nothing is written then.
        """
        if self.contains(record.key):
            return False
        self._append(RECORDS, [record.to_json()])
        self._records.append(record)
        self._keys.add(record.key)
        self._append(ALERTS, [alert.model_dump_json() for alert in record.alerts])
        return True

    def append_failure(self, step: int, error_text: str, probe_name: str | None = None) -> None:
        """Note that the audit of this step broke, on which probe set, and how."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        # A traceback may hold undecodable bytes of file names, which are no valid UTF-8.
        error_text = error_text.encode(errors="backslashreplace").decode()
        failure = Failure(step=step, time=time, error=error_text, probe_name=probe_name)
        self._append(FAILURES, [failure.model_dump_json()])

    def set_aside(self) -> Path:
        """Start afresh: move all that lies in the log's folder to ``previous-<n>`` in it, and go on with an empty log.

        Returns:
            The new folder; :meth:`align_audit.record.run.AuditRun.load` reads it.
        """
        number = 1
        while (aside := self.directory / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        entries = [path for path in self.directory.iterdir() if not path.name.startswith("previous-")]
        # The records go last: as long as they are here, a run that was killed in between starts over with the move.
        for path in sorted(entries, key=lambda path: (path.name == RECORDS, path.name)):
            path.rename(aside / path.name)
        (self.directory / RECORDS).touch()
        _sync_directory(self.directory)
        self._records, self._keys = [], set()
        return aside

    def step_dir(self, step: int) -> Path:
        """The folder for what is large of one step, made when absent."""
        path = _step_path(self.directory, step)
        path.mkdir(exist_ok=True)
        return path

    def save_arrays(self, step: int, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """Write arrays to ``step-<N>/<name>.safetensors``, atomically; an earlier file of that name is replaced."""
        import numpy
        from safetensors.numpy import save

        path = _arrays_path(self.step_dir(step), name)
        # order="C" and not ascontiguousarray, which makes 0-d arrays 1-d.
        data = save({key: numpy.asarray(value, order="C") for key, value in arrays.items()})
        write_atomically(path, data)
        return path

    def load_arrays(self, step: int, name: str) -> dict[str, np.ndarray]:
        """What :meth:`save_arrays` wrote: see :func:`load_arrays`."""
        return load_arrays(self.directory, step, name)

    def _append(self, name: str, lines: Sequence[str]) -> None:
        if not lines:
            return
        path = self.directory / name
        with path.open("ab") as file:
            end = file.seek(0, os.SEEK_END)
            try:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                # A disk that ran full leaves half a line; the next one must not be glued to it.
                os.truncate(path, end)
                raise

    def _add_missing_alerts(self) -> None:
        """Alerts follow their record, so a kill in between leaves them out of their own file."""
        logged = Counter(alert.model_dump_json() for alert in read_lines(self.directory / ALERTS, Alert))
        expected = [alert.model_dump_json() for record in self._records for alert in record.alerts]
        missing = []
        for line in expected:
            if logged[line]:
                logged[line] -= 1
            else:
                missing.append(line)
        self._append(ALERTS, missing)


def by_step(record: AuditRecord) -> tuple[int, str]:
    """The order of a run's records: by step, then by creation."""
    return record.step, record.provenance.created


# --- files ------------------------------------------------------------------------------------------------------------


def _whole(data: bytes) -> int:
    """Length of a log up to the end of its last whole line: less than all of it where that line is torn."""
    start = data.rfind(b"\n", 0, len(data.rstrip())) + 1
    line = data[start:].strip()
    return start if line and not _is_object(line) else len(data)


def _is_object(line: bytes) -> bool:
    # A proper prefix of a JSON object is never one itself: whatever parses is whole.
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _repair(path: Path) -> None:
    """Make the log end with a whole line: what a kill left behind it goes to ``<name>.torn-<n>``."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = _whole(data)
    if whole < len(data):
        number = 1
        while (aside := path.with_name(f"{path.name}.torn-{number}")).exists():
            number += 1
        # First the copy, then the cut: a kill between the two costs nothing but a second copy.
        with aside.open("xb") as file:
            file.write(data[whole:])
            file.flush()
            os.fsync(file.fileno())
        os.truncate(path, whole)
        warnings.warn(
            f"{path} ended in the middle of a line (the process that wrote it was stopped); its last "
            f"{len(data) - whole} bytes were moved to {aside.name}, and the log goes on after its last whole line",
            stacklevel=4,
        )
    elif data and not data.endswith(b"\n"):
        # Only the newline is missing: the line itself is whole and stays.
        with path.open("ab") as file:
            file.write(b"\n")


def _json_lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered JSON objects of a log; the rest is skipped with one warning. An absent log is an empty one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error}") from None
    whole = _whole(data)
    objects, unreadable = [], []
    for number, line in enumerate(data[:whole].split(b"\n"), start=1):
        if _is_object(line):
            objects.append((number, line))
        elif line.strip():
            unreadable.append(number)
    if unreadable:
        _warn_skipped(path, unreadable, "not JSON")
    if whole < len(data):
        warnings.warn(
            f"{path} ends in the middle of a line (being written, or its writer was stopped); that line is left out",
            stacklevel=4,
        )
    return objects


def read_records(path: Path) -> list[AuditRecord]:
    """The records of a log in the order of its lines; what cannot be read is left out, with a warning.

    Raises:
        RecordError: the file cannot be read, or holds records of a newer align_audit.
    """
    records, invalid = [], []
    for number, line in _json_lines(path):
        where = f"line {number} of {path}"
        try:
            records.append(AuditRecord.from_json(line, where=where))
        except RecordError as error:
            version = json.loads(line).get("schema_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise
            # The first of its problems is enough.
            invalid.append((number, " ".join(str(error).replace(where, "it").splitlines()[:3])))
    if invalid:
        _warn_skipped(path, [number for number, _ in invalid], invalid[0][1])
    return records


def read_lines(path: Path, kind: type[_Line]) -> list[_Line]:
    """The alerts or failures of a file in the order of its lines, as :func:`read_records` reads records."""
    values, invalid = [], []
    for number, line in _json_lines(path):
        try:
            values.append(kind.model_validate_json(line))
        except ValidationError:
            invalid.append(number)
    if invalid:
        _warn_skipped(path, invalid, f"no {kind.__name__}")
    return values


def _warn_skipped(path: Path, numbers: Sequence[int], why: str) -> None:
    where = f"line {numbers[0]}" if len(numbers) == 1 else f"lines {', '.join(map(str, numbers))}"
    warnings.warn(f"{where} of {path} cannot be read and is skipped (it stays in the file): {why}", stacklevel=5)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and its entries need no flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def _arrays_path(folder: Path, name: str) -> Path:
    if not name or Path(name).name != name or name == "..":
        raise ValueError(f"expected a plain name such as 'pairs' for the arrays, found {name!r}")
    return folder / f"{name}.safetensors"


def load_arrays(directory: Path, step: int, name: str) -> dict[str, np.ndarray]:
    """What :meth:`RunLog.save_arrays` wrote into a log's folder.

    Raises:
        RecordError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = _arrays_path(_step_path(directory, step), name)
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise RecordError(f"cannot read the arrays {path}: {error}") from None
