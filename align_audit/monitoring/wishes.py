"""What an audit asks of training, handed to the trainer where it hears it."""

from __future__ import annotations

import logging

from transformers.trainer_callback import TrainerControl

from align_audit.monitoring.outcome import Outcome
from align_audit.monitoring.schedule import Event

logger = logging.getLogger(__name__)


class Wishes:
    """The wishes to save and to stop, of one training."""

    def __init__(self) -> None:
        self.save_next = False
        """A checkpoint is wished for that the trainer can be asked for only after the next step."""

    def after_step(self, control: TrainerControl) -> None:
        """Hand over what could not be asked for before a step."""
        if self.save_next:
            control.should_save, self.save_next = True, False

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
        saved = step + 1 if event in (Event.TRAIN_BEGIN, Event.STEP_BEGIN) else step
        logger.warning(
            "align_audit saves a checkpoint at step %d, for what it saw at step %d: %s", saved, step, reasons
        )
        if event is Event.TRAIN_BEGIN:
            self.save_next = True  # the Trainer forgets a wish to save that is made before its first step begins
        else:
            control.should_save = True
