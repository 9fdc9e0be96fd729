"""Peak memory of one audit above the models, against the number of probe pairs.

    python benchmarks/memory.py --pairs 32 64 128 256

Each size runs in its own process (memory that an allocator keeps would blur a second measurement), on a randomly
initialized Llama and random tokens: memory does not depend on what the numbers are. Resident memory is sampled by a
thread every 2 ms while the audit runs. Prints a table; --json FILE writes it too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time


def measure(pairs: int, width: int, layers: int, length: int, max_rows: int) -> dict[str, float]:
    """Bytes and seconds of one audit; runs in a process of its own."""
    import numpy as np
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align_audit import AuditConfig, ProbeSet, audit

    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=2 * width, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    policy = LlamaForCausalLM(config).eval()
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    generator = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return generator.integers(1, 2048, size=count).tolist()

    rows = [
        {"prompt_ids": tokens(length // 2), "chosen_ids": tokens(length // 2), "rejected_ids": tokens(length // 2)}
        for _ in range(pairs)
    ]
    probes = ProbeSet.from_dataset(rows, None, max_pairs=pairs)
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
    process = psutil.Process()
    start, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    audit(policy, reference, probes, settings)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"pairs": pairs, "peak_mib": peak / 2**20, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--json")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.width, options.layers, options.length, options.max_rows)
    if options.one is not None:
        print(json.dumps(measure(options.one, *shape)))
        return
    names = ("--width", "--layers", "--length", "--max-rows")
    arguments = [text for name, value in zip(names, shape, strict=True) for text in (name, str(value))]
    rows = []
    print(
        f"{platform.processor() or platform.machine()}, {options.layers} layers of {options.width}, {options.length} tokens"
    )
    print(f"{'pairs':>6} {'peak above the models':>22} {'seconds':>8}")
    for pairs in options.pairs:
        command = [sys.executable, __file__, "--one", str(pairs), *arguments]
        # glibc keeps freed blocks below a threshold that grows by itself; mapped ones go back at once, so that what is
        # resident is what is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"{row['pairs']:>6} {row['peak_mib']:>18.1f} MiB {row['seconds']:>8.1f}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
