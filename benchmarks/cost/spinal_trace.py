"""The SPINAL depth trace (spectra and transport) of policy and reference: written plainly, and by the audit.

    python benchmarks/cost/spinal_trace.py [--repeats 3] [--json FILE]

The job: a random Llama and a policy that is the reference plus small weight noise, on preference pairs. The pairs are
real ones (HH, from $ALIGN_AUDIT_DATA or ../shared/data, 192 to 320 words each, hashed into the vocabulary) where they
are found, else random tokens with a shared prompt.

Five ways, each in a process of its own, repeats interleaved, medians printed:

- ``plain``: what a competent user writes from the formulas. Per model and batch (the audit's batches, chosen and rejected
  padded together) one forward with ``output_hidden_states=True``; after every layer the model's own norm and head on the
  whole hidden state, a vectorized float32 softmax (the root of the layer below is kept, so one softmax a layer),
  2·arccos of the Bhattacharyya coefficient, and only then the mask of completion positions; float32
  ``torch.linalg.svdvals`` of the masked rows of every layer. Rows common to chosen and rejected count once, as METHODS asks.
- ``masked``: the same, but norm, head and softmax only on the rows that count: less work and memory, the same numbers.
- ``trace``: what the audit does for the same numbers, in models that are open already: recordings, rows, transport and
  spectra of both models. Its singular values are of a float64 SVD.
- ``audit``: ``align_audit.audit`` with SPINAL alone switched on. It does more: it verifies the replay of both models, hashes
  their weights, and measures margins, KL and entropies of both.
- ``again``: the same of a run's next checkpoint: the reference's trace is known, as it is from the second audit on.

Seconds and memory come from separate runs. Memory is resident memory above the models, sampled by a thread every 2 ms,
with freed blocks going back to the system at once (that slows allocation, so no seconds are taken there). Accuracy, each
the largest relative difference: of σ in the window of ranks from a float64 SVD of the very rows it is of; of σ from the
same models in float64, which also counts what the float32 forward rounds; and of the mean transport of a layer from
float64 models. (Two float32 forwards in different shapes differ in their last bits, and the tail of a spectrum shows it.)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

WAYS = ("plain", "masked", "trace", "audit", "again")
MEASURED = ("time", "memory", "accuracy")


def find_pairs() -> Path | None:
    root = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = root / "hh-harmless" / "pairs.jsonl.gz"
    return path if path.exists() else None


def pair_tokens(pairs: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs of about 256 tokens: prompt (the common prefix), chosen and rejected."""
    import numpy as np

    path = find_pairs()
    if path is None:
        draw = np.random.default_rng(0)

        def tokens(count: int) -> list[int]:
            return draw.integers(3, vocabulary, size=count).tolist()

        return [{"prompt_ids": tokens(192), "chosen_ids": tokens(64), "rejected_ids": tokens(48)} for _ in range(pairs)]
    rows: list[dict[str, list[int]]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts = json.loads(line)
            chosen, rejected = (
                [3 + zlib.crc32(word.encode()) % (vocabulary - 3) for word in re.findall(r"\w+|[^\w ]", texts[side])]
                for side in ("chosen", "rejected")
            )
            if not 192 <= max(len(chosen), len(rejected)) <= 320:
                continue
            common = next(
                (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
                min(len(chosen), len(rejected)) - 1,
            )
            rows.append(
                {"prompt_ids": chosen[:common], "chosen_ids": chosen[common:], "rejected_ids": rejected[common:]}
            )
            if len(rows) == pairs:
                return rows
    raise SystemExit(f"{path}: expected {pairs} pairs of 192 to 320 words, found {len(rows)}")


def build(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align_audit import AuditConfig, ProbeSet

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, intermediate_size=8 * options.width // 3 // 64 * 64, pad_token_id=0,
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    policy = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # The initialization's layers hardly move the stream; a trained model's do.
        for name, parameter in reference.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.mul_(options.gain)
        policy.load_state_dict(reference.state_dict())
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    probes = ProbeSet.from_dataset(pair_tokens(options.pairs, options.vocab), None, max_pairs=options.pairs)
    settings = AuditConfig.from_dict(
        {
            "max_pairs": options.pairs,
            "patching": {"enabled": False},
            "low_rank": {"enabled": False},
            "localization": {"enabled": False},
            "spinal": {"gradient_concentration": False},
        }
    )
    return policy, reference, probes, settings


def plain_trace(models: list[Any], probes: Any, settings: Any, masked: bool, double: bool = False) -> Any:
    """Per model singular values of every layer [L, min(rows, d)] and mean transport [L − 1]; and the rows of every layer.

    Args:
        double: softmax, distance and SVD in float64.
    """
    import torch

    from align_audit.probes.batches import make_batch, plan_batches

    traces, every = [], []
    for model in models:
        rows: list[list[Any]] = []
        steps: list[list[Any]] = []
        for batch in (make_batch([probes.pairs[i] for i in g], g, 0) for g in plan_batches(probes.pairs, 8192)):
            # transformers applies the final norm to the last of its hidden states; the stream itself enters the norm.
            entered: list[Any] = []
            handle = model.model.norm.register_forward_pre_hook(lambda module, args, kept=entered: kept.append(args[0]))
            hidden = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states[1:-1]
            handle.remove()
            hidden = (*hidden, entered[0])
            at = (batch.row[batch.distinct], batch.position[batch.distinct])
            rows.append([states[at] for states in hidden])
            below, moved = None, []
            for states in hidden:
                if masked:
                    states = states[at]
                logits = model.lm_head(model.model.norm(states))
                if double:
                    logits = logits.double()
                root = logits.softmax(-1).sqrt_()
                if below is not None:
                    if double:
                        step = 4 * torch.arcsin((below - root).norm(dim=-1) / 2)
                    else:
                        step = 2 * torch.arccos((below * root).sum(-1).clamp(max=1))
                    moved.append(step if masked else step[at])
                below = root
            steps.append(moved)
        pooled = [torch.cat([part[layer] for part in rows]) for layer in range(len(rows[0]))]
        spectra = [torch.linalg.svdvals(part.double() if double else part).double() for part in pooled]
        transport = torch.stack(
            [torch.cat([part[layer] for part in steps]).double().mean() for layer in range(len(steps[0]))]
        )
        traces.append((torch.stack(spectra), transport))
        every.append(pooled)
    return traces, every


def run(options: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of one way; runs in a process of its own."""
    import torch

    torch.set_grad_enabled(False)
    from align_audit import audit
    from align_audit.auditing.measurements.measurement import AuditTask, RecordedBatch
    from align_audit.auditing.measurements.spinal import Spinal
    from align_audit.auditing.once import audit_once
    from align_audit.auditing.request import AuditRequest
    from align_audit.auditing.session.open_models import OpenModels
    from align_audit.auditing.session.reference_cache import ReferenceCache
    from align_audit.auditing.session.walk import Session
    from align_audit.models.reference import resolve_reference

    policy, reference, probes, settings = build(options)
    cache = ReferenceCache()

    def trace(pairs: Any) -> None:
        session = Session(opened, pairs.pairs, settings, truncation_mode=pairs.truncation_mode)
        task = AuditTask(session, AuditRequest(pairs, settings), ReferenceCache())
        task.begin((Spinal,))
        session.each_batch(lambda batch: task[Spinal].commit(RecordedBatch(batch, *session.record_both(batch))))
        task[Spinal].look_closer(lambda: None)
        task[Spinal].part()

    opened = OpenModels(policy, resolve_reference(policy, reference))
    if options.one == "trace":
        opened.open()

    def work(pairs: Any) -> Any:
        if options.one == "trace":
            return trace(pairs)
        if options.one == "audit":
            return audit(policy, reference, pairs, settings)
        if options.one == "again":
            return audit_once(policy, resolve_reference(policy, reference), pairs, settings, cache=cache).record
        return plain_trace([policy, reference], pairs, settings, options.one == "masked")[0]

    work(probes.subsample(1, 0))  # what libraries load and allocate once is not the trace's
    if options.one == "again":
        work(probes)
    if options.what == "accuracy":
        return accuracy(options, policy, reference, probes, settings)
    import psutil

    process = psutil.Process()
    start, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    if options.what == "memory":
        watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work(probes)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    if options.what == "memory":
        watcher.join()
        return {"peak_mib": peak / 2**20}
    return {"cpu_s": cpu, "wall_s": wall}


def accuracy(options: argparse.Namespace, policy: Any, reference: Any, probes: Any, settings: Any) -> dict[str, float]:
    import torch

    from align_audit import audit

    if options.one == "audit":
        from align_audit.auditing.measurements import layer_spectra as measured

        plain, spectra, rows = measured.singular_values, [], []

        def kept(pooled: Any) -> Any:
            rows.append(pooled)
            spectra.append(torch.from_numpy(plain(pooled)))
            return spectra[-1].numpy()

        measured.singular_values = kept
        record = audit(policy, reference, probes, settings)
        transports = [torch.tensor(side.transport) for side in (record.spinal.policy, record.spinal.reference)]
    else:
        found, every = plain_trace([policy, reference], probes, settings, options.one == "masked")
        rows = [part for model in every for part in model]
        spectra = [sigma for sigmas, _ in found for sigma in sigmas]
        transports = [transport for _, transport in found]
    exact, _ = plain_trace([policy.double(), reference.double()], probes, settings, masked=True, double=True)
    true = [sigma for sigmas, _ in exact for sigma in sigmas]
    n = len(true[0])
    window = slice(math.ceil(0.1 * n) - 1, math.floor(0.9 * n))

    def off(one: Any, other: Any) -> float:
        return (one[window] / other[window] - 1).abs().max().item()

    own = [torch.linalg.svdvals(part.double()) for part in rows]
    return {
        "svd_error": max(map(off, spectra, own)),
        "sigma_error": max(map(off, spectra, true)),
        "transport_error": max((t / e - 1).abs().max().item() for t, (_, e) in zip(transports, exact, strict=True)),
        "rows": sum(int(batch.distinct.sum()) for batch in _batches(probes, settings)),
        "tokens": sum(batch.input_ids.numel() for batch in _batches(probes, settings)),
        "transport_low": min(e.min().item() for _, e in exact),
        "transport_high": max(e.max().item() for _, e in exact),
    }


def _batches(probes: Any, settings: Any) -> Any:
    from align_audit.probes.batches import make_batch, plan_batches

    return (make_batch([probes.pairs[i] for i in g], g, 0) for g in plan_batches(probes.pairs, 8192))


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Print what was measured; a dash is what was not."""
    facts, source = found["audit"], "real HH pairs" if find_pairs() else "random tokens"
    rows = ""
    if "rows" in facts:
        rows = (
            f", {facts['tokens']} padded tokens, {facts['rows']} rows; transport {facts['transport_low']:.2g} to "
            f"{facts['transport_high']:.2g}"
        )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Llama of {options.layers} layers, width {options.width}, vocabulary "
        f"{options.vocab}; {options.pairs} pairs ({source}){rows}"
    )
    print(
        f"{'':>8} {'CPU s':>8} {'wall s':>8} {'MiB above the models':>21} {'σ of its rows':>14} {'σ, float64':>11} "
        f"{'transport':>10}"
    )

    def median(way: str, name: str) -> float:
        return statistics.median(found[way][name]) if found[way][name] else math.nan

    def shown(value: float | None, style: str) -> str:
        return "–" if value is None or math.isnan(value) else format(value, style)

    for way in WAYS:
        errors = [shown(found[way].get(name), ".1e") for name in ("svd_error", "sigma_error", "transport_error")]
        times = [shown(median(way, name), ".1f") for name in ("cpu_s", "wall_s")]
        peak = shown(found[way].get("peak_mib"), ".0f")
        print(f"{way:>8} {times[0]:>8} {times[1]:>8} {peak:>21} {errors[0]:>14} {errors[1]:>11} {errors[2]:>10}")
    for way in WAYS[2:]:
        parts = []
        if "time" in options.measure:
            faster = [median(name, "cpu_s") / median(way, "cpu_s") for name in WAYS[:2]]
            parts.append(f"{faster[0]:.1f} times faster than plain (CPU), {faster[1]:.1f} than masked")
        if "memory" in options.measure:
            share = [found[way]["peak_mib"] / found[name]["peak_mib"] for name in WAYS[:2]]
            parts.append(f"{share[0]:.2f} of plain's memory, {share[1]:.2f} of masked's")
        if parts:
            print(f"{way}: {'; '.join(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument(
        "--gain", type=float, default=4.0, help="of output projections and head over the initialization"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURED,
        default=list(MEASURED),
        help="accuracy takes longest: it needs float64",
    )
    parser.add_argument("--json")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run(options)))
        return
    arguments = [
        text for name in ("pairs", "layers", "width", "vocab", "gain") for text in (f"--{name}", str(getattr(options, name)))
    ]  # fmt: skip
    # Mapped blocks go back to the system when they are freed, so that what is resident is what is in use.
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

    def once(way: str, what: str) -> dict[str, float]:
        environment = {**os.environ, **(returning if what == "memory" else {})}
        command = [sys.executable, __file__, "--one", way, "--what", what, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    found: dict[str, dict[str, Any]] = {way: {"cpu_s": [], "wall_s": []} for way in WAYS}
    for way in WAYS:
        # What the trace alone and the next checkpoint's audit find is what an audit finds.
        for what in ("memory", "accuracy") if way not in ("trace", "again") else ("memory",):
            found[way] |= once(way, what) if what in options.measure else {}
    for _ in range(options.repeats if "time" in options.measure else 0):
        for way in WAYS:
            for name, seconds in once(way, "time").items():
                found[way][name].append(seconds)
    report(options, found)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"options": vars(options), "found": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
