"""The audits of one training run on disk, written line by line while it trains.

``<output_dir>/align_audit/`` holds

- ``records.jsonl``: one :class:`~align_audit.record.audit_record.AuditRecord` a line;
- ``alerts.jsonl``: what happened to alerts at those records (opened, worse, resolved), one a line (a copy, for ``tail -f``; the
  records are the source, and have those that only stay open too);
- ``training.jsonl``: what the trainer logged (:mod:`align_audit.record.training_log`);
- ``failures.jsonl``: audits that broke, with their traceback;
- ``course.jsonl``: where training went back to (:mod:`align_audit.record.turns`);
- ``checkpoints.jsonl``: which saved checkpoints were audited (:mod:`align_audit.record.audited_checkpoints`);
- ``told.jsonl``: of which records the writers were told what happened to alerts at them, one a line;
- ``step-<N>/*.safetensors``: what is too large for a line (per-pair values, subspace bases), of a named probe set in
  ``arrays-<name>``; and ``texts.json`` or ``texts-<name>.json``: the pairs that moved most, as text
  (:mod:`align_audit.record.pair_texts`);
- ``report.html``: the page of the run;
- ``previous-<n>/``: the same of runs that began again in the same output directory.

The logs only grow, and survive a kill between any two bytes: a line is whole once its newline is there, and a torn end
is moved aside, never lost and never in the way of the next audit. A log that is deleted during the run is written again.
One process at a time writes it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from align_audit.errors import ConfigurationError, RecordError, counted, first_line, plain
from align_audit.files import append_whole, is_folder_here, remove_abandoned, try_to_write, write_atomically
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, RecordKey
from align_audit.record.audited_checkpoints import CHECKPOINTS
from align_audit.record.lines import read_lines, read_records, repair
from align_audit.record.lock import FileLock, identity_of, is_held_elsewhere, lock
from align_audit.record.pair_texts import PairTexts
from align_audit.record.step_files import arrays_path, load_arrays, step_path, texts_path
from align_audit.record.stored_records import StoredRecords, events_of
from align_audit.record.turns import COURSE, Turn, Turns

if TYPE_CHECKING:
    import numpy as np

FOLDER = "align_audit"
RECORDS = "records.jsonl"
ALERTS = "alerts.jsonl"
FAILURES = "failures.jsonl"
TOLD = "told.jsonl"
REPORT = "report.html"


def is_set_aside(directory: Path) -> bool:
    """Was another run begun in the place of a log's? It lies in ``previous-<n>`` then (:meth:`RunLog.set_aside`)."""
    place = Path(os.path.abspath(directory))
    return place.parent.name == FOLDER and place.name.startswith("previous-")


def output_dir_of(directory: Path) -> Path:
    """The folder that the run of a log was trained into: the log lies in its ``align_audit`` folder, or is that folder, copied.

    Example:
        >>> [output_dir_of(Path(name)).as_posix() for name in ("runs/dpo/align_audit", "copies/dpo")]
        ['runs/dpo', 'copies/dpo']
    """
    place = Path(os.path.abspath(directory))
    up = 2 if is_set_aside(place) else int(place.name == FOLDER)
    # As it was given, where that names the folder.
    shown = directory if len(directory.parts) > up and ".." not in directory.parts else place
    return shown.parents[up - 1] if up else shown


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


class _Told(BaseModel):
    """A line of ``told.jsonl``."""

    model_config = ConfigDict(frozen=True)

    record: RecordKey


class RunLog:
    """The log of one run, open for appending.

    Opening repairs what a kill left behind (see :mod:`align_audit.record.log`) and reads the records there are, so that a
    resumed run goes on where it stopped.

    Args:
        output_dir: the training's output directory; the log lies in its ``align_audit`` folder, made when absent.

    Raises:
        ConfigurationError: the folder cannot be made or written to, or another living process writes this log.
        RecordError: the log holds records of a newer align_audit.
    """

    _lock: FileLock | None
    _identity: tuple[int, int] | None
    """The file that this run writes; None: it has let go of it."""

    def __init__(self, output_dir: str | Path) -> None:
        # Absolute now: the working directory may change while the run goes on.
        self.directory = Path(os.path.abspath(output_dir)) / FOLDER
        self._made = [
            path for path in (self.directory / RECORDS, self.directory, *self.directory.parents) if not path.exists()
        ]
        """What there was not yet, the innermost first."""
        with _refusals(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try_to_write(self.directory)
            self._hold()
            _remove_leftovers(self.directory)
            for name in (RECORDS, ALERTS, FAILURES, TOLD, COURSE, CHECKPOINTS):
                repair(self.directory / name)
            _sync_directory(self.directory)
        self._records = read_records(self.directory / RECORDS)
        self._records.turns = Turns(read_lines(self.directory / COURSE, Turn))
        self._keys = {head.key for head in self._records.heads}
        self._told = {line.record for line in read_lines(self.directory / TOLD, _Told)}
        self._behind = False
        """Whether there are records that the disk has refused so far."""
        # Alerts follow their record, so a kill in between leaves them out of their own file.
        self._append_alerts(_missing_alerts(self.directory, self._records))

    def close(self) -> None:
        """Let other processes write this log; it is taken again where this one writes after all. What the disk has refused so
        far is tried once more.

        Where nothing was stored, what opening has made is removed: a log without audits looks like a run that nobody watches.
        """
        path = self.directory / RECORDS
        if self._behind and self._identity is not None:
            try:
                self._restore()
            except OSError as error:
                warnings.warn(f"audits are missing in the log {plain(path)}: {first_line(error)}", stacklevel=3)
        if path in self._made and self._identity is not None and identity_of(path) == self._identity:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                if not path.stat().st_size and list(self.directory.iterdir()) == [path]:
                    path.unlink()
                    for folder in self._made[1:]:
                        folder.rmdir()
        self._lock = self._identity = None

    @property
    def records(self) -> StoredRecords:
        """The records so far, by step, then by creation."""
        return self._records.by_step()

    def contains(self, key: RecordKey) -> bool:
        """Is an audit of this step, policy, reference, probe set and kind (:attr:`AuditRecord.key`) in the log already?"""
        return key in self._keys

    def append(self, record: AuditRecord) -> bool:
        """Add a record and its alerts, and wait until they are on disk.

        Returns:
            False when the log already holds an audit with the same key; nothing is written then.

        Raises:
            OSError: the disk refuses. The record is of this log all the same, and written with the next one, or when the log is
                closed, if there is room by then.
        """
        if self.contains(record.key):
            return False
        line = record.to_json()
        refused: OSError | None = None  # where something else stops it in between, it is not added
        try:
            self._restore()
            self._append(RECORDS, [line])
        except OSError as error:
            self._behind, refused = True, error
        self._records.append(record, line.encode(), f"the record of step {record.step}")
        self._keys.add(record.key)
        if refused is not None:
            raise refused
        self._append_alerts([alert.model_dump_json() for alert in events_of(record.alerts)])
        return True

    @property
    def untold(self) -> StoredRecords:
        """The record that was added last, where something happened to alerts at it that nobody was told of; else none.

        A process tells of each record right after it has added it, so that of those before all is told. In a log of a version
        that did not note it, that is only unknown of a record that is the first of its kind: it is told once more then.
        """
        with_events = [head.key for head in self._records.heads if events_of(head.alerts)]
        last = self._records.heads[-1].key if with_events else None
        if last is None or with_events[-1] != last or last in self._told or (len(with_events) > 1 and not self._told):
            return StoredRecords()
        return self._records.where(lambda head: head.key == last)

    def note_told(self, record: AuditRecord) -> None:
        """Note that the writers were told what happened to alerts at a record; nothing where nothing did, or it is noted."""
        if record.key in self._told or not events_of(record.alerts):
            return
        self._told.add(record.key)
        self._note(TOLD, _Told(record=record.key), "that alerts were told")

    def go_on(self, step: int) -> None:
        """Training goes on from a step: audits of later ones are of a course that it leaves, until it comes by them again."""
        turns = self._records.turns
        left = tuple(head.key for head in self._records.heads if head.step > step and not turns.is_left(head.key))
        self._turn(Turn(time=_now(), step=step, left=left))

    def come_by(self, step: int, policy_hash: str) -> None:
        """Training is at a step, with these weights: audits of them are of its course, whatever was left before."""
        of_these = [head.key for head in self._records.heads if (head.step, head.policy_hash) == (step, policy_hash)]
        again = tuple(filter(self._records.turns.is_left, of_these))
        if again:
            self._turn(Turn(time=_now(), step=step, again=again))

    def _turn(self, turn: Turn) -> None:
        self._records.turns.add(turn)
        if self._records:
            self._note(COURSE, turn, "where training went back to")

    def append_failure(self, step: int, error_text: str, probe_name: str | None = None) -> None:
        """Note that the audit of this step broke, on which probe set, and how."""
        # A traceback may hold undecodable bytes of file names, which are no valid UTF-8.
        error_text = error_text.encode(errors="backslashreplace").decode()
        failure = Failure(step=step, time=_now(), error=error_text, probe_name=probe_name)
        self._restore()
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
        self._hold()
        _sync_directory(self.directory)
        self._records, self._keys, self._told = StoredRecords(), set(), set()
        return aside

    def step_dir(self, step: int) -> Path:
        """The folder for what is large of one step, made when absent."""
        path = step_path(self.directory, step)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def save_arrays(self, step: int, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """Write arrays to ``step-<N>/<name>.safetensors``, atomically; an earlier file of that name is replaced."""
        import numpy
        from safetensors.numpy import save

        path = arrays_path(self.step_dir(step), name)
        # order="C" and not ascontiguousarray, which makes 0-d arrays 1-d.
        data = save({key: numpy.asarray(value, order="C") for key, value in arrays.items()})
        write_atomically(path, data)
        return path

    def load_arrays(self, step: int, name: str) -> dict[str, np.ndarray]:
        """What :meth:`save_arrays` wrote: see :func:`load_arrays`."""
        return load_arrays(self.directory, step, name)

    def save_texts(self, record: AuditRecord, texts: PairTexts) -> Path:
        """Write what changed in text at an audit to ``step-<N>/texts.json``, or ``texts-<probe name>.json``, as
        :meth:`save_arrays` writes."""
        path = texts_path(self.step_dir(record.step), record.provenance.probe_name)
        write_atomically(path, texts.beside(record).to_json().encode())
        return path

    def _append(self, name: str, lines: Sequence[str]) -> None:
        if not lines:
            return
        append_whole(self.directory / name, "".join(line + "\n" for line in lines).encode())

    def _note(self, name: str, line: BaseModel, what: str) -> None:
        """Append what no audit is lost without: the worst that follows is that somebody is told twice, or shown too much."""
        try:
            self._append(name, [line.model_dump_json()])
        except OSError as error:
            path = plain(self.directory / name)
            warnings.warn(f"{what} could not be noted in {path}: {first_line(error)}", stacklevel=4)

    def _append_alerts(self, lines: Sequence[str]) -> None:
        try:
            self._append(ALERTS, lines)
        except OSError as error:  # the records hold them, and the next opening adds what is missing
            path = plain(self.directory / ALERTS)
            warnings.warn(f"alerts could not be copied to {path}: {first_line(error)}", stacklevel=4)

    def _hold(self) -> None:
        """Lock the log against other processes, and remember which file it is."""
        held = lock(self.directory / RECORDS)
        self._lock, self._identity = held, held.identity

    def _restore(self) -> None:
        """Where the log is no longer the file that this run wrote (its folder was deleted, or a link in its path now leads
        elsewhere), or the disk has refused records before, write those that are missing to the one that is there now."""
        path = self.directory / RECORDS
        same_file = identity_of(path) == self._identity
        if same_file and not self._behind:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BlockingIOError):  # a run that is under way loses no audit to a lock
            self._lock = lock(path)
        present: set[RecordKey] = set()
        with contextlib.suppress(RecordError):
            present = {head.key for head in read_records(path).heads}
        missing = self._records.where(lambda head: head.key not in present)
        self._append(RECORDS, [line.decode().rstrip() for _, line in missing.lines])
        self._append_alerts([alert.model_dump_json() for alert in missing.alerts])
        told = [head.key for head in missing.heads if head.key in self._told]
        self._append(TOLD, [_Told(record=key).model_dump_json() for key in told])
        if not (self.directory / COURSE).exists():
            self._append(COURSE, [turn.model_dump_json() for turn in self._records.turns])
        _sync_directory(self.directory)
        self._identity, self._behind = identity_of(path), False
        if missing and same_file:
            warnings.warn(
                f"{counted(len(missing), 'audit')} that the disk had refused {'is' if len(missing) == 1 else 'are'} in "
                f"{plain(path)} now",
                stacklevel=4,
            )
        elif missing:
            warnings.warn(
                f"the audit log {plain(path)} was deleted or replaced while the run went on, and has got back its "
                f"{counted(len(missing), 'record')} (failures and arrays of earlier audits were not written again: they are "
                "where the log was, if anywhere)",
                stacklevel=4,
            )


def look_into_log(output_dir: str | Path) -> StoredRecords:
    """The records that :class:`RunLog` would find if it was opened here now. Nothing on disk is changed, or made.

    Raises:
        ConfigurationError, RecordError: opening it would raise this.
    """
    directory = Path(os.path.abspath(output_dir)) / FOLDER
    with _refusals(directory):
        try_to_write(next(path for path in (directory, *directory.parents) if path.exists()))
        if is_held_elsewhere(directory / RECORDS):
            raise BlockingIOError
    return read_records(directory / RECORDS)


def _remove_leftovers(directory: Path) -> None:
    """Clear what killed processes left: files never finished, and a move to ``previous-<n>`` that broke off."""
    for folder in (directory, *directory.glob("step-*")):
        remove_abandoned(folder)
    for aside in directory.glob("previous-*"):
        # The records are moved last: without them the move broke off, and its arrays belong to the records here.
        if is_folder_here(aside) and not (aside / RECORDS).exists():
            for path in list(aside.iterdir()):
                if not (directory / path.name).exists():
                    path.rename(directory / path.name)


def _missing_alerts(directory: Path, records: StoredRecords) -> list[str]:
    """Lines of the alerts that records hold and their own file does not."""
    logged = Counter(alert.model_dump_json() for alert in read_lines(directory / ALERTS, Alert))
    missing = []
    for line in (alert.model_dump_json() for alert in records.alerts):
        if logged[line]:
            logged[line] -= 1
        else:
            missing.append(line)
    return missing


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def by_step(record: AuditRecord) -> tuple[int, str]:
    """The order of a run's records: by step, then by creation."""
    return record.step, record.provenance.created


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    """Why a log cannot be opened, in words.

    Raises:
        ConfigurationError: the operating system refused something inside.
    """
    try:
        yield
    except BlockingIOError as error:
        raise ConfigurationError(
            f"another process that is still running writes the audit log in {plain(directory)}; one log is one "
            "run. Choose another output_dir (--output), or stop that process first (a training with the callback, align-audit "
            "run or watch)."
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the audit log in {plain(directory)}: {first_line(error)}. Expected a folder that this "
            "process may write to; choose another output_dir, or free the path, its permissions or disk space."
        ) from error


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and its entries need no flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
