"""What the trainer says, read once: the one place that knows TRL's and transformers' trainers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align_audit.models.weights.zero3 import engines_autocast
from align_audit.monitoring.schedule import Training
from align_audit.options.trackers import TRACKER_NAMES, TrackerName

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class TrainerFacts:
    """What a trainer and its arguments say, where they say it: any trainer of transformers will do.

    Attributes:
        attached: the trainer itself is in reach; else only its arguments are.
        output_dir: where the run's files go.
        reference: the reference that the trainer holds.
        beta: of a loss whose rewards are β times log-probability ratios to the reference, as DPO's; None: of any other loss,
            where an option of that name is something else.
        learning_rate: at its highest; None: nothing in reach says it as a number.
        eval_sets: held-out pairs, or several such sets by name; None: there are none in reach.
        train_set: the pairs trained on.
        max_length: tokens that a sequence is cut to.
        truncation_mode: which end of a sequence is kept.
        autocast: makes the context the trainer computes in; None: nothing in reach says it (see :meth:`numerics`).
        amp_dtype: what it computes in where only its arguments are in reach; None: no mixed precision.
        sync_every: steps between synchronizations of the reference with the policy; None: it is never synchronized.
        compare_precomputed: its precomputed log-probabilities are plain sums over completion tokens (no ``ld_alpha``).
        trust_remote_code: models may bring code of their own.
        revision: of the hub name that the trainer loaded its model from; None: nothing was said, or it was given a model.
        pairs_per_step: that an optimizer step is made of, over all processes; None: its arguments do not say.
        loads_best: the best checkpoint is loaded back when training ends.
        progress: it shows progress bars.
        summary_writer: gives what its own TensorBoard curves go through; None where there are none, and once it has closed
            it (which it does before the last event of ours).
        pushes_to_hub: it uploads ``output_dir``.
        trackers: those that it reports to.
    """

    attached: bool
    output_dir: str
    reference: nn.Module | None
    beta: float | None
    learning_rate: float | None
    eval_sets: Any
    train_set: Any
    max_length: int | None
    truncation_mode: str
    autocast: Callable[[], AbstractContextManager[Any]] | None
    amp_dtype: torch.dtype | None
    sync_every: int | None
    compare_precomputed: bool
    trust_remote_code: bool
    revision: str | None
    pairs_per_step: int | None
    loads_best: bool
    progress: bool
    summary_writer: Callable[[], SummaryWriter | None]
    pushes_to_hub: bool = False
    trackers: tuple[TrackerName, ...] = ()

    def numerics(self, model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """The context the trainer computes in: accelerate, or DeepSpeed, puts it around the forward, out of our reach."""
        device = next(model.parameters()).device.type
        engines = engines_autocast()
        if engines is not None:
            return lambda: engines(device)
        if self.autocast is not None:
            return self.autocast
        dtype = self.amp_dtype
        if dtype is None:
            return contextlib.nullcontext
        return lambda: torch.autocast(device, dtype=dtype)

    def last_sync_step(self, step: int) -> int | None:
        """The last step up to ``step`` at which the reference was synchronized; None: it never was."""
        return (step // self.sync_every * self.sync_every or None) if self.sync_every else None

    def training(self, state: Any, control: Any) -> Training:
        """What a ``TrainerState`` and a ``TrainerControl`` say, for the schedule."""
        step = state.global_step
        return Training(
            step=step,
            max_steps=state.max_steps,
            stopping=bool(control.should_training_stop),
            saving=bool(control.should_save),
            evaluating=bool(control.should_evaluate),
            syncs_reference=self.sync_every is not None and step % self.sync_every == 0,
            best_loaded=self.loads_best and state.best_model_checkpoint is not None,
        )


def read_trainer(trainer: Any, args: Any, train_dataloader: Any = None, state: Any = None) -> TrainerFacts:
    """Read a trainer, or the arguments of one that is out of reach.

    Args:
        trainer: None where the callback was not attached; one with other arguments is not the one that trains, and not read.
        args: its ``TrainingArguments``, of whatever kind.
        train_dataloader: what an event gives; holds the training set of a trainer that is out of reach.
        state: its ``TrainerState``, once it trains; knows the batch that ``auto_find_batch_size`` has come to.
    """
    if getattr(trainer, "args", args) is not args:
        trainer = None
    attached = trainer is not None
    loading = getattr(args, "model_init_kwargs", None) or {}
    amp_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return TrainerFacts(
        attached=attached,
        output_dir=args.output_dir,
        reference=getattr(trainer, "ref_model", None),
        beta=_beta(args),
        learning_rate=_learning_rate(trainer, args),
        eval_sets=getattr(trainer, "eval_dataset", None),
        train_set=trainer.train_dataset if attached else getattr(train_dataloader, "dataset", None),
        max_length=getattr(args, "max_length", 1024),
        truncation_mode=getattr(args, "truncation_mode", "keep_start"),
        autocast=trainer.accelerator.autocast if attached else None,
        amp_dtype=None if attached else amp_dtype,
        sync_every=args.ref_model_sync_steps if getattr(args, "sync_ref_model", False) else None,
        compare_precomputed=getattr(args, "ld_alpha", None) is None,
        trust_remote_code=bool(getattr(args, "trust_remote_code", False) or loading.get("trust_remote_code", False)),
        revision=loading.get("revision"),
        pairs_per_step=_pairs_per_step(trainer, args, state),
        loads_best=bool(getattr(args, "load_best_model_at_end", False)),
        progress=not args.disable_tqdm,
        summary_writer=_summary_writer_of(trainer),
        pushes_to_hub=bool(getattr(args, "push_to_hub", False)),
        trackers=_trackers_of(trainer, args),
    )


_IMPLICIT_REWARDS = ("DPOConfig", "KTOConfig", "OnlineDPOConfig")
"""Arguments whose ``beta`` scales log-probability ratios to rewards. Of others it weighs a penalty (GRPO, RLOO), odds (ORPO),
or log-probabilities without a reference (CPO)."""


def _beta(args: Any) -> float | None:
    if not any(kind.__name__ in _IMPLICIT_REWARDS for kind in type(args).__mro__):
        return None
    beta = getattr(args, "beta", None)
    # OnlineDPO takes one for each epoch, too.
    return float(beta) if isinstance(beta, int | float) else None


def _learning_rate(trainer: Any, args: Any) -> float | None:
    """Of the optimizer, before a schedule lowers it, where there is one in reach: a trainer that was given its own takes no
    notice of that of its arguments. Of groups with several rates the highest."""
    groups = getattr(getattr(trainer, "optimizer", None), "param_groups", None) or []
    said = [group.get("initial_lr", group.get("lr")) for group in groups] or [getattr(args, "learning_rate", None)]
    rates: list[float] = []
    for rate in said:
        with contextlib.suppress(TypeError, ValueError):  # None, and text that is no number
            rates.append(float(rate))
    return max(filter(math.isfinite, rates), default=None)


def _pairs_per_step(trainer: Any, args: Any, state: Any) -> int | None:
    """Where processes share a pair (tensor, context, sequence parallelism), only the trainer knows how many do."""
    try:
        counted = getattr(trainer, "get_total_train_batch_size", None)
        if counted is not None:
            return int(counted(args))
        on_each = getattr(state, "train_batch_size", None) or args.train_batch_size
        return int(on_each * args.gradient_accumulation_steps * args.world_size)
    except (AttributeError, TypeError, ValueError):
        return None


def _summary_writer_of(trainer: Any) -> Callable[[], SummaryWriter | None]:
    """Gives the summary writer that the trainer's own curves go through, as long as it is open."""
    boards: list[Any] = []
    if trainer is not None:
        from transformers.integrations import TensorBoardCallback

        callbacks = trainer.callback_handler.callbacks
        boards = [callback for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    return lambda: next((board.tb_writer for board in boards if board.tb_writer is not None), None)


def _trackers_of(trainer: Any, args: Any) -> tuple[TrackerName, ...]:
    """Those whose callbacks a trainer has; of one that is out of reach, those that its arguments name."""
    if trainer is None:
        reported = getattr(args, "report_to", None) or []
        return tuple(name for name in TRACKER_NAMES if name in reported)
    from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback

    kinds: dict[TrackerName, type] = {"wandb": WandbCallback, "mlflow": MLflowCallback, "trackio": TrackioCallback}
    callbacks = trainer.callback_handler.callbacks
    return tuple(name for name in TRACKER_NAMES if any(isinstance(callback, kinds[name]) for callback in callbacks))
