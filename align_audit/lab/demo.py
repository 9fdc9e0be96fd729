"""``align-audit demo``: two real DPOTrainer runs of the shipped model, audited from inside, and what to look at."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from align_audit.errors import ConfigurationError
from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.record.log import FOLDER, REPORT
from align_audit.record.run import AuditRun
from align_audit.writers.plots.gallery import save_all
from align_audit.writers.standing import figure, percent
from align_audit.writers.words import SCRIPT

_INTRODUCTION = """[bold]align_audit demo[/]: the same small model is preference-trained twice, with the audit on.
[dim]chosen: change of the chosen answers' log-probability, nats per token · KL: to the reference, nats per token
tokens: share of next tokens that are right · reward margin: as TRL computes it, on held-out pairs
Runs of seconds, audited at fixed steps: audits take half of the time here, and about 5 % by default in a long run.[/]
"""
_MARKER = ".align-audit-demo"


@dataclass(frozen=True)
class DemoRun:
    """What differs between the runs; the rest of their ``DPOConfig`` is the same."""

    name: str
    title: str
    learning_rate: float
    beta: float
    steps: int
    audit_every: int


HEALTHY = DemoRun("healthy", "a run that works", learning_rate=1e-4, beta=0.1, steps=60, audit_every=20)
RUINED = DemoRun("ruined", "a run that ruins its model", learning_rate=3e-3, beta=0.02, steps=40, audit_every=20)

TRAINING_PAIRS = 480
HELD_OUT_PAIRS = 64
AUDITED_PAIRS = 24
BATCH_SIZE = 8
MOST_LOOKS = 6
"""Health audits of a run, beside those at its start."""
SEED = 0


@dataclass(frozen=True)
class Outcome:
    """One run: the last line of its training log, and its audits."""

    settings: DemoRun
    log: dict[str, float]
    run: AuditRun
    pictures: dict[str, Path]


def run_demo(output: Path) -> tuple[Outcome, Outcome]:
    """Train, audit, draw and explain. Offline, on a CPU.

    Raises:
        ConfigurationError: ``output`` holds something that no demo has written.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.perf_counter()
    console = _console()
    with _replaced(output):
        console.print(_INTRODUCTION)
        # A model this small gains nothing from more threads, and loses much where other programs want the cores too.
        with threadpool_limits(limits=1):
            healthy = _train(HEALTHY, output, console)
            ruined = _train(RUINED, output, console)
        _conclude(healthy, ruined, output, time.perf_counter() - began, console)
    return healthy, ruined


@contextlib.contextmanager
def _replaced(output: Path) -> Iterator[None]:
    """An empty folder; what an earlier demo left is replaced once this one is done, and comes back where it breaks."""
    output = output.resolve()  # what a link leads to is replaced, and the link stays
    aside: Path | None = None
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / _MARKER).exists():
            raise ConfigurationError(f"{output} exists and was not written by this demo; choose another --output")
        aside = output.with_name(f".{output.name}-{os.getpid()}")
        output.rename(aside)
    try:
        _prepare(output)
        yield
    except BaseException:
        if aside is not None:
            shutil.rmtree(output, ignore_errors=True)
            aside.rename(output)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _prepare(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / _MARKER).write_text("Written by `align-audit demo`, which replaces this folder.\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write to {output}: {error}; choose another --output") from error


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _train(settings: DemoRun, output: Path, console: Any) -> Outcome:
    """One run as a user's script would do it: three lines of it are ours."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from align_audit import AlignmentAuditCallback, AuditConfig

    _quieten()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    console.rule(f"[bold]{settings.title}[/]: learning rate {settings.learning_rate:g}, beta {settings.beta:g}")
    pairs = preference_pairs(TRAINING_PAIRS + HELD_OUT_PAIRS, seed=SEED)
    log = _TrainingLog(console)

    callback = AlignmentAuditCallback(
        config=AuditConfig.from_dict(
            {
                "max_pairs": AUDITED_PAIRS,
                # As by default, but for full audits at fixed steps, whatever their share of a run that takes seconds.
                "schedule": {"every_n_steps": settings.audit_every, "most_looks": MOST_LOOKS},
                "budget": None,
                "low_rank": {"ranks": [1, 2, 4, 8, 16, 32]},
                "progress": False,
            }
        )
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(output / settings.name),
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            max_steps=settings.steps,
            per_device_train_batch_size=BATCH_SIZE,
            lr_scheduler_type="constant",
            logging_steps=settings.audit_every // 2,
            save_steps=settings.audit_every,
            save_only_model=True,
            report_to=["tensorboard"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Dataset.from_list(pairs[:TRAINING_PAIRS]),
        eval_dataset=Dataset.from_list(pairs[TRAINING_PAIRS:]),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        callbacks=[log, callback],
    )
    trainer.remove_callback(PrinterCallback)
    callback.attach(trainer)
    trainer.train()

    run = AuditRun.load(output / settings.name)
    return Outcome(settings, log.last, run, save_all(run.records, output / settings.name / "pictures"))


def _quieten() -> None:
    """The libraries print nothing of their own."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def _TrainingLog(console: Any) -> Any:
    """A callback that prints what everybody watches; made here so that transformers loads only when needed."""
    from transformers.trainer_callback import TrainerCallback

    class TrainingLog(TrainerCallback):
        last: dict[str, float] = {}  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "rewards/margins" in logs and "loss" in logs:
                self.last = {key: float(value) for key, value in logs.items()}
                console.print(
                    f"[dim]training log, step {state.global_step:>3}:  loss {logs['loss']:.3f}   "
                    f"accuracy {logs['rewards/accuracies']:.2f}   margin {logs['rewards/margins']:+.2f}[/]"
                )

    return TrainingLog()


def _conclude(healthy: Outcome, ruined: Outcome, output: Path, seconds: float, console: Any) -> None:
    from rich.table import Table

    console.rule("[bold]what the training log says, and what the audit saw[/]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", healthy.settings.name, ruined.settings.name):
        table.add_column(title, justify="left")

    def row(name: str, read: Any) -> None:
        table.add_row(name, read(healthy), read(ruined))

    table.add_row("[dim]training log[/]", "", "")
    row("  loss", lambda outcome: f"{outcome.log['loss']:.3f}")
    row("  reward accuracy", lambda outcome: f"{outcome.log['rewards/accuracies']:.2f}")
    row("  reward margin", lambda outcome: f"{outcome.log['rewards/margins']:+.2f}")
    table.add_row("[dim]audit, held-out pairs[/]", "", "")

    def margins(outcome: Outcome) -> Any:
        return outcome.run.records[-1].margins

    row("  chosen log-prob.", lambda o: f"{figure(margins(o).chosen_logp_change_per_token.mean, True)} nats per token")
    row("  KL to reference", lambda o: f"{figure(margins(o).kl.mean)} nats per token")
    row(
        "  next-token accuracy",
        lambda o: (
            f"{percent(margins(o).token_accuracy.mean)} (was {percent(margins(o).reference_token_accuracy.mean)})"
        ),
    )
    row("  error alerts", _alerts)
    console.print(table)
    console.print()
    for words in _what_next(healthy, ruined, output):
        console.print(words, soft_wrap=True, markup=False)
    console.print(SCRIPT, markup=False)
    console.print(f"[dim]{seconds:.0f} s in all[/]")


def _what_next(healthy: Outcome, ruined: Outcome, output: Path) -> Iterator[str]:
    """Where to look, the first place first, and how to go on."""
    folders = [output / outcome.settings.name for outcome in (healthy, ruined)]
    yield f"Open first: {folders[1] / FOLDER / REPORT}"
    yield f"  and then: {folders[0] / FOLDER / REPORT}"
    yield f"Side by side: align-audit compare {folders[0]} {folders[1]}"
    yield f"Beside TRL's own curves: tensorboard --logdir {output} (its tab Align audit)"
    yield f"Pictures: {len(healthy.pictures)} in {folders[0] / 'pictures'}, {len(ruined.pictures)} in {folders[1] / 'pictures'}"
    yield ""
    yield "In a script of yours (`align-audit doctor` tries beforehand whether it works there):"


def _alerts(outcome: Outcome) -> str:
    errors = [alert for alert in outcome.run.alerts if alert.level == "error"]
    if not errors:
        return "none"
    first = min(alert.step for alert in errors)
    return f"from step {first} on"
