"""When to audit during training: pure decisions from an event and what stands of training at it.

Order of events, as transformers' Trainer fires them: ``step_end`` → (log) → ``evaluate`` → ``save``; TRL's reference
synchronization runs in its own ``on_step_end``, after ours. So an audit due on a synchronization step waits for the next
event. The trainer's TensorBoard writer is closed before our ``train_end``, so the last step is audited before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from align_audit.config import ScheduleConfig


class Event(Enum):
    """The trainer's events at which an audit may be made."""

    TRAIN_BEGIN = "train_begin"
    STEP_BEGIN = "step_begin"
    STEP_END = "step_end"
    EVALUATE = "evaluate"
    SAVE = "save"
    EPOCH_END = "epoch_end"
    TRAIN_END = "train_end"


class Decision(Enum):
    """What to do at an event."""

    NOTHING = "nothing"
    """What is pending stays so."""
    AUDIT = "audit"
    """Audit now; nothing is pending then."""
    LATER = "later"
    """An audit is due, and has to wait for the next event."""


@dataclass(frozen=True)
class Training:
    """What stands of training at an event.

    Attributes:
        step: optimizer steps done.
        max_steps: after how many it ends, if nothing stops it.
        stopping: somebody has asked it to stop.
        syncs_reference: the reference is synchronized with the policy at this step, after our own event.
        best_loaded: the best checkpoint was loaded back, so that the weights are not those of this step.
    """

    step: int
    max_steps: int
    stopping: bool = False
    syncs_reference: bool = False
    best_loaded: bool = False


def decide(event: Event, training: Training, schedule: ScheduleConfig, pending: bool) -> Decision:
    """Whether an event asks for an audit, now or later.

    Args:
        pending: an earlier event left an audit due. The start of training forgets it.

    Example:
        >>> decide(Event.SAVE, Training(step=3, max_steps=9), ScheduleConfig(on_save=True), pending=False)
        <Decision.AUDIT: 'audit'>
    """
    if event is Event.TRAIN_BEGIN:
        return Decision.AUDIT if schedule.before_training else Decision.NOTHING
    if event is Event.TRAIN_END:
        return Decision.AUDIT if schedule.on_last_step and not training.best_loaded else Decision.NOTHING
    if event is Event.STEP_END:
        if not _step_is_due(training, schedule):
            return Decision.NOTHING
        return Decision.LATER if training.syncs_reference else Decision.AUDIT
    asked = {
        Event.STEP_BEGIN: False,
        Event.EVALUATE: schedule.on_evaluate,
        Event.SAVE: schedule.on_save,
        Event.EPOCH_END: schedule.on_last_step and training.stopping,
    }
    return Decision.AUDIT if pending or asked[event] else Decision.NOTHING


def _step_is_due(training: Training, schedule: ScheduleConfig) -> bool:
    every = schedule.every_n_steps
    last = training.stopping or training.step >= training.max_steps
    return (schedule.on_last_step and last) or (every is not None and training.step % every == 0)
