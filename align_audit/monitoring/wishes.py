"""What an audit asks of training, handed to the trainer where it hears it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import SaveStrategy, sort_checkpoints

from align_audit.monitoring.outcome import Outcome
from align_audit.monitoring.schedule import Event
from align_audit.ranks import Ranks

logger = logging.getLogger(__name__)


class Wishes:
    """The wishes to save and to stop, of one training.

    The Trainer may forget a wish to save: one that is made before its first step begins, and with ``save_strategy="best"`` one
    of a step that it evaluates. So it is told again until it has saved.

    Args:
        saves_best: an evaluation decides whether its step is saved, whatever was asked for before.
        accumulates: steps are made of several batches; one that was asked to stop before it ends after the first of them.
        folder, limit: where checkpoints are saved, and how many stay there; None: all.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        saves_best: bool = False,
        *,
        accumulates: bool = False,
        folder: str | None = None,
        limit: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._saves_best = saves_best
        self._accumulates = accumulates
        self._folder, self._limit = folder, limit
        self._ranks = ranks if ranks is not None else Ranks()
        self._best: str | None = None
        """The checkpoint that the trainer keeps as the best one."""
        self._stepping = False
        """A step was begun."""
        self.unsaved = False
        """A checkpoint is wished for, and none was saved since."""

    @classmethod
    def of(cls, args: TrainingArguments, ranks: Ranks) -> Self:
        """As a training with these arguments hears them."""
        return cls(
            args.save_strategy == SaveStrategy.BEST,
            accumulates=args.gradient_accumulation_steps > 1,
            folder=args.output_dir,
            limit=args.save_total_limit,
            ranks=ranks,
        )

    def meet(self, event: Event, control: TrainerControl, best: str | None = None) -> None:
        """At each event, before an audit: tell the trainer again where it hears it, until it has saved.

        Args:
            best: the checkpoint that the trainer keeps as the best one.
        """
        self._best = best
        self._stepping = self._stepping or event is Event.STEP_BEGIN
        if event is Event.SAVE:
            self.unsaved = False
        elif self.unsaved and event in (Event.STEP_END, Event.EPOCH_END):
            control.should_save = True
        elif self.unsaved and event is Event.TRAIN_END:
            logger.warning("align_audit asked for a checkpoint, and training has ended without one")

    def _lost(self, outcome: Outcome) -> str | None:
        """Of the checkpoints that alerts say to go back to, one that the trainer would delete for the one wished for."""
        healthy = {alert.checkpoint for alert in outcome.alerts if alert.checkpoint}
        if not healthy or self._folder is None or self._limit is None or self._limit <= 0:
            return None
        try:
            there = [Path(path).name for path in sort_checkpoints(self._folder, use_mtime=True)]
        except OSError:  # one of them went away just now
            return None
        best = None if self._best is None else Path(self._best).name
        # The new one stays, and the best.
        stay = max(self._limit, 1 + (best in there))
        deleted = [name for name in there if name != best][: max(len(there) + 1 - stay, 0)]
        return next((name for name in deleted if name in healthy), None)

    def hand_over(self, outcome: Outcome, control: TrainerControl, step: int, event: Event) -> None:
        """Ask the trainer for what an audit made at this event wishes for, and say so; all processes together."""
        reasons = ", ".join(outcome.reasons)
        # Before a step: it is trained first, unless it is made of several batches, when training ends after one of them.
        between_steps = event is Event.STEP_BEGIN or not self._stepping
        follows = between_steps and not (outcome.stop and self._accumulates)
        if outcome.stop:
            logger.warning("align_audit stops training at step %d: %s", step + follows, reasons)
            control.should_training_stop = True
        if not outcome.save or event is Event.SAVE:
            return
        if event is Event.TRAIN_END:
            logger.warning("align_audit would save a checkpoint at step %d, and training has ended: %s", step, reasons)
            return
        # Folders differ from process to process where no disk is shared: the first one's word holds.
        lost = self._ranks.share(self._lost(outcome))
        if lost is not None:
            logger.warning(
                "align_audit saves no checkpoint at step %d, for what it saw there (%s): it would cost %s, the one to go back "
                "to (save_total_limit: %s)", step, reasons, lost, self._limit,
            )  # fmt: skip
            return
        # Before a step the trainer saves nothing: what it is asked for then comes of the weights after the step.
        saved = step + 1 if follows or self._overruled(event, control) else step
        logger.warning(
            "align_audit saves a checkpoint at step %d, for what it saw at step %d: %s", saved, step, reasons
        )
        self.unsaved = control.should_save = True

    def _overruled(self, event: Event, control: TrainerControl) -> bool:
        """Whether this step's evaluation is still to decide that it is not saved, and a step follows."""
        evaluates = event is Event.EVALUATE or control.should_evaluate
        return self._saves_best and evaluates and not control.should_training_stop
