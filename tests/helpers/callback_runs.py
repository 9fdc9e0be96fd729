"""Tiny trainings with the callback on, and what tests do to them at some event."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from tests.helpers.audits import QUICK
from tests.helpers.dpo import Trained, build

CREATED = "ref_model made"


def quick(**changes: Any) -> AuditConfig:
    """The least that is an audit: margins and patching on four pairs."""
    return AuditConfig.from_dict({**QUICK, "strict": True, **changes})


def run(
    output: Path,
    config: AuditConfig | None = None,
    *,
    mode: str = CREATED,
    others: list[TrainerCallback] | None = None,
    after: list[TrainerCallback] | None = None,
    attach: bool = True,
    resume: bool | str = False,
    **options: Any,
) -> Trained:
    """One training with the callback on; ``others`` stand before it among the callbacks, ``after`` behind it."""
    callback = AlignmentAuditCallback(config=config if config is not None else quick())
    trained = build(output, mode, [*(others or []), callback, *(after or [])], **options)
    if attach:
        callback.attach(trained.trainer)
    with contextlib.redirect_stdout(None):
        trained.trainer.train(resume_from_checkpoint=resume or None)
    return trained


def steps(output: Path) -> list[int]:
    return [record.step for record in AuditRun.load(output).records]


def events(folder: Path) -> EventAccumulator:
    """Everything TensorBoard would show of a folder as one run."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def event_files(output: Path) -> list[Path]:
    return sorted(output.rglob("events.out.tfevents.*"))


class At(TrainerCallback):
    """Calls ``action(model=…, state=…, control=…)`` at one event of one step, once."""

    def __init__(self, event: str, step: int, action: Callable[..., None]) -> None:
        self.step, self.action, self.fired = step, action, 0
        setattr(self, event, self._maybe)

    def _maybe(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.fired:
            self.fired += 1
            self.action(model=kwargs["model"], state=state, control=control)


def stop(control: Any, **_: Any) -> None:
    control.should_training_stop = True


def poison(model: Any, **_: Any) -> None:
    """One NaN in a weight of the second layer, as an overflow would leave it."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


def shift_weight(model: Any, **_: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0


def out_of_memory(**_: Any) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
