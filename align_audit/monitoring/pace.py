"""How a run's time is spent, and what the schedule makes of it: the clocks of :mod:`align_audit.monitoring.schedule`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from align_audit.config import AuditConfig
from align_audit.monitoring.schedule import Due, Spent, Training, affords_full, look_after
from align_audit.record.audit_record import IN_TRAINING, AuditKind, AuditRecord, Occasion


class Pace:
    """The clocks of one training, on the process that writes; the others are told what it decides.

    Args:
        step: at which training begins, or goes on.
        pairs_per_step: that the trainer makes an optimizer step of, over all processes; None: not known.
        clock: seconds, for tests.

    Attributes:
        next_look: the step of the next health audit; None: there will be none.
    """

    def __init__(
        self,
        config: AuditConfig,
        step: int,
        *,
        pairs_per_step: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._first_step = step
        self._pairs_per_step = pairs_per_step
        self._clock = clock
        self._began = clock()
        self._spent = Spent()
        self._counted = 0.0
        """Seconds of the audits of this moment that are in ``_spent`` already."""
        self.next_look: int | None = None

    def begin(self, training: Training) -> None:
        """Training begins now: what was done before it counts as nothing."""
        self._began, self._spent = self._clock(), replace(self._spent, audits=0.0, looks=0.0)
        self.plan(training)

    def plan(self, training: Training) -> int | None:
        """The step of the next look after this one, as the time spent so far allows it."""
        self.next_look = look_after(self.spent(training), training, self._config.schedule, self._config.budget)
        return self.next_look

    def spent(self, training: Training) -> Spent:
        """Where the time went up to this step."""
        passed = self._clock() - self._began
        steps = training.step - self._first_step
        return replace(self._spent, steps=steps, training=max(0.0, passed - self._spent.audits))

    def choose(self, due: Due, training: Training) -> Due:
        """The same, or a health audit where the budget has no room for a full one."""
        if (
            due.kind == "health"
            or not due.budgeted
            or affords_full(self.spent(training), training, self._config.schedule, self._config.budget)
        ):
            return due
        budget, cost = self._config.budget, self.spent(training).expected_full
        assert budget is not None
        takes = "" if cost is None else f" takes about {cost:.0f} s and"
        yet = "" if training.is_last else " yet"
        reason = f"{due.reason}; a full audit{takes} does not fit the budget of {budget:.1%} of the run{yet}"
        return replace(due, kind="health", reason=reason, unaffordable=cost)

    def occasion(
        self, record: AuditRecord, reason: str, training: Training, unaffordable: float | None = None
    ) -> Occasion:
        """What the record of an audit that was just made says of it. The next look is planned as far as it can be told by
        then: once the moment's time is booked (:meth:`timed`), whoever audits plans it again."""
        self._counted += record.cost.seconds
        self._spend(record.kind, record.cost.seconds, self._counted, record.provenance.num_layers)
        spent = self.spent(training)
        pairs = None if self._pairs_per_step is None else spent.steps * self._pairs_per_step
        return Occasion(
            reason=reason,
            next_step=self.plan(training),
            share_spent=spent.share,
            unaffordable_seconds=unaffordable,
            training_pair_seconds=spent.training / pairs if pairs else None,
        )

    def priced(self, record: AuditRecord, occasion: Occasion, training: Training) -> AuditRecord:
        """The record with its ``occasion``, and with what it cost in training pairs and as a share of the run so far."""
        pair, spent = occasion.training_pair_seconds, self.spent(training)
        changes: dict[str, Any] = {"occasion": occasion}
        if pair and spent.share is not None:
            seconds = record.cost.seconds
            prices = {"training_pairs": seconds / pair, "share_of_run": seconds / (spent.audits + spent.training)}
            changes["cost"] = record.cost.model_copy(update=prices)
            changes["reasons"] = {path: why for path, why in record.reasons.items() if path not in IN_TRAINING}
        return record.model_copy(update=changes)

    @contextlib.contextmanager
    def timed(self, kind: AuditKind) -> Iterator[None]:
        """Around all that is done at one moment, on all probe sets: also what their records cannot know, as writing them."""
        began, self._counted = self._clock(), 0.0
        try:
            yield
        finally:
            whole = self._clock() - began
            self._spend(kind, whole - self._counted, whole if self._counted else None)

    def _spend(self, kind: AuditKind, more: float, in_all: float | None, layers: int | None = None) -> None:
        looks = self._spent.looks + (more if kind == "health" else 0.0)
        spent = replace(self._spent, audits=self._spent.audits + more, looks=looks, layers=layers or self._spent.layers)
        if in_all is not None:
            spent = replace(spent, health=in_all) if kind == "health" else replace(spent, full=in_all)
        self._spent = spent
