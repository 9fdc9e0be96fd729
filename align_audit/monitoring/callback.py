"""When to audit during training: a ``TrainerCallback`` for TRL's ``DPOTrainer``. It holds no maths.

Order of events, as transformers' Trainer fires them: ``on_step_end`` → (log) → ``on_evaluate`` → ``on_save``; TRL's
reference synchronization runs in its own ``on_step_end``, after ours. So an audit due on a synchronization step waits
for the next event. The trainer's TensorBoard writer is closed before our ``on_train_end``, so the last step is audited
before that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeGuard

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align_audit.alerts.detectors import evaluate
from align_audit.auditing.audit import run_audit
from align_audit.auditing.check import check_audit
from align_audit.auditing.previous import PreviousAudit, left_by
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, ConfigurationError
from align_audit.models.anatomy import Anatomy
from align_audit.models.guard import untouched
from align_audit.models.reference import Reference, policy_fingerprint, resolve_reference
from align_audit.models.weights.sharded import refuse_sharded
from align_audit.monitoring.trainer import tensorboard_writer_of
from align_audit.probes.names import as_name, check_names
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Ranks
from align_audit.record.audit_record import Alert, AuditRecord
from align_audit.record.log import RunLog, arrays_name
from align_audit.writers.locate import open_tensorboard
from align_audit.writers.tensorboard import TensorBoardWriter
from align_audit.writers.terminal import print_record, progress_bar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DPOTrainer

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")

_ANYTHING = (Exception, SystemExit)
"""What must not leave an event of ours: a library that asks the process to end (rich does, when nobody reads its output any
more) ends an audit and no training. A keyboard interrupt is the user's, and passes."""


def _guarded(
    event: Callable[Concatenate[AlignmentAuditCallback, Any, TrainerState, _P], None],
) -> Callable[Concatenate[AlignmentAuditCallback, Any, TrainerState, _P], None]:
    """An event in which nothing can break training: what goes wrong is recorded as a failed audit is."""

    @functools.wraps(event)
    def guarded(
        self: AlignmentAuditCallback, args: Any, state: TrainerState, *rest: _P.args, **kwargs: _P.kwargs
    ) -> None:
        try:
            event(self, args, state, *rest, **kwargs)
        except _ANYTHING as error:
            if self.config.strict:
                raise
            self._record_failure(state, _Broken.of(error))

    return guarded


@dataclass(frozen=True)
class _Broken:
    """An audit that broke: what is said of it, and what is kept."""

    kind: str
    traceback: str
    probe_name: str | None = None

    @classmethod
    def of(cls, error: BaseException, probe_name: str | None = None) -> _Broken:
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)), probe_name)


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
    ) -> None:
        self.config = config if config is not None else AuditConfig()
        if not isinstance(self.config, AuditConfig):
            raise ConfigurationError(
                f"expected config to be an AuditConfig, found {type(config).__name__}; build one with "
                "AuditConfig(...), AuditConfig.from_dict or AuditConfig.from_yaml"
            )
        if _by_name(probes):
            check_names(probes)
        self._given_probes = probes
        self._given_reference = reference
        self._trainer: weakref.ref[DPOTrainer] | None = None
        self._anatomy = anatomy
        self._beta: float | None = None
        self._numerics: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self._compare_precomputed = True
        self._cache = ReferenceCache()
        self._probes: dict[str | None, ProbeSet] = {}
        """The probe sets by name; a single one without a name is called None."""
        self._previous: dict[str | None, PreviousAudit] = {}
        """What each probe set's audit before left."""
        self._reference: Reference | None = None
        self._log: RunLog | None = None
        self._writer: TensorBoardWriter | None = None
        self._close_writer: Callable[[], None] = lambda: None
        self._pending = False
        self._save_next = False
        self._seen: set[tuple[int, str, str | None]] = set()
        self._failures_shown: set[str] = set()
        self._ranks = Ranks()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: DPOTrainer) -> Self:
        """Let the callback see the trainer's reference, β, eval set, truncation and TensorBoard log.

        Raises:
            ConfigurationError: ``trainer`` was built without this callback.
            ProbeError: the trainer's data holds no usable pair.
        """
        if self not in trainer.callback_handler.callbacks:
            raise ConfigurationError(
                "this callback is not among the trainer's callbacks; expected DPOTrainer(..., callbacks=[callback]) "
                "before callback.attach(trainer)"
            )
        self._trainer = weakref.ref(trainer)
        self._beta = getattr(trainer, "beta", None)
        self._prepare_probes(trainer.args, trainer.processing_class, None)
        return self

    def _attached(self) -> Any:
        return self._trainer() if self._trainer is not None else None

    def _prepare_probes(self, args: Any, tokenizer: Any, train_dataloader: Any) -> None:
        if self._probes:
            return
        given: Any = self._given_probes
        if given is None:
            self._probes = self._found_probes(args, tokenizer, train_dataloader)
        elif _by_name(given):
            self._probes = {name: self._probe_set(data, args, tokenizer) for name, data in given.items()}
        else:
            self._probes = {None: self._probe_set(given, args, tokenizer)}
        for name, probes in self._probes.items():
            logger.info("align_audit probes%s: %s", "" if name is None else f" {name!r}", probes.summary())

    def _found_probes(self, args: Any, tokenizer: Any, train_dataloader: Any) -> dict[str | None, ProbeSet]:
        """The trainer's eval set, each of several by its name; else pairs of the training set."""
        trainer = self._attached()
        evaluation = trainer.eval_dataset if trainer is not None else None
        if isinstance(evaluation, dict):
            named = {as_name(name): (name, data) for name, data in evaluation.items()}
            check_names(as_name(name) for name in evaluation)
            return {
                name: self._probe_set(data, args, tokenizer, f"the trainer's eval set {own!r}", True)
                for name, (own, data) in named.items()
            }
        if evaluation is not None:
            return {None: self._probe_set(evaluation, args, tokenizer, "the trainer's eval set", True)}
        warnings.warn(
            "align_audit found no held-out pairs and takes its probes from the training set: accuracies and "
            "margins will look better than they are. Pass probes=..., or give the trainer an eval_dataset"
            + ("" if trainer is not None else " and call callback.attach(trainer)"),
            stacklevel=4,
        )
        data = trainer.train_dataset if trainer is not None else train_dataloader.dataset
        return {None: self._probe_set(data, args, tokenizer, "the training set", False)}

    def _probe_set(
        self, data: Any, args: Any, tokenizer: Any, source: str | None = None, held_out: bool | None = None
    ) -> ProbeSet:
        if isinstance(data, ProbeSet):
            return data
        config = self.config
        with untouched():
            return ProbeSet.from_dataset(
                data,
                tokenizer,
                max_pairs=config.max_pairs,
                max_length=config.max_length or getattr(args, "max_length", 1024),
                truncation_mode=str(config.truncation_mode or getattr(args, "truncation_mode", "keep_start")),
                seed=config.seed,
                source=source,
                held_out=held_out,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, open the log, and audit the start."""
        model = kwargs["model"]
        self._pending = False
        self._ranks = Ranks.of_this_run()
        raised: BaseException | None = None
        try:
            self._set_up(args, state, model, kwargs)
        except _ANYTHING as error:
            raised = error
        # All processes go on, or none does: one that is missing would be waited for in training's first step.
        said = self._ranks.gather((None if raised is None else _Broken.of(raised), self.config.to_dict()))
        if raised is not None:
            raise raised
        for rank, (broken, config) in enumerate(said):
            if broken is not None:
                raise ConfigurationError(f"training cannot be audited: on rank {rank} {broken.kind}")
            if config != said[0][1]:
                odd = ", ".join(sorted(name for name, value in config.items() if value != said[0][1].get(name)))
                raise ConfigurationError(
                    f"rank {rank} audits with other options than rank 0 ({odd}); expected the same AuditConfig on all ranks"
                )
        # What is in the log was audited, on every process; only the first one reads it.
        self._seen = self._ranks.share(self._seen)
        if self.config.schedule.before_training:
            self._audit(args, state, control, model, at_start=state.global_step == 0)
        assert self._reference is not None
        self._reference.release()  # loaded for the check, and left in memory where no audit followed

    def _set_up(self, args: Any, state: TrainerState, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Everything that may refuse to start. Nothing in it waits for another process."""
        trainer = self._attached()
        refuse_sharded(model, "the policy")
        for reference, what in (
            (getattr(trainer, "ref_model", None), "the trainer's ref_model"), (self._given_reference, "the reference"),
        ):  # fmt: skip
            if isinstance(reference, nn.Module):
                refuse_sharded(reference, what)
        self._prepare_probes(args, kwargs.get("processing_class"), kwargs.get("train_dataloader"))
        self._check_setup(args, model)
        # auto_find_batch_size begins training again within one run; what is in the log tells what that repeats.
        self._open_log(args, state, model)
        try:
            self._open_writer(args, state)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write TensorBoard curves below {args.output_dir}: {error}. Expected a folder that this process may "
                'write to; free it, or switch the curves off (AuditConfig(tensorboard="off"))'
            ) from error

    def _check_setup(self, args: Any, model: nn.Module) -> None:
        """Find out now what would otherwise break every audit."""
        trainer = self._attached()
        if (
            getattr(args, "sync_ref_model", False)
            and trainer is None
            and not isinstance(self._given_reference, nn.Module)
        ):
            raise ConfigurationError(
                "sync_ref_model=True moves the trainer's reference during training, and only the trainer holds it. "
                "Call callback.attach(trainer) after building the trainer."
            )
        self._numerics = self._autocast(args, model)
        self._compare_precomputed = getattr(args, "ld_alpha", None) is None
        self._beta = getattr(args, "beta", self._beta)
        self._reference = resolve_reference(
            model,
            self._given_reference,
            getattr(trainer, "ref_model", None),
            trust_remote_code=bool(getattr(args, "trust_remote_code", False)),
        )
        try:
            check_audit(
                model,
                self._reference,
                self._probes.values(),
                self.config,
                autocast=self._numerics,
                anatomy=self._anatomy,
            )
        except AlignAuditError:
            raise
        except Exception as error:
            # Not a finding of ours: let the first audit meet it, where it is recorded and training goes on.
            logger.warning("align_audit could not check its set-up: %s", error)

    def _autocast(self, args: Any, model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """The context the trainer computes in: accelerate puts it around the model's forward, out of our reach."""
        trainer = self._attached()
        if trainer is not None:
            return trainer.accelerator.autocast
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if dtype is None:
            return contextlib.nullcontext
        device = next(model.parameters()).device.type
        return lambda: torch.autocast(device, dtype=dtype)

    def _open_log(self, args: Any, state: TrainerState, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        self._log = RunLog(args.output_dir)
        self._cache = ReferenceCache(self._log.directory / "cache")
        records = self._log.records
        if state.global_step == 0 and not all(self._begins_with(record, model) for record in records):
            aside = self._log.set_aside()
            warnings.warn(
                f"{args.output_dir} holds the audits of an earlier run, and training starts again from step 0: they "
                f"were moved to {aside.name}",
                stacklevel=2,
            )
            records = []
        self._seen = {(record.step, record.provenance.policy_hash, record.provenance.probe_name) for record in records}
        self._previous = {}
        for name in self._probes:
            reached = [
                record
                for record in records
                if record.step <= state.global_step and record.provenance.probe_name == name
            ]
            self._previous[name] = left_by(reached[-1] if reached else None, self._log)

    def _begins_with(self, record: AuditRecord, model: nn.Module) -> bool:
        """Is this what our own first audit would find: the same start, read on the same probes in the same way?"""
        provenance = record.provenance
        probes = self._probes.get(provenance.probe_name)
        return (
            record.step == 0
            and provenance.policy_hash == policy_fingerprint(model)
            and probes is not None
            and provenance.probe_hash == probes.content_hash
            and provenance.config == self.config.to_dict()
        )

    def _open_writer(self, args: Any, state: TrainerState) -> None:
        if self.config.tensorboard == "off" or not state.is_world_process_zero:
            return
        self._close_writer()
        summary_writer, self._close_writer = open_tensorboard(tensorboard_writer_of(self._attached()), args.output_dir)
        self._writer = TensorBoardWriter(
            summary_writer, images=self.config.tensorboard_images, probe_names=list(self._probes)
        )

    # -- events --------------------------------------------------------------------------------------------------------

    @_guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what the step before left due."""
        self._run_pending(args, state, control, kwargs["model"])

    @_guarded
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit where the schedule says so, or leave it due where the reference is about to be synchronized."""
        schedule = self.config.schedule
        if self._save_next:
            control.should_save, self._save_next = True, False
        last = schedule.on_last_step and (control.should_training_stop or state.global_step >= state.max_steps)
        if last or (schedule.every_n_steps is not None and state.global_step % schedule.every_n_steps == 0):
            if self._syncs_now(args, state):
                self._pending = True
            else:
                self._audit(args, state, control, kwargs["model"])

    @_guarded
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit after an evaluation, where asked for, and what is due."""
        if self.config.schedule.on_evaluate:
            self._pending = True
        self._run_pending(args, state, control, kwargs["model"])

    @_guarded
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit where a checkpoint was saved, and what is due."""
        if self.config.schedule.on_save:
            self._pending = True
        self._run_pending(args, state, control, kwargs["model"], just_saved=True)

    @_guarded
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what is due, and the end where training stops with the epoch."""
        if self.config.schedule.on_last_step and control.should_training_stop:
            self._pending = True
        self._run_pending(args, state, control, kwargs["model"])

    @_guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the last step where nothing before could tell that it was, and close the TensorBoard log."""
        # With the best checkpoint loaded back the weights are not those of the last step.
        swapped = getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint is not None
        model = kwargs["model"]
        try:
            if self.config.schedule.on_last_step and not swapped:
                self._reopen_writer(args, state, model)
                self._audit(args, state, control, model)
        finally:
            try:
                self._close_writer()
            finally:
                self._close_writer = lambda: None
                self._writer = None
                self._ranks.close()
                self._ranks = Ranks()

    def _reopen_writer(self, args: Any, state: TrainerState, model: nn.Module) -> None:
        """Where training ended without telling any earlier event: the trainer's own writer is closed by now."""
        if self._writer is None:
            return
        try:
            if self._due(state, model):
                self._close_writer()
                summary_writer, self._close_writer = open_tensorboard(None, args.output_dir)
                self._writer.redirect(summary_writer)
        except Exception:
            # The record is worth more than its curves.
            self._writer = None
            logger.warning("align_audit cannot write the last step to TensorBoard", exc_info=True)

    def _syncs_now(self, args: Any, state: TrainerState) -> bool:
        return bool(getattr(args, "sync_ref_model", False)) and state.global_step % args.ref_model_sync_steps == 0

    def _run_pending(
        self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module, *, just_saved: bool = False
    ) -> None:
        if self._pending:
            self._pending = False
            self._audit(args, state, control, model, just_saved=just_saved)

    # -- one audit -----------------------------------------------------------------------------------------------------

    def _audit(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        *,
        at_start: bool = False,
        just_saved: bool = False,
    ) -> None:
        """Audit, log, speak; whatever goes wrong in it is recorded, and training goes on."""
        alerts: list[Alert] = []
        broken: list[_Broken] = []
        raised = self._audit_due(args, state, model, at_start, alerts, broken)
        # The one place where processes wait for each other: whatever happened before, each of them comes here. What
        # follows is made of what all of them said, so that they save together and stop together.
        said = self._ranks.gather((alerts, broken))
        for rank, (_, failures) in enumerate(said):
            for failure in failures:
                self._record_failure(state, failure, rank)
        # Also after a failure: an alert of a set that was audited before it is as true. The first process judges.
        self._act(control, state, said[0][0], just_saved)
        if self.config.strict:
            if raised is not None:
                raise raised
            for rank, (_, failures) in enumerate(said):
                if failures:
                    raise AlignAuditError(f"the audit broke on rank {rank}: {failures[0].kind}")

    def _audit_due(
        self,
        args: Any,
        state: TrainerState,
        model: nn.Module,
        at_start: bool,
        alerts: list[Alert],
        broken: list[_Broken],
    ) -> BaseException | None:
        """Audit every set that is due, filling ``alerts`` and ``broken``; returns the first error."""
        raised: BaseException | None = None
        try:
            due = self._due(state, model)
            if not due:
                return None
            assert self._reference is not None
            with OpenModels(model, self._reference, autocast=self._numerics, anatomy=self._anatomy) as models:
                for name, key in due.items():
                    self._seen.add(key)  # an audit that breaks would break again on the same weights
                    try:
                        self._audit_once(args, state, model, at_start, name, models, alerts)
                    except _ANYTHING as error:
                        raised = raised or error
                        broken.append(_Broken.of(error, name))
                        if self.config.strict:
                            break  # else the other probe sets are audited all the same
        except _ANYTHING as error:
            raised = raised or error
            broken.append(_Broken.of(error))
        return raised

    def _due(self, state: TrainerState, model: nn.Module) -> dict[str | None, tuple[int, str, str | None]]:
        """The probe sets on which these weights were not audited yet at this step, with what marks them as such."""
        weights = policy_fingerprint(model)
        keys = {name: (state.global_step, weights, name) for name in self._probes}
        return {name: key for name, key in keys.items() if key not in self._seen}

    def _audit_once(
        self,
        args: Any,
        state: TrainerState,
        model: nn.Module,
        at_start: bool,
        name: str | None,
        models: OpenModels,
        alerts: list[Alert],
    ) -> None:
        """One probe set; what its record says in alerts is added to ``alerts`` before anything is written."""
        assert self._reference is not None
        sync = getattr(args, "ref_model_sync_steps", 0) if getattr(args, "sync_ref_model", False) else 0
        request = AuditRequest(
            self._probes[name],
            self.config,
            state.global_step,
            probe_name=name,
            at_start=at_start,
            beta=self._beta,
            last_sync_step=(state.global_step // sync * sync or None) if sync else None,
            compare_precomputed=self._compare_precomputed,
            previous=self._previous.get(name, PreviousAudit()),
        )
        shown = self.config.progress and state.is_world_process_zero and not args.disable_tqdm
        result = run_audit(models, request, self._cache, progress_bar if shown else None)
        record, arrays = result.record, result.arrays
        self._previous[name] = result.left
        if self._log is None:  # not the first process
            return
        history = self._log.records
        # A resumed run may find later steps in its log, on the course it took before, or audits on other pairs.
        before = [
            earlier
            for earlier in history
            if earlier.step < record.step
            and earlier.provenance.probe_hash == record.provenance.probe_hash
            and earlier.provenance.probe_name == name
        ]
        record = record.model_copy(update={"alerts": evaluate(record, before, self.config.alerts)})
        # Acted on whatever follows: neither a full disk nor a closed terminal makes them untrue.
        alerts += record.alerts
        self._log.save_arrays(record.step, arrays_name(name), arrays)
        self._log.append(record)
        self._tell(record, [*history, record])

    def _tell(self, record: AuditRecord, history: list[AuditRecord]) -> None:
        """Writers come after the log: what breaks in one of them costs no record, and not what the next one shows."""
        try:
            if self._writer is not None:
                self._writer.write(record, history)
        except _ANYTHING:
            logger.warning("align_audit could not write step %d to TensorBoard", record.step, exc_info=True)
        try:
            print_record(record)
        except _ANYTHING as error:
            self._warn_once(f"align_audit could not print step {record.step}: {type(error).__name__}: {error}")

    def _act(self, control: TrainerControl, state: TrainerState, alerts: list[Alert], just_saved: bool) -> None:
        config = self.config.alerts
        serious = {"error"} if config.action_level == "error" else {"error", "warning"}
        reasons = sorted({alert.rule for alert in alerts if alert.level in serious})
        if not reasons or config.action == "log":
            return
        if config.action == "stop":
            logger.warning("align_audit stops training at step %d: %s", state.global_step, ", ".join(reasons))
            control.should_training_stop = True
        if not just_saved:
            logger.warning("align_audit saves a checkpoint at step %d: %s", state.global_step, ", ".join(reasons))
            if state.global_step == 0:
                self._save_next = True  # the Trainer forgets a wish to save that is made before the first step
            else:
                control.should_save = True

    def _record_failure(self, state: TrainerState, broken: _Broken, rank: int = 0) -> None:
        """Keep it where this process keeps the log, and say it once."""
        where = "" if rank == 0 else f" on rank {rank}"
        outcome = "was recorded"
        if self._log is not None:
            text = broken.traceback if rank == 0 else f"On rank {rank}:\n{broken.traceback}"
            try:
                self._log.append_failure(state.global_step, text, broken.probe_name)
            except Exception as error:
                outcome = f"could not be recorded ({type(error).__name__}: {error})"
        elif not (self._ranks.size == 1 or rank == self._ranks.rank):
            return  # somebody else's, who says it
        on = "" if broken.probe_name is None else f" on the probes {broken.probe_name!r}"
        self._warn_once(
            f"the audit at step {state.global_step}{on} broke{where} and {outcome}; training goes on. {broken.kind} (shown "
            "once; the traceback is in align_audit/failures.jsonl)",
            broken.kind,
        )

    def _warn_once(self, words: str, key: str | None = None) -> None:
        """On the error log, the first time that ``key`` (or these words) comes up."""
        key = words if key is None else key
        if key not in self._failures_shown:
            self._failures_shown.add(key)
            logger.error("%s", words)


def _by_name(probes: Any) -> TypeGuard[Mapping[str, Any]]:
    """Several sets by name; a mapping with the columns of pairs is one record or a table, which is refused as data."""
    return isinstance(probes, Mapping) and not {"chosen", "chosen_ids"} & set(probes)


__all__ = ["AlignmentAuditCallback"]
