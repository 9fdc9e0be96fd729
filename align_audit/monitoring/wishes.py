"""What an audit asks of training, handed to the trainer where it hears it."""

from __future__ import annotations

import logging

from transformers.trainer_callback import TrainerControl

from align_audit.monitoring.outcome import Outcome
from align_audit.monitoring.schedule import Event

logger = logging.getLogger(__name__)


class Wishes:
    """The wishes to save and to stop, of one training.

    The Trainer may forget a wish to save: one that is made before its first step begins, and with ``save_strategy="best"`` one
    of a step that it evaluates. So it is told again until it has saved.

    Args:
        saves_best: an evaluation decides whether its step is saved, whatever was asked for before.
    """

    def __init__(self, saves_best: bool = False) -> None:
        self._saves_best = saves_best
        self._stepping = False
        """A step was begun."""
        self.unsaved = False
        """A checkpoint is wished for, and none was saved since."""

    def meet(self, event: Event, control: TrainerControl) -> None:
        """At each event, before an audit: tell the trainer again where it hears it, until it has saved."""
        self._stepping = self._stepping or event is Event.STEP_BEGIN
        if event is Event.SAVE:
            self.unsaved = False
        elif self.unsaved and event in (Event.STEP_END, Event.EPOCH_END):
            control.should_save = True
        elif self.unsaved and event is Event.TRAIN_END:
            logger.warning("align_audit asked for a checkpoint, and training has ended without one")

    def hand_over(self, outcome: Outcome, control: TrainerControl, step: int, event: Event) -> None:
        """Ask the trainer for what an audit made at this event wishes for, and say so."""
        reasons = ", ".join(outcome.reasons)
        if outcome.stop:
            logger.warning("align_audit stops training at step %d: %s", step, reasons)
            control.should_training_stop = True
        if not outcome.save or event is Event.SAVE:
            return
        if event is Event.TRAIN_END:
            logger.warning("align_audit would save a checkpoint at step %d, and training has ended: %s", step, reasons)
            return
        # Before a step the trainer saves nothing: what it is asked for then comes of the weights after the step.
        between_steps = event is Event.STEP_BEGIN or not self._stepping
        saved = step + 1 if between_steps or self._overruled(event, control) else step
        logger.warning(
            "align_audit saves a checkpoint at step %d, for what it saw at step %d: %s", saved, step, reasons
        )
        self.unsaved = control.should_save = True

    def _overruled(self, event: Event, control: TrainerControl) -> bool:
        """Whether this step's evaluation is still to decide that it is not saved, and a step follows."""
        evaluates = event is Event.EVALUATE or control.should_evaluate
        return self._saves_best and evaluates and not control.should_training_stop
