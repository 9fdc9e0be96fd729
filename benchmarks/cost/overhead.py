"""What the default schedule costs a training: the same run with and without the callback, in turn.

    python benchmarks/cost/overhead.py                                      # the demo's healthy run, a minute or two
    python benchmarks/cost/overhead.py --layers 12 --width 512 --steps 300                    # two hours on a core
    python benchmarks/cost/overhead.py --layers 12 --width 512 --steps 300 --plain-steps 60   # a bit more than one
    python benchmarks/cost/overhead.py --layers 12 --width 512 --steps 300 --plain-steps 40 --plain-after --threads 2
    python benchmarks/cost/overhead.py --layers 12 --width 512 --steps 300 --side-by-side

Printed: seconds and CPU seconds of all trainings, the median of their steps between audits (which audits are not to slow
down), how many looks and full audits there were, and the share of the time that went into them: by the difference of the
runs, step for step, and as the records themselves say it. Where all train as long, the weights are compared too: they have to
be the same, bit by bit. A machine that others share is not as fast all the time: with ``--plain-after`` the run without the
callback is made once more behind the one with it, and the difference is taken from both; with ``--side-by-side`` both are made
at once, each on cores of its own, so that what slows the machine down slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.lab.demo import BATCH_SIZE, HEALTHY
from align_audit.models.weights.fingerprint import fingerprint


@dataclass(frozen=True)
class Timed:
    """One training."""

    seconds: float
    cpu: float
    steps: int
    weights: str
    step: float
    """Seconds of a step between audits: the median of all but the first."""


class Clock(TrainerCallback):
    """Seconds of each step, without what other callbacks do at its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def model_of(layers: int | None, width: int) -> Any:
    """The shipped model, or an untrained Llama of that shape with its vocabulary."""
    if layers is None:
        return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    torch.manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(MODEL_DIR).vocab_size
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64,
        )
    )  # fmt: skip


def train(output: Path, options: argparse.Namespace, steps: int, audited: bool) -> Timed:
    """One training as a user's script makes it; three lines of it are ours."""
    pairs = preference_pairs(480 + options.probes, seed=0)
    torch.manual_seed(0)
    clock, callbacks = Clock(), [AlignmentAuditCallback()] if audited else []
    trainer = DPOTrainer(
        model=model_of(options.layers, options.width),
        # A model that was never saved has no path that the trainer could make its reference from.
        ref_model=model_of(options.layers, options.width),
        args=DPOConfig(
            output_dir=str(output), learning_rate=options.rate, beta=HEALTHY.beta, max_steps=steps,
            per_device_train_batch_size=options.batch, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(pairs[:480]),
        eval_dataset=Dataset.from_list(pairs[480:]),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        callbacks=[clock, *callbacks],
    )  # fmt: skip
    for callback in callbacks:
        callback.attach(trainer)
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(None):
        trainer.train()
    took, spent = time.perf_counter() - began, time.process_time() - cpu
    return Timed(took, spent, steps, fingerprint(trainer.model), median(clock.seconds[1:] or clock.seconds))


def side_by_side(folder: Path, options: argparse.Namespace) -> list[Timed]:
    """The run without the callback and the one with it, at once, in a process each with a half of the cores.

    Raises:
        SystemExit: there are fewer cores than threads of both.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 * options.threads:
        raise SystemExit(
            f"--side-by-side needs {2 * options.threads} cores for {options.threads} threads each; found {len(cores)}"
        )
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        half = len(cores) // 2
        made = [
            pool.submit(train_on, cores[:half], folder / "plain", options, audited=False),
            pool.submit(train_on, cores[half : 2 * half], folder / "audited", options, audited=True),
        ]
        return [future.result() for future in made]


def train_on(cores: list[int], output: Path, options: argparse.Namespace, *, audited: bool) -> Timed:
    """One training in a process of its own, on these cores."""
    os.sched_setaffinity(0, cores)
    disable_progress_bars()
    torch.set_num_threads(options.threads)
    return train(output, options, options.steps, audited=audited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of an untrained Llama; default: the shipped model")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=HEALTHY.steps)
    parser.add_argument("--plain-steps", type=int, help="of the run without the callback; default: as many")
    parser.add_argument("--plain-after", action="store_true", help="make the run without the callback again at the end")
    parser.add_argument(
        "--side-by-side", action="store_true", help="make both at once, each on a half of the cores (Linux)"
    )
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, default=HEALTHY.learning_rate, help="an untrained model drifts at the demo's"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.side_by_side and (options.plain_steps or options.plain_after):
        parser.error("--side-by-side makes both runs as long and at once; leave out --plain-steps and --plain-after")
    disable_progress_bars()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        plain_steps = options.plain_steps or options.steps
        if options.side_by_side:
            *plain, audited = side_by_side(Path(folder), options)
        else:
            plain = [train(Path(folder) / "plain", options, plain_steps, audited=False)]
            audited = train(Path(folder) / "audited", options, options.steps, audited=True)
        if options.plain_after:
            plain.append(train(Path(folder) / "plain_after", options, plain_steps, audited=False))
        run = AuditRun.load(Path(folder) / "audited")
    kinds = Counter(record.kind for record in run.records)
    last = run.records[-1].occasion
    for name, run_of in [*(("without", run_of) for run_of in plain), ("with", audited)]:
        print(
            f"{name:>10} {run_of.steps:5} steps {run_of.seconds:8.1f} s  {run_of.cpu:8.1f} CPU s, a step between audits "
            f"{run_of.step:.3f} s (median)"
        )
    trained = sum(run_of.steps for run_of in plain)
    seconds, cpu = sum(run_of.seconds for run_of in plain) / trained, sum(run_of.cpu for run_of in plain) / trained
    print(f"looks {kinds['health']}, full audits {kinds['full']}, at steps {[record.step for record in run.records]}")
    print(f"seconds each {[round(record.cost.seconds, 2) for record in run.records]}")
    print(f"share of the time, by the difference: {1 - seconds * audited.steps / audited.seconds:.1%} ", end="")
    print(
        f"(CPU {1 - cpu * audited.steps / audited.cpu:.1%}), by the records: {last.share_spent if last else None:.1%}"
    )
    same = (
        all(run_of.weights == audited.weights for run_of in plain) if plain_steps == audited.steps else "not compared"
    )
    print(f"same weights: {same}; status {run.status}")


if __name__ == "__main__":
    main()
