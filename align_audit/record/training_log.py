"""What the trainer logs, kept beside the records: one line a log, append-only.

``<output_dir>/align_audit/training.jsonl`` holds lines of ``{"step": 20, "logs": {"loss": 0.61, "grad_norm": "NaN"}}``. Numbers
that JSON does not know are words, as in records. What is no number (the trainer logs none) is left out.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align_audit.files import append_whole, wait_until_on_disk
from align_audit.record.lines import parsed, read_lines, repair
from align_audit.record.log import FOLDER
from align_audit.record.numbers import json_number

TRAINING = "training.jsonl"

_REWARDS = "rewards/"
"""In the names of what TRL logs of rewards, in training and in evaluations."""
_EVALUATED = ("eval_", "test_")
"""What names of evaluations begin with."""
_SUMMARY = "train_"
"""What names of the summary of a training begin with."""
_IN_EVERY_ROW = frozenset({"epoch", "num_input_tokens_seen", "total_flos"})
"""What the trainer says of how far it has come, whatever a row is of."""


@dataclass(frozen=True, slots=True)
class LogRow:
    """What was logged at one step: by name, losses in nats, rewards in TRL's unit."""

    step: int
    logs: Mapping[str, float]


class _Line(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True)

    step: int
    logs: dict[str, float]


class TrainingLog:
    """The trainer's log of one run, open for appending.

    Opening repairs a line that a kill left torn, and reads what is there. A run that was resumed from a checkpoint leaves the
    rows of the course that it abandoned in the file; :attr:`rows` has those of the course it is on.

    Args:
        directory: the training's output directory; the file lies in its ``align_audit`` folder, made when absent.
        implicit_rewards: what is logged as rewards is β times log-probability ratios to the reference. Where it is something
            else, as odds or the scores of a judge, it is kept, and no rule reads it.

    Raises:
        OSError: the folder cannot be made or written to.
        RecordError: the file cannot be read.
    """

    def __init__(self, directory: str | Path, *, implicit_rewards: bool = True) -> None:
        # Absolute now: the working directory may change while the run goes on.
        self.path = Path(os.path.abspath(directory)) / FOLDER / TRAINING
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repair(self.path)
        self._rows = read_training_log(self.path)
        self._judged = self._rows if implicit_rewards else list(map(_without_rewards, self._rows))
        self._on_disk = True

    @property
    def rows(self) -> list[LogRow]:
        """By step; not a copy."""
        return self._rows

    @property
    def judged(self) -> list[LogRow]:
        """The same as rules read them; not a copy."""
        return self._judged

    def go_on(self, step: int) -> None:
        """Training goes on from a step: rows of later ones are of a course that it has left. The file keeps them, and says so.

        A disk that refuses that is borne: the next row says it, too.
        """
        if not self._rows or self._rows[-1].step <= step:
            return
        for rows in (self._rows, self._judged):
            del rows[len(up_to(rows, step)) :]
        with contextlib.suppress(OSError):
            self._write(LogRow(step, {}))

    def append(self, step: int, logs: Mapping[str, object]) -> LogRow | None:
        """Add what was logged at a step. The operating system has it then; :meth:`sync` waits for the disk.

        A step of a fast training takes less time than a disk does.

        Returns:
            The row; None, with nothing written, where the log has no number in it.

        Raises:
            OSError: the disk refuses. The row is among :attr:`rows` all the same.
        """
        kept = {name: number for name, value in logs.items() if (number := _number(value)) is not None}
        if not kept:
            return None
        row = LogRow(step, kept)
        follow(self._rows, row)
        if self._judged is not self._rows:
            follow(self._judged, _without_rewards(row))
        self._write(row)
        return row

    def _write(self, row: LogRow) -> None:
        line = json.dumps({"step": row.step, "logs": {name: json_number(number) for name, number in row.logs.items()}})
        append_whole(self.path, f"{line}\n".encode(), wait=False)
        self._on_disk = False

    def sync(self) -> None:
        """Wait until all rows are on disk, those of an audit with its record.

        Raises:
            OSError: the disk refuses, or the file is gone.
        """
        if not self._on_disk:
            wait_until_on_disk(self.path)
            self._on_disk = True


def read_training_log(path: Path) -> list[LogRow]:
    """The rows of a file, by step: of the course that the run is on. An absent file is an empty log.

    A line that cannot be read is left out, with a warning, and so is a last one that is torn.

    Raises:
        RecordError: the file cannot be read at all.
    """
    return course_of(LogRow(line.step, line.logs) for line in read_lines(path, _Line))


def rows_of(lines: Iterable[bytes]) -> list[LogRow]:
    """What lines of a file say, in their order; one that cannot be read is left out."""
    return [LogRow(line.step, line.logs) for line in parsed(lines, _Line)]


def course_of(rows: Iterable[LogRow]) -> list[LogRow]:
    """Rows in the order they were written, without those that a run abandoned when it was resumed from an earlier step.

    Example:
        >>> rows = [LogRow(1, {"loss": 0.7}), LogRow(2, {"loss": 0.6}), LogRow(3, {"loss": 0.5}), LogRow(2, {"loss": 0.6})]
        >>> [row.step for row in course_of(rows)]
        [1, 2]
    """
    course: list[LogRow] = []
    for row in rows:
        follow(course, row)
    return course


def up_to(rows: Sequence[LogRow], step: int) -> Sequence[LogRow]:
    """The rows of a course until a step, that of the step with them."""
    end = bisect_right(rows, step, key=lambda row: row.step)
    return rows if end == len(rows) else rows[:end]


def last_until(rows: Sequence[LogRow], step: int) -> LogRow | None:
    """The last row of a course up to a step; None: there is none."""
    end = bisect_right(rows, step, key=lambda row: row.step)
    return rows[end - 1] if end else None


def follow(course: list[LogRow], row: LogRow) -> None:
    """Add a row; what it was made again of goes, and so does all of later steps. One without logs only says where training went
    on from."""
    while course and course[-1].step > row.step:
        course.pop()
    if not row.logs:
        return
    begin = len(course)
    while begin and course[begin - 1].step == row.step:
        begin -= 1
    again = _names_of_its_kind(row)
    course[begin:] = [each for each in course[begin:] if not again & _names_of_its_kind(each)]
    course.append(row)


def _names_of_its_kind(row: LogRow) -> set[str]:
    """Names by which a row is told to be another of a kind: training, evaluations and the summary at the end log at one step.

    The trainer adds some names to rows of every kind, and with ``include_num_input_tokens_seen`` those of its summary's speed
    (``train_…``) to rows of training.
    """
    evaluated = {name for name in row.logs if name.startswith(_EVALUATED)}
    training = {name for name in row.logs if not name.startswith((*_EVALUATED, _SUMMARY))} - _IN_EVERY_ROW
    if evaluated and "loss" not in row.logs:
        return evaluated  # what else it holds somebody adds to every row
    return evaluated | training or set(row.logs) - _IN_EVERY_ROW


def _without_rewards(row: LogRow) -> LogRow:
    return LogRow(row.step, {name: value for name, value in row.logs.items() if _REWARDS not in name})


def _number(value: object) -> float | None:
    """As a float; None: not a number (``True`` is none)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None
