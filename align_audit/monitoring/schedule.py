"""When to audit during training, and how much: pure decisions from an event and what stands of training at it.

Order of events, as transformers' Trainer fires them: ``step_end`` → ``log`` → ``evaluate`` → ``save``; TRL's reference
synchronization runs in its own ``on_step_end``, after ours. So an audit due on a synchronization step waits for the next
event, and one due on a step that is evaluated or saved waits for the event that may ask for more, the later one where both
do. On the last step it waits for what is logged and evaluated of it, up to the end of its epoch, since no later audit is judged
by that. The trainer's TensorBoard writer is closed before our ``train_end``, so the last step is audited before that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from align_audit.options.schedule import ScheduleConfig
from align_audit.record.audit_record import AuditKind


class Event(Enum):
    """The trainer's events at which an audit may be made."""

    TRAIN_BEGIN = "train_begin"
    STEP_BEGIN = "step_begin"
    STEP_END = "step_end"
    EVALUATE = "evaluate"
    SAVE = "save"
    EPOCH_END = "epoch_end"
    TRAIN_END = "train_end"


@dataclass(frozen=True)
class Due:
    """An audit that is asked for.

    Attributes:
        kind: how much of it.
        reason: what asks, in words.
        budgeted: a full one is made only where the budget allows it, and is a health audit elsewhere.
        optional: left out where the budget has no room even for a health audit.
        later: it has to wait for the next event.
        unaffordable: seconds that a full audit was expected to take, in whose place this one is made; None: in none's.
    """

    kind: AuditKind
    reason: str
    budgeted: bool = False
    optional: bool = False
    later: bool = False
    unaffordable: float | None = None

    def with_pending(self, pending: Due | None) -> Due:
        """What is asked for now, and what was left due before: the larger of both, left out only where both may be."""
        if pending is None:
            return self
        order = {"health": 0, "full": 1}
        larger = max((self, pending), key=lambda due: (order[due.kind], not due.budgeted))
        return replace(larger, optional=self.optional and pending.optional, later=self.later)


@dataclass(frozen=True)
class Training:
    """What stands of training at an event.

    Attributes:
        step: optimizer steps done.
        max_steps: after how many it ends, if nothing stops it.
        stopping: somebody has asked it to stop.
        saving: a checkpoint of this step is about to be saved.
        evaluating: this step is about to be evaluated.
        syncs_reference: the reference is synchronized with the policy at this step, after our own event.
        best_loaded: the best checkpoint was loaded back, so that the weights are not those of this step.
    """

    step: int
    max_steps: int
    stopping: bool = False
    saving: bool = False
    evaluating: bool = False
    syncs_reference: bool = False
    best_loaded: bool = False

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.stopping or self.step >= self.max_steps


def decide(
    event: Event,
    training: Training,
    schedule: ScheduleConfig,
    pending: Due | None = None,
    next_look: int | None = None,
    audited_at: int = 0,
) -> Due | None:
    """What audit an event asks for, now or later; None: none, and what is pending stays so.

    Args:
        pending: what an earlier event left due. The start of training forgets it.
        next_look: the step at which the next health audit is due (see :func:`look_after`).
        audited_at: the step of the newest audit.

    Example:
        >>> decide(Event.SAVE, Training(step=3, max_steps=9), ScheduleConfig(on_save=True))
        Due(kind='full', reason='a checkpoint was saved', budgeted=True, optional=True, later=False, unaffordable=None)
    """
    asked = _asked(event, training, schedule, next_look)
    if event is Event.SAVE and asked is not None and _in_its_place(training, schedule, next_look, audited_at):
        asked = replace(asked, optional=False)
    if event in (Event.TRAIN_BEGIN, Event.TRAIN_END):
        return asked
    waits = _more_to_come(event, training, schedule) or (event is Event.STEP_END and training.syncs_reference)
    due = pending if asked is None else asked.with_pending(pending)
    return None if due is None else replace(due, later=waits)


def _in_its_place(training: Training, schedule: ScheduleConfig, next_look: int | None, audited_at: int) -> bool:
    """Whether a checkpoint comes shortly before the next look, on the second half of the way to it: that one is made here,
    where it says of a checkpoint what became of it. Looks at the start are at the same steps in every run."""
    if not schedule.health or next_look is None or next_look <= _EARLY * schedule.first_health:
        return False
    return training.step - audited_at >= next_look - training.step and training.step >= _NEAR * next_look


_EARLY = 16
"""Times ``first_health``: up to there doublings are made where they are."""
_NEAR = 0.75
"""Of the steps up to a look, those that are done where it may be made early."""


def _more_to_come(event: Event, training: Training, schedule: ScheduleConfig) -> bool:
    """Whether an event of this step that is still to come asks for an audit of the same weights, or has what the last audit is
    to be judged by."""
    save, last = training.saving and schedule.on_save, training.is_last and schedule.on_last_step
    if event is Event.STEP_END and last:
        return True  # The end of the epoch follows in any case.
    if event in (Event.STEP_END, Event.EPOCH_END):
        return save or (training.evaluating and (schedule.on_evaluate or last))
    return event is Event.EVALUATE and save


def _asked(event: Event, training: Training, schedule: ScheduleConfig, next_look: int | None) -> Due | None:
    last = Due("full", "the last step", budgeted=True)
    if event is Event.TRAIN_BEGIN:
        begins = "before training" if training.step == 0 else f"before training goes on from step {training.step}"
        return Due("full", begins, budgeted=True) if schedule.before_training else None
    if event is Event.TRAIN_END:
        return last if schedule.on_last_step and not training.best_loaded else None
    if event is Event.EVALUATE:
        if schedule.on_evaluate:
            return Due("full", "the trainer evaluated")
        # Early stopping stops here, after the epoch's end, and the best checkpoint may be loaded before the training's.
        return last if schedule.on_last_step and training.stopping and training.step < training.max_steps else None
    if event is Event.SAVE:
        return Due("full", "a checkpoint was saved", budgeted=True, optional=True) if schedule.on_save else None
    if event is Event.EPOCH_END:
        return last if schedule.on_last_step and training.stopping else None
    return _asked_by_step(training, schedule, next_look) if event is Event.STEP_END else None


def _asked_by_step(training: Training, schedule: ScheduleConfig, next_look: int | None) -> Due | None:
    every = schedule.every_n_steps
    if every is not None and training.step % every == 0:
        return Due("full", f"every {every} steps" if every > 1 else "every step")
    if schedule.on_last_step and training.is_last:
        return Due("full", "the last step", budgeted=True)
    if schedule.health and next_look is not None and training.step >= next_look:
        return Due("health", f"a look at step {next_look} was planned")
    return None


# -- the budget --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """Where a run's wall-clock time went so far, in seconds.

    Attributes:
        steps: optimizer steps since this process began training.
        training: all that was no audit.
        audits: in all.
        looks: of these, health audits.
        health, full: of the last audit of each kind, over all probe sets; None: there was none.
        layers: of the model, by which a first full audit is judged in advance where its work is not counted.
        per_look: how many times the work of the last health audit that of a full one is; None: not counted.
    """

    steps: int = 0
    training: float = 0.0
    audits: float = 0.0
    looks: float = 0.0
    health: float | None = None
    full: float | None = None
    layers: int = 0
    per_look: float | None = None

    @property
    def share(self) -> float | None:
        """Of the time so far that went into audits; None before the first step."""
        return self.audits / (self.audits + self.training) if self.steps and self.training > 0 else None

    @property
    def expected_full(self) -> float | None:
        """Seconds of a full audit: those of the last one, else a health audit's times how much more work it is (rather too many
        than too few); None: nothing was audited yet."""
        if self.full is not None:
            return self.full
        if self.health is None:
            return None
        return self.health * (4 + 3 * self.layers if self.per_look is None else self.per_look)


def afforded(
    due: Due, spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None
) -> AuditKind | None:
    """How much of what is due is made now; None: nothing.

    Args:
        budget: share of wall-clock time; None: no limit.
    """
    if due.kind == "full" and (not due.budgeted or affords_full(spent, training, schedule, budget)):
        return "full"
    return None if due.optional and not affords_look(spent, training, schedule, budget) else "health"


def affords_full(spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None) -> bool:
    """Whether a full audit fits the budget now, and leaves room for another one at the end; or is that one, and short enough
    to be made whatever the budget (``last_step_seconds``).

    Args:
        budget: share of wall-clock time; None: no limit.
    """
    if budget is None:
        return True
    cost = spent.expected_full
    if cost is None or not spent.steps:
        return False
    if training.is_last and schedule.on_last_step and cost <= schedule.last_step_seconds:
        return True
    allowed = _allowance(spent.training, budget)
    if spent.audits + cost > allowed:
        return False
    in_all = _allowance(spent.training / spent.steps * _steps_in_all(spent, training), budget)
    return training.is_last or spent.audits + 2 * cost <= in_all


def affords_look(spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None) -> bool:
    """Whether a health audit that need not be made fits the budget now, and leaves room for full ones; on the last step it is
    made whatever the budget.

    What looks have taken must be within their part of the time so far, not what they will have taken after this one: else
    those that are planned between checkpoints use that part up, and checkpoints come away empty.

    Args:
        budget: share of wall-clock time; None: no limit.
    """
    if budget is None or training.is_last:
        return True
    cost = spent.health or 0.0  # None was timed yet: only what was spent counts
    if not spent.steps or spent.audits + cost > _allowance(spent.training, budget):
        return False
    allowed = _for_looks(spent, training, schedule, budget)
    return spent.looks + cost <= allowed and spent.looks <= allowed * spent.steps / _steps_in_all(spent, training)


def affords_escalation(spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None) -> bool:
    """Whether a warning is worth a full audit now: one that is short (``escalate_seconds``), or for which the budget of the
    whole run has room."""
    cost = spent.expected_full
    if budget is None or cost is None or cost <= schedule.escalate_seconds:
        return True
    if not spent.steps:
        return False  # a run that was resumed: nobody knows yet what it has room for
    in_all = _allowance(spent.training / spent.steps * _steps_in_all(spent, training), budget)
    return spent.audits + cost <= in_all


def look_after(
    spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None, *, audited: bool = True
) -> int | None:
    """The step of the next health audit after this one; None: there will be none.

    The next of ``first_health`` and its doublings, or earlier, as soon as the budget has room for it beside the audit at the
    end; but no more than ``most_looks`` in a run, and none beside a doubling shortly before the last step, which is audited
    itself: less than half as far from it as from this one. A checkpoint that is saved shortly before has it sooner. A run that
    is resumed has its first one after ``first_health`` steps of its own, whatever that costs.

    Args:
        budget: share of wall-clock time; None: no limit.
        audited: this step was; a run that is resumed need not begin with an audit, and an audit may break.

    Example:
        >>> look_after(Spent(), Training(step=0, max_steps=1000), ScheduleConfig(), 0.05)
        5
        >>> look_after(Spent(80, training=80.0, audits=2.0, health=1.0), Training(80, 1000), ScheduleConfig(), 0.05)
        85
    """
    if not schedule.health:
        return None
    step, first = training.step, schedule.first_health
    # Of a resumed run the doublings go on from where it began.
    doubling = first
    # One that is near was made early, at a checkpoint.
    while doubling <= step or (audited and doubling > _EARLY * first and step >= _NEAR * doubling):
        doubling *= 2
    gap = max(first, math.ceil(training.max_steps / schedule.most_looks))
    # Before its first step nobody knows what this process can afford: the next doubling may be days away.
    soonest = max(step + gap, _affordable(spent, training, schedule, budget)) if spent.steps else step + first
    if spent.steps and schedule.on_last_step and training.max_steps - soonest < (soonest - step) / 2:
        soonest = doubling  # The audit of the last step comes soon after.
    at = min(doubling, soonest)
    return at if at < training.max_steps or (at == training.max_steps and not schedule.on_last_step) else None


def _affordable(spent: Spent, training: Training, schedule: ScheduleConfig, budget: float | None) -> int:
    """The first step at which one more health audit fits the budget."""
    if budget is None:
        return training.step
    never = training.max_steps + 1
    if spent.health is None or not spent.steps or spent.training <= 0:
        return never
    allowed = _for_looks(spent, training, schedule, budget)
    if allowed <= 0:
        return never
    began, steps = training.step - spent.steps, _steps_in_all(spent, training)
    return min(never, began + math.ceil((spent.looks + spent.health) / (allowed / steps)))


def _for_looks(spent: Spent, training: Training, schedule: ScheduleConfig, budget: float) -> float:
    """Seconds that all looks of this process may take until the end, beside the full audits that the budget is kept for."""
    in_all = _allowance(spent.training / spent.steps * _steps_in_all(spent, training), budget)
    full, in_full = spent.expected_full, spent.audits - spent.looks
    if full is None or spent.audits + full > in_all:
        # A full one that will not fit any more is not waited for: a look stands in its place on the last step.
        return in_all - in_full - (spent.health or 0.0) * schedule.on_last_step
    # Else looks take all there is as it comes, and no checkpoint is ever audited in full.
    at_most = _LOOKS * in_all if schedule.on_save else math.inf
    return min(in_all - in_full - (full if schedule.on_last_step else 0.0), at_most)


_LOOKS = 0.5
"""The share of the budget that looks may take where checkpoints are to be audited in full."""


def _allowance(training: float, budget: float) -> float:
    """Seconds of audits that are ``budget`` of the whole beside so many seconds of training."""
    return training * budget / (1 - budget)


def _steps_in_all(spent: Spent, training: Training) -> int:
    """Steps that this process makes until the end."""
    return max(spent.steps, training.max_steps - training.step + spent.steps)
