"""What a schedule will do in a run, and what that costs: the schedule's own decisions, played through without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from align_audit.config import AuditConfig
from align_audit.monitoring.schedule import Due, Event, Spent, Training, afforded, decide, look_after
from align_audit.record.audit_record import AuditKind


@dataclass(frozen=True)
class Costs:
    """Wall-clock seconds.

    Attributes:
        step: of an optimizer step.
        health, full: of an audit on all probe sets.
    """

    step: float
    health: float
    full: float

    def of(self, kind: AuditKind) -> float:
        """Of an audit of this kind."""
        return self.health if kind == "health" else self.full


@dataclass(frozen=True)
class PlannedSteps:
    """A run that was not begun.

    Attributes:
        max_steps: optimizer steps in all.
        save_steps, eval_steps: a checkpoint, an evaluation every so many, and at the end; None: never.
    """

    max_steps: int
    save_steps: int | None = None
    eval_steps: int | None = None


@dataclass(frozen=True)
class Forecast:
    """The audits of a run that stays healthy.

    Attributes:
        audits: step and kind, in order.
        audit_seconds, training_seconds: wall-clock time in all.
        left_out: steps of the checkpoints that the budget has no room to look at.
    """

    audits: tuple[tuple[int, AuditKind], ...]
    audit_seconds: float
    training_seconds: float
    left_out: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Of the run's wall-clock time that goes into audits, in [0, 1]."""
        return self.audit_seconds / (self.audit_seconds + self.training_seconds)

    @property
    def first_look(self) -> int | None:
        """The first step at which the trained policy is audited; None: it never is."""
        return next((step for step, _ in self.audits if step > 0), None)

    def count(self, kind: AuditKind) -> int:
        """Audits of a kind."""
        return Counter(made for _, made in self.audits)[kind]


def forecast(
    config: AuditConfig, planned: PlannedSteps, costs: Costs, layers: int = 0, per_look: float | None = None
) -> Forecast:
    """Play a run through: what is audited when, and what it takes.

    Alerts, which call for more, are not foreseen.

    Args:
        layers: of the model, by which the first full audit is judged before it was made where nothing better is known.
        per_look: how many times a look's work that of a full audit is, by which a run judges it; None: not counted.

    Raises:
        ValueError: no steps, or a step that takes no time.

    Example:
        >>> run = forecast(AuditConfig(), PlannedSteps(1000, save_steps=500), Costs(step=1.0, health=1.0, full=20.0))
        >>> run.first_look, run.share < 0.06
        (5, True)
    """
    if planned.max_steps < 1 or costs.step <= 0:
        raise ValueError(f"expected steps that take time; found {planned.max_steps} of {costs.step} s")
    run = _Played(config, planned, costs, Spent(layers=layers, per_look=per_look))
    for event, training in _events(planned):
        run.meet(event, training)
    return Forecast(tuple(run.audits), run.spent.audits, planned.max_steps * costs.step, tuple(run.left_out))


def _events(planned: PlannedSteps) -> Iterator[tuple[Event, Training]]:
    """As transformers' Trainer fires them."""
    yield Event.TRAIN_BEGIN, Training(0, planned.max_steps)
    for step in range(1, planned.max_steps + 1):
        saving, evaluating = (
            every is not None and every > 0 and (step % every == 0 or step == planned.max_steps)
            for every in (planned.save_steps, planned.eval_steps)
        )
        training = Training(step, planned.max_steps, saving=saving)
        yield Event.STEP_END, replace(training, evaluating=evaluating)
        if evaluating:
            yield Event.EVALUATE, training
        if saving:
            yield Event.SAVE, training
    yield Event.EPOCH_END, Training(planned.max_steps, planned.max_steps, stopping=True)
    yield Event.TRAIN_END, Training(planned.max_steps, planned.max_steps)


class _Played:
    """A run, as far as it was played."""

    def __init__(self, config: AuditConfig, planned: PlannedSteps, costs: Costs, spent: Spent) -> None:
        self._config = config
        self._costs = costs
        self._pending: Due | None = None
        self.spent = spent
        self.audits: list[tuple[int, AuditKind]] = []
        self.left_out: list[int] = []
        self._next = self._plan(Training(0, planned.max_steps))

    def meet(self, event: Event, training: Training) -> None:
        """Let the schedule decide at an event, and book what it takes."""
        self.spent = replace(self.spent, steps=training.step, training=training.step * self._costs.step)
        audited_at = self.audits[-1][0] if self.audits else 0
        due = decide(event, training, self._config.schedule, self._pending, self._next, audited_at)
        if due is None:
            return
        self._pending = due if due.later else None
        if due.later:
            return
        kind = afforded(due, self.spent, training, self._config.schedule, self._config.budget)
        if kind is None:
            self.left_out.append(training.step)
        else:
            self._book(kind, training)

    def _book(self, kind: AuditKind, training: Training) -> None:
        if any(step == training.step and made in (kind, "full") for step, made in self.audits[-2:]):
            return  # these weights were audited so
        seconds = self._costs.of(kind)
        spent = replace(self.spent, audits=self.spent.audits + seconds)
        if kind == "health":
            self.spent = replace(spent, looks=spent.looks + seconds, health=seconds)
        else:
            self.spent = replace(spent, full=seconds)
        self.audits.append((training.step, kind))
        self._next = self._plan(training)

    def _plan(self, training: Training) -> int | None:
        return look_after(self.spent, training, self._config.schedule, self._config.budget)
