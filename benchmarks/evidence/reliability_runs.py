"""What ``reliability.py`` does to a run: a small DPO training, places in it at which things happen, and what happens there."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

STEPS = 4
AT = 2
"""The step at whose audit most things happen: training has two more."""


@dataclass
class Now:
    """Where a run is: the step that is audited, or was last; and whether it is being audited."""

    step: int = -1
    auditing: bool = False


@dataclass
class Trained:
    """What a training did.

    Attributes:
        losses: at each step.
        weights: hash of the final ones; None: the script did not come to saving them.
        raised: what ``train()`` raised; None: it returned.
        said: the messages of the package and its warnings.
    """

    losses: list[float] = field(default_factory=list)
    weights: str | None = None
    raised: BaseException | None = None
    said: list[str] = field(default_factory=list)


@cache
def parts() -> tuple[Any, Any, list[Any]]:
    """A tokenizer, a tiny model's state, and preference pairs: the same for every run."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from align_audit.lab import MODEL_DIR
    from align_audit.lab.corpus import preference_pairs

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config), preference_pairs(16, seed=0)


def trainer_for(output: Path, callbacks: list[Any]) -> Any:
    """A ``DPOTrainer`` of so many steps, which saves at every second one."""
    import copy

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer, model, pairs = parts()
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            str(output), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=7, gradient_checkpointing=False, bf16=False,
        ),
        train_dataset=Dataset.from_list(pairs[:8]),
        eval_dataset=Dataset.from_list(pairs[8:]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _at(wanted: int) -> Callable[[Any], str | None]:
    """A rule that fires at one step."""

    def check(history: Any) -> str | None:
        return "planted" if history.step == wanted else None

    return check


def audit_callback() -> Any:
    """The callback: an audit at every step, as small as can be, with an alert that opens at each."""
    from align_audit import AlignmentAuditCallback, AuditConfig

    return AlignmentAuditCallback(
        config=AuditConfig.from_dict(
            {
                "max_pairs": 8,
                "patching": {"noise_draws": 1, "reverse": False},
                "statistics": {"bootstrap_resamples": 100},
                "localization": {"enabled": False},
                "low_rank": {"enabled": False},
                "spinal": {"enabled": False},
                "tensorboard_images": False,
                "generations": {"enabled": False},
                "budget": None,
                "schedule": {"every_n_steps": 1},
                "alerts": {"rules": {f"step_{step}": {"check": _at(step), "level": "error"} for step in range(1, 9)}},
            }
        )
    )


def train(
    output: Path, around: Callable[[Any, Now], Any] | None = None, *, audited: bool = True, resume: bool = False
) -> Trained:
    """One script: build, train, save. Nothing that happens in it leaves but the end of the process.

    Args:
        around: given the trainer, makes the context in which it trains.
    """
    from align_audit.models.weights.fingerprint import fingerprint

    trained, now = Trained(), Now()
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(OneLine())
    # What the planted alerts say is known.
    handler.addFilter(lambda entry: entry.name != "align_audit.alerts")
    logger = logging.getLogger("align_audit")
    logger.addHandler(handler)
    logger.propagate = False
    printed = sys.stdout
    try:
        with warnings.catch_warnings(record=True) as caught, quiet():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, message=".*(align_audit|audit log|records|alerts)")
            callback = audit_callback()
            trainer = trainer_for(output, [callback] if audited else [])
            if audited:
                callback.attach(trainer)
            with watched(now), around(trainer, now) if around is not None else contextlib.nullcontext():
                try:
                    trainer.train(resume_from_checkpoint=resume or None)
                    trainer.save_model(str(output / "final"))
                    trained.weights = fingerprint(trainer.model)
                except BaseException as error:
                    trained.raised = error
            trained.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            callback._run = None  # a script that ends lets go of its log
            trained.said = [str(warning.message) for warning in caught]
    finally:
        sys.stdout = printed
        logger.removeHandler(handler)
    trained.said = stream.getvalue().splitlines() + trained.said
    return trained


class OneLine(logging.Formatter):
    """The message without its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(record.getMessage().split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the tables and progress bars of a run."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# -- places ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(where: str, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    """``where.name`` (a module, or a class in it) is what ``made`` makes of it."""
    module, _, inside = where.partition(":")
    owner: Any = importlib.import_module(f"align_audit.{module}")
    owner = getattr(owner, inside) if inside else owner
    real = getattr(owner, name)
    setattr(owner, name, made(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextlib.contextmanager
def watched(now: Now) -> Iterator[None]:
    """Inside, ``now`` says which step is audited."""

    def made(real: Any) -> Any:
        def run_audit(models: Any, request: Any, *more: Any) -> Any:
            now.step, now.auditing = request.step, True
            try:
                return real(models, request, *more)
            finally:
                now.auditing = False

        return run_audit

    with replaced("monitoring.monitor", "run_audit", made):
        yield


PLACES: dict[str, tuple[str, str]] = {
    "in set-up": ("monitoring.start", "check_audit"),
    "when the schedule is asked": ("monitoring.callback", "decide"),
    "when an audit begins": ("auditing.audit", "Session"),
    "in a layer's call": ("", "model.layers.1"),
    "in the head": ("", "lm_head"),
    "when arrays are written": ("record.log:RunLog", "save_arrays"),
    "when the record is written": ("record.log:RunLog", "append"),
    "between record and alerts": ("record.log:RunLog", "_append_alerts"),
    "in a writer (TensorBoard)": ("writers.tensorboard:TensorBoard", "record"),
    "in a writer's alert (terminal)": ("writers.terminal:Terminal", "alert"),
    "when a writer closes": ("writers.tensorboard:TensorBoard", "close"),
}
"""What happens there → where that is in the package; without a module: in the policy, while it is audited."""
ANY_STEP = ("in set-up", "when a writer closes")


@contextlib.contextmanager
def at(place: str, step: int, action: Callable[[], None], trainer: Any, now: Now) -> Iterator[None]:
    """The action is done whenever training comes to the place, at that step."""
    where, name = PLACES[place]

    def is_now() -> bool:
        return place in ANY_STEP or now.step == step

    if not where:
        module = trainer.model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda *_: action() if now.auditing and is_now() else None)
        try:
            yield
        finally:
            hook.remove()
        return

    def made(real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if is_now():
                action()
            return real(*args, **kwargs)

        return called

    with replaced(where, name, made):
        yield


# -- actions -----------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def signalled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def once(action: Callable[[], None]) -> Callable[[], None]:
    """The first time only."""
    done: list[bool] = []

    def first() -> None:
        if not done:
            done.append(True)
            action()

    return first


def deleted(folder: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(folder, ignore_errors=True)


def filled(folder: Path) -> Callable[[], None]:
    """The small disk of a folder has 2 KB left."""

    def action() -> None:
        filler = folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        os.truncate(filler, max(0, filler.stat().st_size - 2048))

    return action


def read_only(folder: Path) -> Callable[[], None]:
    """Nothing in the folder can be opened for writing any more (permission bits do not bind root)."""

    def action() -> None:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    return action


def unread() -> None:
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w", encoding="utf-8")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 2 MB at this folder.

    Raises:
        PermissionError: this user cannot mount.
    """
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.decode().strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def recovered(folder: Path) -> None:
    """The disk has room and may be written to again, as somebody would see to it before looking at the log."""
    if not os.access(folder, os.W_OK):
        subprocess.run(["umount", "-l", folder], check=True)
    (folder / "filler").unlink(missing_ok=True)


def in_child(work: Callable[[], Trained]) -> int:
    """Do it in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = 1
        try:
            status = 0 if work().raised is None else 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
