"""Auditing during training: a ``TrainerCallback`` for TRL's ``DPOTrainer``. Events → schedule → monitor; no maths, no files."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from align_audit.auditing.given import check_given
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, ConfigurationError, pass_exit_on
from align_audit.models.anatomy import Anatomy
from align_audit.monitoring.hub import kept_from_hub
from align_audit.monitoring.outcome import BREAKS, Outcome
from align_audit.monitoring.probe_sets import TrainingProbes
from align_audit.monitoring.schedule import Due, Event, Training, decide
from align_audit.monitoring.start import Run, begin_run, refuse_other_options, refuse_together
from align_audit.monitoring.trainer import read_trainer
from align_audit.monitoring.trainer_log import LogMeetings
from align_audit.monitoring.wishes import Wishes
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Agreed, Ranks
from align_audit.writers.messages import OnAlert, checked

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DPOTrainer

logger = logging.getLogger(__name__)

_Event = TypeVar("_Event", bound=Callable[..., None])


def _guarded(event: _Event) -> _Event:
    """An event in which nothing can break training: what goes wrong is recorded as a failed audit is."""

    @functools.wraps(event)
    def guarded(self: AlignmentAuditCallback, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if self._run is None or not self._training:
            return  # such as an evaluation before training, or after it, when the best checkpoint was loaded back
        with self._unbroken(state.global_step):
            event(self, args, state, *rest, **kwargs)

    return cast(_Event, guarded)


class AlignmentAuditCallback(TrainerCallback):
    """Audits a ``DPOTrainer`` run from inside: before the first step, at checkpoints, and on the last step.

    Observation is inert (losses, gradients and weights are bit-identical with and without it), and an audit that breaks
    never breaks training: it is logged with its traceback, and training goes on (``AuditConfig(strict=True)`` raises).
    What cannot work is refused before training starts.

    Args:
        probes: a ``ProbeSet``, or any preference data ``ProbeSet.from_dataset`` takes; or several of these by name, each
            audited at every audit, with its own records, curves and alerts. None: the trainer's eval set (when
            attached; each of them by its name where there are several), else pairs of the training set, with a warning.
        config: what to audit, when, and at which limits to speak.
        reference: a model or a path; None: see ``align_audit.models.reference``.
        anatomy: where the decoder layers are, for a model in which they cannot be found.
        on_alert: is called with an alert and the record it was raised on, on the process that writes, as alerts open, get
            worse and are resolved. What it raises is logged and goes no further; training waits for it.

    Example::

        callback = AlignmentAuditCallback()
        trainer = DPOTrainer(..., callbacks=[callback])
        callback.attach(trainer)
        trainer.train()
    """

    def __init__(
        self,
        probes: ProbeSet
        | Dataset
        | IterableDataset
        | list[dict[str, Any]]
        | str
        | Path
        | Mapping[str, ProbeSet | Dataset | IterableDataset | list[dict[str, Any]] | str | Path]
        | None = None,
        config: AuditConfig | None = None,
        reference: nn.Module | str | Path | None = None,
        *,
        anatomy: Anatomy | None = None,
        on_alert: OnAlert | None = None,
    ) -> None:
        self.config = config if config is not None else AuditConfig()
        check_given(config=config, reference=reference, anatomy=anatomy)
        self._probes = TrainingProbes(probes)
        self._given_reference = reference
        self._anatomy = anatomy
        self._on_alert = checked(on_alert)
        self._trainer: weakref.ref[DPOTrainer] | None = None
        self._ranks = Ranks()
        self._run: Run | None = None
        self._training = False  # between the events that begin and end it: what happens outside belongs to no step
        self._pending: Due | None = None
        """An audit that an earlier event left due."""
        self._next_look: int | None = None
        self._wishes = Wishes()
        self._log_meetings = LogMeetings()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: DPOTrainer) -> Self:
        """Let the callback see the trainer's reference, β, eval set, truncation and TensorBoard log.

        Raises:
            ConfigurationError: ``trainer`` was built without this callback, or is none.
            ProbeError: the trainer's data holds no usable pair.
        """
        handler: Any = getattr(trainer, "callback_handler", None)
        if handler is None:
            raise ConfigurationError(f"expected the trainer, a DPOTrainer, found {type(trainer).__name__}")
        if self not in handler.callbacks:
            raise ConfigurationError(
                "this callback is not among the trainer's callbacks; expected DPOTrainer(..., callbacks=[callback]) "
                "before callback.attach(trainer)"
            )
        self._trainer = weakref.ref(trainer)
        self._probes.draw(self.config, read_trainer(trainer, trainer.args), trainer.processing_class)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, open the log, and audit the start."""
        self._pending, self._next_look, self._training = None, None, False
        self._ranks = Ranks.of_this_run(args.ddp_timeout_delta)
        self._wishes, self._log_meetings = Wishes.of(args, self._ranks), LogMeetings()
        error: BaseException | None = None
        try:
            refuse_other_options(self._ranks, self.config)
            with self._ranks.together():
                self._run = self._begin(args, state, **kwargs)
        except (*BREAKS, Agreed) as raised:
            error = raised
        refuse_together(self._ranks, error)
        assert self._run is not None
        self._training = True
        with self._unbroken(state.global_step):
            with self._ranks.together():
                self._run.monitor.agree()
                self._next_look = self._ranks.share(self._run.begin_pace(self._run.facts.training(state, control)))
            self._at(Event.TRAIN_BEGIN, state, control, kwargs["model"])
        with self._unbroken(state.global_step):
            self._run.reference.release()  # loaded for the check, and left in memory where no audit followed

    @contextlib.contextmanager
    def _unbroken(self, step: int) -> Iterator[None]:
        """Nothing leaves this but with ``strict``: what goes wrong inside is recorded as a failed audit is."""
        run = self._run
        assert run is not None
        try:
            yield
        except BREAKS as error:
            pass_exit_on(error)
            if self.config.strict:
                self._end()
                raise
            run.monitor.failures.fail(step, error)
        except Agreed as agreed:  # that process says what it was
            if self.config.strict:
                self._end()
                raise AlignAuditError(str(agreed)) from None

    def _begin(
        self,
        args: Any,
        state: TrainerState,
        *,
        model: nn.Module,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> Run:
        """Everything that may refuse to start, on all processes together."""
        # An earlier training may have broken off (auto_find_batch_size begins one again): the log tells what this repeats.
        self._end()
        facts = read_trainer(self._trainer() if self._trainer is not None else None, args, train_dataloader, state)
        self._probes.draw(self.config, facts, processing_class)
        return begin_run(
            model,
            self._given_reference,
            self._probes.sets,
            kept_from_hub(self.config, facts, writes=state.is_world_process_zero),
            facts,
            step=state.global_step,
            ranks=self._ranks,
            writes=state.is_world_process_zero,
            anatomy=self._anatomy,
            on_alert=self._on_alert,
        )

    # -- events --------------------------------------------------------------------------------------------------------

    @_guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what the step before left due."""
        self._at(Event.STEP_BEGIN, state, control, kwargs["model"])

    @_guarded
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit where the schedule says so, or leave it due where the reference is about to be synchronized."""
        self._log_meetings.foresee(control)
        self._at(Event.STEP_END, state, control, kwargs["model"])

    @_guarded
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what the trainer logs, and whether something in it is suspicious; maybe on this process only."""
        assert self._run is not None
        self._run.monitor.trainer_log.hear(state.global_step, logs or {}, state.max_steps or None)

    @_guarded
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit after an evaluation, where asked for, and what is due."""
        self._at(Event.EVALUATE, state, control, kwargs["model"])

    @_guarded
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit where a checkpoint was saved, and what is due."""
        self._at(Event.SAVE, state, control, kwargs["model"])

    @_guarded
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what is due, and the end where training stops with the epoch."""
        self._log_meetings.foresee(control)
        self._at(Event.EPOCH_END, state, control, kwargs["model"])

    @_guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the last step where nothing before could tell that it was, and let go of the writers."""
        try:
            self._at(Event.TRAIN_END, state, control, kwargs["model"])
        finally:
            self._end()

    def _end(self) -> None:
        """Let go of what a training holds: its writers, its log and its word with the other processes."""
        run, self._run, self._training = self._run, None, False  # a callback that lives on holds no model
        if run is not None:
            run.monitor.close()

    def _at(self, event: Event, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Do what the schedule decides at an event."""
        assert self._run is not None
        self._wishes.meet(event, control, state.best_model_checkpoint)
        self._agree_on_logs(event, state.global_step)
        self._run.pace.hear(event)
        training = self._run.facts.training(state, control)
        due = decide(event, training, self.config.schedule, self._pending, self._next_look, self._run.pace.audited_at)
        if due is None:
            self._run.say_unaudited(event, training)
            return
        self._pending = due if due.later else None
        made = None if due.later else self._run.affordable(due, training)
        if made is None:
            return
        outcome = self._audit(made, event, training, control, model)
        warned = self._run.escalation(made, outcome, training)
        if warned is not None:
            self._audit(warned, event, training, control, model)

    def _agree_on_logs(self, event: Event, step: int) -> None:
        """Leave a look due on all processes where the first one has seen something suspicious in the trainer's log."""
        assert self._run is not None
        due = None
        if self._log_meetings.at(event, self._ranks):
            with self._unbroken(step):
                due = self._run.monitor.trainer_log.agree(self._ranks)
        due = self._log_meetings.asked(due, audited=self._run.pace.audited_at == step)
        if due is not None and self.config.schedule.health:
            self._pending = due.with_pending(self._pending)

    def _audit(self, due: Due, event: Event, training: Training, control: TrainerControl, model: nn.Module) -> Outcome:
        """One moment's audits, and what they ask of training."""
        assert self._run is not None
        moment = self._run.moment(due, training, at_start=event is Event.TRAIN_BEGIN and training.step == 0)
        outcome = self._run.monitor.audit(self._run.models(model, due), moment)
        self._next_look = outcome.next_look
        self._wishes.hand_over(outcome, control, training.step, event)
        return outcome


__all__ = ["AlignmentAuditCallback"]
