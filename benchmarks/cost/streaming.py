"""One audit against a reference on disk: streamed layer by layer, or loaded whole. Memory and time of each.

    python benchmarks/cost/streaming.py --layers 12 --width 1024 --vocab 8192

A randomly initialized Llama is saved; one policy (the same weights, moved a little) is audited against that directory in
processes of their own: `streamed`, `whole` (``stream=False``), and `in memory`, where the reference is there before the
measurement begins, so that its peak is what the audit itself works with. All three find the same numbers, which is
checked on the reference's hash and the effects.

Peaks are of resident memory (``VmRSS`` of ``/proc/self/status``, sampled every 2 ms; Linux only) above what is resident
when the policy stands. The part that no file backs (``RssAnon``) stands beside it: where the dtype on disk is the policy's,
transformers leaves a whole reference mapped from its file, and the kernel may drop those pages at will, at the price of
reading them again. Streaming maps nothing, it reads. The reference's share of a peak is the peak less that of
`in memory`. Bounds: two layers plus embeddings (and head where it is not tied), and 1.5 times the seconds of `whole`.
Prints a table; --json FILE writes it too.
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
from pathlib import Path
from typing import Any

WAYS = ("in memory", "whole", "streamed")
TIME_BOUND = 1.5


def build(options: argparse.Namespace, folder: Path) -> None:
    """Save the reference."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, intermediate_size=options.inner or 11 * options.width // 4,
        pad_token_id=0, tie_word_embeddings=options.tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, options.stored)).save_pretrained(folder, max_shard_size=options.shard)


def resident() -> tuple[int, int]:
    """Bytes of this process's resident memory: all, and what no file backs."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssAnon"].split()[0]) * 1024


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes and seconds of one audit; runs in a process of its own."""
    import numpy as np
    import torch

    from align_audit import AuditConfig, ProbeSet
    from align_audit.auditing.once import audit_once
    from align_audit.models.loading import load_model
    from align_audit.models.reference import resolve_reference
    from align_audit.models.weights.streaming import find_layers

    policy: Any = load_model(folder, dtype=getattr(torch, options.dtype))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            # A tensor of its own: what is loaded may be mapped from the file, which would hide it from the count.
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = parameter.data + 0.02 * parameter.std() * noise
        del noise
    draw = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return draw.integers(1, options.vocab, size=count).tolist()

    half = options.length // 2
    rows = [
        {"prompt_ids": tokens(half), "chosen_ids": tokens(half), "rejected_ids": tokens(half)}
        for _ in range(options.pairs)
    ]
    probes = ProbeSet.from_dataset(rows, None, max_pairs=options.pairs)
    settings = AuditConfig.from_dict(
        {
            "max_pairs": options.pairs,
            "batch_tokens": options.batch_tokens,
            "working_memory_mb": options.working_memory,
            "spinal": {"max_rows": 256},
            "low_rank": {"enabled": options.low_rank, "ranks": [1, 4], "random_draws": 1},
            "patching": {"noise_draws": 1},
            "statistics": {"bootstrap_resamples": 100},
        }
    )
    given: Any = load_model(folder, dtype=getattr(torch, options.dtype)) if options.one == "in memory" else folder
    if options.one == "in memory":
        for parameter in given.parameters():
            parameter.data = parameter.data.clone()
    policy.requires_grad_(False)  # nothing trains: the weights that it shares with a twin are not about to move
    # A policy audited against itself first: what libraries allocate once (thread pools, code) is not the reference's.
    audit_once(policy, resolve_reference(policy, _twin(policy)), probes.subsample(1, 0), settings)
    import gc

    gc.collect()
    reference = resolve_reference(policy, given, stream=options.one == "streamed")
    start, start_anonymous = resident()
    peak = peak_anonymous = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak, peak_anonymous
        while not done.is_set():
            now, now_anonymous = resident()
            peak, peak_anonymous = max(peak, now - start), max(peak_anonymous, now_anonymous - start_anonymous)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, busy = time.perf_counter(), time.process_time()
    result = audit_once(policy, reference, probes, settings)
    record, arrays = result.record, result.arrays
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    done.set()
    watcher.join()
    _, layers = find_layers(policy)
    layer = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    everything = sum(p.numel() * p.element_size() for p in policy.parameters())
    return {
        "way": options.one,
        "source": record.reference_check.source,
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak": peak,
        "peak_anonymous": peak_anonymous,
        "layer": layer,
        "outside": everything - layer * len(layers),
        "model": everything,
        "hash": record.provenance.reference_hash,
        "effects": float(np.abs(arrays["per_pair.effect"]).sum()),
    }


def _twin(policy: Any) -> Any:
    """The policy's own tensors in a second module: a reference that takes no memory."""
    import copy

    return copy.deepcopy(policy, {id(p): p for p in policy.parameters()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=0, help="width inside the MLP; 0: 11/4 of --width")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tied", action="store_true", help="one matrix for embeddings and head")
    parser.add_argument("--stored", default="float32", help="dtype on disk")
    parser.add_argument("--dtype", default="float32", help="dtype of the policy, and so of the reference")
    parser.add_argument("--shard", default="5GB", help="max_shard_size of the saved reference")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--working-memory", type=int, default=64, help="MiB")
    parser.add_argument("--low-rank", action="store_true", help="with the two passes of low-rank reconstruction")
    parser.add_argument("--json")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        if options.one is None:
            build(options, Path(options.folder))
        else:
            print(json.dumps(measure(options, Path(options.folder))))
        return
    # glibc keeps freed blocks below a threshold that grows by itself; mapped ones go back at once, so that what is
    # resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        subprocess.run(command, capture_output=True, text=True, check=True)
        for way in WAYS:
            done = subprocess.run(
                [*command, "--one", way], stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            rows[way] = json.loads(done.stdout.splitlines()[-1])
    found = {row["hash"] for row in rows.values()}, {row["effects"] for row in rows.values()}
    assert all(len(values) == 1 for values in found), f"the three audits differ: {found}"
    one = rows["streamed"]
    mib = 2**20
    bound = 2 * one["layer"] + one["outside"]
    print(
        f"{platform.processor() or platform.machine()}, {options.layers} layers of {options.width}, vocabulary "
        f"{options.vocab}, {options.stored} on disk, {options.dtype} in memory, {options.pairs} pairs of {options.length} "
        "tokens"
    )
    print(
        f"one layer {one['layer'] / mib:.1f} MiB, embeddings and head {one['outside'] / mib:.1f} MiB, "
        f"model {one['model'] / mib:.1f} MiB"
    )
    heads = ("reference", "seconds", "CPU s", "peak MiB", "anonymous", "its share", "/ bound", "/ whole s")
    widths = (10, 8, 7, 9, 10, 10, 8, 10)
    print(" ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for way, row in rows.items():
        row["share"] = row["peak"] - rows["in memory"]["peak"]
        row["share_over_bound"] = row["share"] / bound
        row["seconds_over_whole"] = row["seconds"] / rows["whole"]["seconds"]
        print(
            f"{way:>10} {row['seconds']:>8.1f} {row['cpu_seconds']:>7.1f} {row['peak'] / mib:>9.1f} "
            f"{row['peak_anonymous'] / mib:>10.1f} "
            f"{row['share'] / mib:>10.1f} {row['share_over_bound']:>8.2f} {row['seconds_over_whole']:>10.2f}"
        )
    print(
        f"memory: {one['share'] / mib:.1f} MiB of at most {bound / mib:.1f} (two layers, embeddings, head); "
        f"time: {one['seconds_over_whole']:.2f} of at most {TIME_BOUND}"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "bound": bound, "rows": list(rows.values())}, file, indent=1)


if __name__ == "__main__":
    main()
