"""How a run's time is spent, and what the schedule makes of it: the clocks of :mod:`align_audit.monitoring.schedule`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from align_audit.config import AuditConfig
from align_audit.monitoring.schedule import Due, Event, Spent, Training, afforded, affords_escalation, look_after
from align_audit.record.audit_record import UNCOUNTED_PAIRS, AuditKind, AuditRecord, Occasion


class Pace:
    """The clocks of one training, on the process that writes; the others are told what it decides.

    Args:
        step: at which training begins, or goes on.
        pairs_per_step: that the trainer makes an optimizer step of, over all processes; None: not known.
        clock: seconds, for tests.

    Attributes:
        next_look: the step of the next health audit; None: there will be none.
        audited_at: the step of the newest audit that was begun; −1: none was.
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
        self._moment: float | None = None
        """When the audits began that are being made; None: none are."""
        self._counted: dict[AuditKind, float] = {}
        """Seconds of the audits of this moment that are in ``_spent`` already, by the kind of each."""
        self._heard = 0.0
        """Seconds without audits up to the trainer's last event."""
        self._aside = 0.0
        """Of the seconds without audits, those in which the trainer evaluated and saved."""
        self.next_look: int | None = None
        self.audited_at = -1
        self._seen_at = -1
        """The step of the newest audit that came through; −1: none did."""

    def begin(self, training: Training) -> None:
        """Training begins now: what was done before it counts as nothing."""
        self._began, self._spent = self._clock(), replace(self._spent, audits=0.0, looks=0.0)
        self._heard = self._aside = 0.0
        self.plan(training)

    def hear(self, event: Event) -> None:
        """The trainer is at an event: what passed since the last one was an evaluation, where this is the end of one, or the
        saving of a checkpoint, and else steps."""
        elapsed = self._without_audits()
        if event in (Event.EVALUATE, Event.SAVE):
            self._aside += elapsed - self._heard
        self._heard = elapsed

    def plan(self, training: Training) -> int | None:
        """The step of the next look after this one, as the time spent so far allows it."""
        config, audited = self._config, self._seen_at == training.step
        self.next_look = look_after(self.spent(training), training, config.schedule, config.budget, audited=audited)
        return self.next_look

    def see(self, step: int) -> None:
        """There is an audit of this step, so that it may stand in the place of a look shortly after it."""
        self._seen_at = step

    def spent(self, training: Training) -> Spent:
        """Where the time went up to this step."""
        return replace(self._spent, steps=training.step - self._first_step, training=self._without_audits())

    def _without_audits(self) -> float:
        """Seconds since training began, up to the audits that are being made, where some are, and without any."""
        if self._moment is None:
            return max(0.0, self._clock() - self._began - self._spent.audits)
        return max(0.0, self._moment - self._began - (self._spent.audits - sum(self._counted.values())))

    @property
    def guesses(self) -> bool:
        """Whether what a full audit takes is still judged by what a look took."""
        return self._spent.full is None

    @property
    def looked(self) -> bool:
        """Whether this process has made a look."""
        return self._spent.looks > 0.0 or self._spent.health is not None

    def expect_full(self, per_look: float | None) -> None:
        """Judge a full audit by how many times the work of the look that is made now its work is; None: not counted."""
        self._spent = replace(self._spent, per_look=per_look)

    def choose(self, due: Due, training: Training) -> Due | None:
        """The same, or a health audit where the budget has no room for a full one; None: nothing, where it has room for
        neither and this may be left out."""
        spent, budget = self.spent(training), self._config.budget
        kind = afforded(due, spent, training, self._config.schedule, budget)
        if kind is None or kind == due.kind:
            return None if kind is None else due
        assert budget is not None
        cost = spent.expected_full
        takes = "" if cost is None else f" takes about {cost:.0f} s and"
        yet = "" if training.is_last else " yet"
        reason = f"{due.reason}; a full audit{takes} does not fit the budget of {budget:.1%} of the run{yet}"
        return replace(due, kind=kind, reason=reason, unaffordable=cost)

    def escalates(self, training: Training) -> bool:
        """Whether a warning is worth a full audit at this step."""
        config = self._config
        return affords_escalation(self.spent(training), training, config.schedule, config.budget)

    def occasion(
        self, record: AuditRecord, reason: str, training: Training, unaffordable: float | None = None
    ) -> Occasion:
        """What the record of an audit that was just made says of it. The next look is planned as far as it can be told by
        then: once the moment's time is booked (:meth:`timed`), whoever audits plans it again."""
        self.see(training.step)
        self._counted[record.kind] = self._counted.get(record.kind, 0.0) + record.cost.seconds
        self._spend(record.kind, record.cost.seconds, self._counted[record.kind], record.provenance.num_layers)
        spent = self.spent(training)
        pairs = None if self._pairs_per_step is None else spent.steps * self._pairs_per_step
        stepping = max(0.0, spent.training - self._aside)
        return Occasion(
            reason=reason,
            next_step=self.plan(training),
            share_spent=spent.share,
            unaffordable_seconds=unaffordable,
            training_pair_seconds=stepping / pairs if pairs and stepping else None,
        )

    def priced(self, record: AuditRecord, occasion: Occasion, training: Training) -> AuditRecord:
        """The record with its ``occasion``, and with what it cost in training pairs and as a share of the run so far, each
        where that is known; else with the reason."""
        pair, spent, seconds = occasion.training_pair_seconds, self.spent(training), record.cost.seconds
        prices = {
            "training_pairs": None if pair is None else seconds / pair,
            "share_of_run": None if spent.share is None else seconds / (spent.audits + spent.training),
        }
        reasons = dict(record.reasons)
        for name, price in prices.items():
            if price is not None:
                reasons.pop(f"cost.{name}", None)
            elif spent.share is not None:
                reasons[f"cost.{name}"] = UNCOUNTED_PAIRS
        cost = record.cost.model_copy(update=prices)
        return record.model_copy(update={"occasion": occasion, "cost": cost, "reasons": reasons})

    @contextlib.contextmanager
    def timed(self, kind: AuditKind) -> Iterator[None]:
        """Around all that is done at one moment, on all probe sets: also what their records cannot know, as writing them."""
        began = self._moment = self._clock()
        self._counted = {}
        try:
            yield
        finally:
            elapsed, self._moment = self._clock() - began, None
            # A full audit that broke, and the look in its place, say nothing of what a full one takes.
            self._spend(kind, elapsed - sum(self._counted.values()), elapsed if set(self._counted) == {kind} else None)

    def _spend(self, kind: AuditKind, more: float, in_all: float | None, layers: int | None = None) -> None:
        looks = self._spent.looks + (more if kind == "health" else 0.0)
        spent = replace(self._spent, audits=self._spent.audits + more, looks=looks, layers=layers or self._spent.layers)
        if in_all is not None:
            spent = replace(spent, health=in_all) if kind == "health" else replace(spent, full=in_all)
        self._spent = spent
