"""The latest healthy audit of a run: what there is to go back to, or to go on with. Every screen says it by this."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from align_audit.errors import plain
from align_audit.record.course import present_course
from align_audit.record.probe_sets_in_use import sets_in_use
from align_audit.record.run import AuditRun
from align_audit.record.status import AuditsSoFar
from align_audit.record.stored_records import heads_of
from align_audit.record.training_log import last_until


@dataclass(frozen=True)
class LatestHealthy:
    """The newest audit at which a run was HEALTHY: of those whose checkpoint exists, where there is one.

    Attributes:
        step: of it; None: no audit was healthy.
        checkpoint: the name of its checkpoint; None: none exists, or it is not known where they are.
        listed: whether it is known which checkpoints exist.
    """

    step: int | None
    checkpoint: str | None = None
    listed: bool = True

    def __str__(self) -> str:
        """``checkpoint-60``, or what there is in its place."""
        if self.checkpoint is not None:
            return plain(self.checkpoint)
        if self.step is None:
            return "none of the audits"
        if self.step == 0:
            return "step 0, the model that training started from"
        return f"step {self.step}" + (" (no checkpoint of it was kept)" if self.listed else "")

    def as_json(self) -> dict[str, int | str | None]:
        """Plain JSON values: ``step`` and ``checkpoint``."""
        return {"step": self.step, "checkpoint": self.checkpoint}


def latest_healthy(run: AuditRun, checkpoints: Mapping[int, str] | None = None) -> LatestHealthy:
    """The latest healthy audit of a run; of several probe sets, one at which all that were in use then were healthy.

    A set is in use from its first audit on, and for good, but where the run was resumed without it
    (:func:`~align_audit.record.probe_sets_in_use.sets_in_use`).

    Args:
        checkpoints: step → name, of those that exist; None: those in the run's folder that are of its course, and where there
            are none it is not known whether there are any elsewhere.
    """
    existing = run.checkpoints if checkpoints is None else checkpoints
    listed = checkpoints is not None or bool(existing)
    heads = heads_of(present_course(run.records))
    used, audited = sets_in_use(heads, run.failures), {head.step for head in heads}
    courses = [_Course(run.select(name), is_used=name in used) for name in run.probe_names]
    for step in sorted(audited, key=lambda step: (step not in existing, -step)):
        if all(step in course.clean and course.intact(step) for course in courses if course.in_use(step)):
            return LatestHealthy(step, existing.get(step), listed)
    return LatestHealthy(None, None, listed)


class _Course:
    """The audits of one probe set on the course that its run is on. Stored records are parsed one by one, as they are needed.

    Args:
        run: with the audits of this set alone, and what broke of it.
        is_used: whether the run is audited on it to this day.

    Attributes:
        clean: steps that were healthy, whatever the identity control of the last full audit said.
    """

    def __init__(self, run: AuditRun, *, is_used: bool) -> None:
        self._records = present_course(run.records)
        self._heads = heads_of(self._records)
        self._is_used = is_used
        self.clean: set[int] = set()
        so_far = AuditsSoFar()
        for place, head in enumerate(self._heads):
            so_far.add(head)
            if place + 1 < len(self._heads) and self._heads[place + 1].step == head.step:
                continue
            row = last_until(run.training_log, head.step)
            if so_far.status(None, [], None if row is None else row.step).word == "HEALTHY":
                self.clean.add(head.step)
        # Failures, and silence, since the last audit; but a set that is used no more is silent as it should be.
        if self._heads and is_used and run.status.word != "HEALTHY":
            self.clean.discard(self._heads[-1].step)

    def in_use(self, step: int) -> bool:
        """Whether this set was audited around a step, or should have been."""
        return bool(self._heads) and self._heads[0].step <= step and (self._is_used or step <= self._heads[-1].step)

    def intact(self, step: int) -> bool:
        """Whether the measurement itself was in order: the identity control of the last full audit by then had not failed."""
        end = bisect_right(self._heads, step, key=lambda head: head.step)
        full = next((place for place in reversed(range(end)) if self._heads[place].kind == "full"), None)
        return full is None or self._records[full].controls.identity.verdict != "failed"
