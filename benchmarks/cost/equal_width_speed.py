"""The same interval width in less time: an audit by attribution, the reference's results kept, against patching every pair.

    python benchmarks/cost/equal_width_speed.py --layers 12 --steps 20 --rate 1e-6 --settings 80:8 --json equal_width_speed.json
    python benchmarks/cost/equal_width_speed.py --layers 32 --steps 20 --rate 1e-6 --settings 80:8 --peer-pairs 4 \
        --contenders nnsight-skip --peer-python nnsight-skip=venvs/nnsight/bin/python

The engine's job (``engine/job.py``: a random Llama of width 512, real HH pairs where the data is present), its policy trained
by ``--steps`` steps of DPO on pairs that are not probed. 64 pairs are patched at every layer, by align_audit and by the other
ways (``--contenders``; on ``--peer-pairs`` of them, which is scaled by the matrix products of their padded batches). Then
``--settings`` PAIRS:PATCHED are audited by attribution to first order (``patching.exact_pairs``, ``keep_reference``): once to
fill the cache, and again, with the next checkpoint, for the figures: widest interval of a layer as a share of the 64 pairs',
least correlation, CPU seconds, and how many times faster that is than each other way. PATCHED "auto" lets the audit choose,
layer by layer, from 10 pairs up. The files are read right after they were written, so from memory where there is enough: CPU
seconds do not count what a disk takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.bench import Bench, machine
from engine.contenders.ours import ONLY_THE_SWEEP, probe_set
from engine.flops import Shape, hooks_sweep
from engine.job import Job, JobSpec, make_job, split_halves

EXACT = 64
TRAINING = 48


def margins(model: Any, pairs: list[Any]) -> torch.Tensor:
    """log p(chosen) − log p(rejected) of pairs in one padded batch, [B]."""
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    longest = max(len(prompt) + len(side) for prompt, side in sides)
    ids = torch.zeros(len(sides), longest, dtype=torch.long)
    mask, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, side) in enumerate(sides):
        length = len(prompt) + len(side)
        ids[row, :length] = torch.tensor(prompt + side)
        mask[row, :length] = 1
        counted[row, len(prompt) : length] = True
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logp = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    each = (logp * counted[:, 1:]).sum(1)
    return each[0::2] - each[1::2]


def train(job: Job, pairs: list[Any], steps: list[int], rate: float, beta: float = 0.1, batch: int = 2) -> list[Any]:
    """The weights after so many steps of DPO (AdamW, sigmoid loss) from the reference's."""
    policy, kept = job.policy, []
    policy.load_state_dict(job.reference.state_dict())
    policy.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    for step in range(max(steps)):
        chosen = [pairs[(step * batch + i) % len(pairs)] for i in range(batch)]
        with torch.no_grad():
            base = margins(job.reference, chosen)
        loss = -torch.nn.functional.logsigmoid(beta * (margins(policy, chosen) - base)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in steps:
            kept.append({name: value.clone() for name, value in policy.state_dict().items()})
    policy.requires_grad_(False)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=20, help="of DPO; the cache is filled at half of them")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--settings", nargs="+", default=["80:10", "100:10", "160:10"], metavar="PAIRS:PATCHED")
    parser.add_argument("--contenders", nargs="*", default=["hooks", "nnsight-skip"])
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--peer-pairs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = [
        (int(pairs), patched if patched == "auto" else int(patched))
        for pairs, patched in (setting.split(":") for setting in options.settings)
    ]
    most = max(EXACT, *(pairs for pairs, _ in settings))
    spec = JobSpec(options.layers, options.width, options.vocab, pairs=most + TRAINING)
    job = make_job(spec)
    job.pairs, training = job.pairs[:most], job.pairs[most:]
    began = time.perf_counter()
    early, late = train(job, training, [options.steps // 2, options.steps], options.rate)
    print(f"{options.steps} steps of DPO: {time.perf_counter() - began:.0f} s", file=sys.stderr)

    from align_audit.auditing.once import audit_once
    from align_audit.auditing.previous import PreviousAudit
    from align_audit.auditing.session.reference_cache import ReferenceCache
    from align_audit.config import AuditConfig
    from align_audit.models.reference import resolve_reference

    resolved = resolve_reference(job.policy, job.reference)
    sweep = {name: part for name, part in ONLY_THE_SWEEP.items() if name != "statistics"}

    def audited(
        weights: Any, pairs: int, patching: dict[str, Any], folder: str, before: Any = None
    ) -> tuple[Any, float, float]:
        job.policy.load_state_dict(weights)
        config = AuditConfig.from_dict({**sweep, "patching": {**sweep["patching"], **patching}})
        probes = probe_set(job.pairs[:pairs])
        cpu, wall = time.process_time(), time.perf_counter()
        left = PreviousAudit(attribution=before.patching.attribution if before is not None else None)
        record = audit_once(job.policy, resolved, probes, config, cache=ReferenceCache(folder), previous=left).record
        return record, time.process_time() - cpu, time.perf_counter() - wall

    report: dict[str, Any] = {"machine": machine(options.threads), "job": vars(options) | {"json": None}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        audited(late, 1, {}, folder)
        record, cpu, wall = audited(late, EXACT, {}, folder)
        exact = record.patching
        widths = np.array([one.high - one.low for one in exact.effect])
        shift = record.margins.shift
        report["exact"] = {"cpu": cpu, "wall": wall, "shift": shift.mean}
        print(
            f"{machine(options.threads)['processor']}, {options.threads} threads; Llama of {spec.layers} layers, width "
            f"{spec.width}, vocabulary {spec.vocab}, float32; {job.pair_source}; {options.steps} steps of DPO, mean shift "
            f"{shift.mean:.2f} nats [{shift.low:.2f}, {shift.high:.2f}]"
        )
        print(f"{EXACT} pairs patched at every layer:\n  align_audit: {cpu:.1f} CPU s")
        bench = Bench(options.threads, dict(text.split("=", 1) for text in options.peer_python), lambda text: None)
        others: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as place:
            pairs = job.pairs[: options.peer_pairs]
            small = Job(replace(spec, pairs=len(pairs)), job.reference, job.policy, pairs, split_halves(pairs, 0), "")
            small.save(Path(place))
            shape = Shape.of(spec)
            share = hooks_sweep(shape, job.pairs[:EXACT]).total / hooks_sweep(shape, pairs).total
            for (name, _), timing in bench.measure(
                Path(place), [(name, "layers") for name in options.contenders], 1
            ).items():
                if timing.problem is not None:
                    print(f"  {name}: {timing.problem}")
                    continue
                others[name] = median(timing.cpu) * share
                print(f"  {name}: {others[name]:.1f} CPU s ({median(timing.cpu):.1f} for {len(pairs)} pairs)")
        report["others"] = others
        print(
            f"\n{'attributed':>11}{'patched':>8}{'correlation':>12}{'width':>7}{'first audit':>12}{'next audit':>11}"
            f"{'on disk':>10}" + "".join(f"{'times ' + name:>20}" for name in others)
        )
        for count, patched in settings:
            patching = {"exact_pairs": patched, "attribution_points": (0.0,), "keep_reference": True}
            if patched == "auto":
                patching |= {"equivalent_pairs": EXACT, "control_pairs": 10}
            with tempfile.TemporaryDirectory() as cache:
                before, first, _ = audited(early, count, patching, cache)
                record, cpu, wall = audited(late, count, patching, cache, before)
                size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            found = record.patching
            counts = found.attribution.patched_pairs
            ratio = np.array([one.high - one.low for one in found.effect]) / widths
            row = {
                "pairs": count, "patched": counts, "correlation": found.attribution.joint_correlation,
                "width": ratio.tolist(), "cpu_first": first, "cpu": cpu, "wall": wall, "bytes": size,
                "times": {name: other / cpu for name, other in others.items()},
            }  # fmt: skip
            report["rows"].append(row)
            shown = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
            print(
                f"{count:>11}{shown:>8}{np.nanmin(row['correlation']):>12.3f}{ratio.max():>7.2f}{first:>12.1f}{cpu:>11.1f}"
                f"{size / 2**20:>6.0f} MiB" + "".join(f"{value:>20.1f}" for value in row["times"].values()),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
