"""Where a run went back to an earlier step: which audits are of a course that it left, and which of them it came by again.

``<output_dir>/align_audit/course.jsonl`` has a line for each training that went on with the run, and for each audit of a course
that was left which training comes by again with the same weights. Audits alone do not say it: one that was made before the run
went back may be of an earlier step than the first that is made after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict

from align_audit.record.audit_record import RecordKey

COURSE = "course.jsonl"


class Turn(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True)

    time: str
    """ISO 8601, UTC, as records are dated."""
    step: int
    """The one that training went on from; or that of the audits it came by."""
    left: tuple[RecordKey, ...] = ()
    """Audits that are of the course that was left."""
    again: tuple[RecordKey, ...] = ()
    """Audits of it that training came by again: they are of the course that the run is on."""


class Turns:
    """The turns of a run, in their order. Whoever reads the records of a run that goes on sees those that come later, too."""

    def __init__(self, turns: Iterable[Turn] = ()) -> None:
        self.clear()
        for turn in turns:
            self.add(turn)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._turns)

    def add(self, turn: Turn) -> None:
        """The next one."""
        self._turns.append(turn)
        self._left.update(turn.left)
        self._left.difference_update(turn.again)
        self._again |= dict.fromkeys(turn.again, turn.time)

    def clear(self) -> None:
        """The run begins anew."""
        self._turns: list[Turn] = []
        self._left: set[RecordKey] = set()
        self._again: dict[RecordKey, str] = {}

    def is_left(self, key: RecordKey) -> bool:
        """Is an audit of a course that the run has left?"""
        return key in self._left

    def made(self, key: RecordKey, created: str) -> str:
        """When training was at an audit, the last time: when it was created, or it came by it again."""
        return max(created, self._again.get(key, created))

    def until_left(self, key: RecordKey) -> Turns:
        """Those that had happened when an audit was made that has been left since."""
        last = max((place for place, turn in enumerate(self._turns) if key in turn.left), default=len(self._turns))
        return Turns(self._turns[:last])

    @property
    def went_back(self) -> list[tuple[int, str]]:
        """(step, time) of each time that training went on from a step."""
        return [(turn.step, turn.time) for turn in self._turns if not turn.again]
