"""Peak memory of one audit above the models: against the number of probe pairs, and against a step of training.

    python benchmarks/cost/memory.py --pairs 32 64 128 256
    python benchmarks/cost/memory.py --step --pairs 32

Each measurement runs in its own process (memory that an allocator keeps would blur a second one), on a randomly
initialized Llama and random tokens: memory does not depend on what the numbers are. Resident memory is sampled by a
thread every 2 ms. ``--step`` also measures one step of ``DPOTrainer`` (full fine-tuning, AdamW, gradient checkpointing
off) on as many tokens as one batch of the audit holds: what it takes above policy and reference is activations,
gradients and optimizer state. Prints a table; --json FILE writes it too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VOCABULARY = 2048


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peak MiB above the start, and seconds, of what runs inside."""
    import psutil

    process = psutil.Process()
    start, done = process.memory_info().rss, threading.Event()
    found: dict[str, float] = {"peak_mib": 0.0, "seconds": 0.0}

    def watch() -> None:
        while not done.is_set():
            found["peak_mib"] = max(found["peak_mib"], (process.memory_info().rss - start) / 2**20)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - began
        done.set()
        watcher.join()


def models(width: int, layers: int) -> tuple[Any, Any]:
    """A reference, and a policy a little way from it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=2 * width, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    policy = LlamaForCausalLM(config).eval()
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    return policy, reference


def token_rows(pairs: int, length: int) -> list[dict[str, list[int]]]:
    """Random pairs: half of ``length`` prompt, half completion."""
    import numpy as np

    generator = np.random.default_rng(0)

    def tokens() -> list[int]:
        return generator.integers(1, VOCABULARY, size=length // 2).tolist()

    return [{"prompt_ids": tokens(), "chosen_ids": tokens(), "rejected_ids": tokens()} for _ in range(pairs)]


def measure_audit(pairs: int, width: int, layers: int, length: int, max_rows: int) -> dict[str, float]:
    """One audit; runs in a process of its own."""
    from align_audit import AuditConfig, ProbeSet, audit

    policy, reference = models(width, layers)
    probes = ProbeSet.from_dataset(token_rows(pairs, length), None, max_pairs=pairs)
    settings = AuditConfig.from_dict(
        {
            "max_pairs": pairs,
            "batch_tokens": 8 * length,
            "working_memory_mb": 64,
            "spinal": {"max_rows": max_rows},
            "low_rank": {"ranks": [1, 4], "random_draws": 1},
            "patching": {"noise_draws": 1},
            "statistics": {"bootstrap_resamples": 100},
        }
    )
    # One pair first: what libraries allocate once (thread pools, code) is not the audit's.
    audit(policy, reference, probes.subsample(1, 0), settings)
    with watched() as found:
        audit(policy, reference, probes, settings)
    return {"pairs": pairs, **found}


def measure_step(width: int, layers: int, length: int) -> dict[str, float]:
    """One step of DPOTrainer on the tokens of one batch of the audit (8·length); runs in a process of its own."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    policy, reference = models(width, layers)
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(kinds.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t0"
    )
    pairs = 4  # 2 · 4 rows of ``length`` tokens
    rows = [
        {name.removesuffix("_ids"): " ".join(f"t{i}" for i in ids) for name, ids in row.items()}
        for row in token_rows(2 * pairs, length)
    ]

    class Watch(TrainerCallback):
        """Measures the step, and not what the trainer does around it."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}
            self._inside: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self._inside = watched()
                self.found = self._inside.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self._inside.__exit__(None, None, None)

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            folder, max_steps=1, per_device_train_batch_size=pairs, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, max_length=None, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=policy, ref_model=reference, args=options, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[watch],
        )  # fmt: skip
        torch.set_num_threads(2)
        trainer.train()
    return {"pairs": pairs, **watch.found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--step", action="store_true", help="also one training step on a batch of as many tokens")
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.width, options.layers, options.length)
    if options.one is not None:
        if options.one == "step":
            print(json.dumps(measure_step(*shape)))
        else:
            print(json.dumps(measure_audit(int(options.one), *shape, options.max_rows)))
        return
    names = ("--width", "--layers", "--length", "--max-rows")
    values = (*shape, options.max_rows)
    arguments = [text for name, value in zip(names, values, strict=True) for text in (name, str(value))]
    rows = []
    print(
        f"{platform.processor() or platform.machine()}, {options.layers} layers of {options.width}, {options.length} tokens"
    )
    print(f"{'pairs':>14} {'peak above the models':>22} {'seconds':>8}")
    for what in [*map(str, options.pairs), *(["step"] if options.step else [])]:
        command = [sys.executable, __file__, "--one", what, *arguments]
        # glibc keeps freed blocks below a threshold that grows by itself; mapped ones go back at once, so that what is
        # resident is what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        row = {"what": what, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        label = "training step" if what == "step" else what
        print(f"{label:>14} {row['peak_mib']:>18.1f} MiB {row['seconds']:>8.1f}", flush=True)
    if options.step:
        print(f"largest audit / training step: {max(r['peak_mib'] for r in rows[:-1]) / rows[-1]['peak_mib']:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
