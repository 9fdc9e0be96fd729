"""What bfloat16 does to an audit's numbers: the same audit in float32, under bfloat16 autocast, and with bfloat16 weights.

    python benchmarks/cost/bfloat16.py --json bfloat16.json        # both models: a few minutes on two cores

The policies of ``evidence/trained.py``, early and late, 64 pairs, patching in full. An audit computes in the dtype that the
models have, or the trainer's autocast gives them; log-probabilities and sums over them are float32 and float64 always. Per
model, step and dtype: root mean square, over pairs, of the difference that it makes to a pair's policy margin, margin shift and
patched effects (worst layer), in nats, beside the shift's standard deviation over pairs; the largest difference of a layer's
mean effect, in half widths of its 95 % interval; the peak layer in float32 and in that dtype; whether replay was exact.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evidence"))
import trained

OFF = ("low_rank", "localization", "spinal")
WAYS = ("autocast", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 160])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", default=list(trained.NAMES), choices=trained.NAMES)
    options = parser.parse_args()

    import torch

    from align_audit import AuditConfig, ProbeSet
    from align_audit.auditing.once import audit_once
    from align_audit.models.reference import resolve_reference

    config = AuditConfig.from_dict({name: {"enabled": False} for name in OFF})
    results = []
    print(
        f"{'model':>8}{'step':>5}{'bfloat16':>10}{'margin':>9}{'shift':>9}{'effect':>9}{'sd of shift':>12}"
        f"{'mean effect, half widths':>26}{'peak':>9}{'identity':>10}"
    )
    for name in trained.available(options.models):
        run = trained.train(name, options.steps)
        probes = ProbeSet.from_dataset((run.rows + run.held_out)[::-1], run.tokenizer, max_pairs=400, max_length=512)
        probes = probes.subsample(options.pairs, 0)
        for step in options.steps:

            def audited(way: str, policy: Any, run: Any = run, probes: Any = probes) -> tuple[Any, dict[str, Any]]:
                models = [copy.deepcopy(model) for model in (policy, run.reference)]
                if way == "weights":
                    models = [model.to(torch.bfloat16) for model in models]

                def autocast() -> Any:
                    on = way == "autocast"
                    return torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext()

                reference = resolve_reference(models[0], models[1])
                result = audit_once(models[0], reference, probes, config, autocast=autocast)
                return result.record, result.arrays

            # TRL has wrapped the forward of what it trained: its weights in a model of their own.
            policy = copy.deepcopy(run.reference)
            policy.load_state_dict(run.weights[step])
            exact, expected = audited("float32", policy)
            widths = np.array([one.high - one.low for one in exact.patching.effect])
            for way in WAYS:
                record, found = audited(way, policy)

                def values(arrays: dict[str, Any], what: str) -> np.ndarray:
                    margins = [
                        arrays[f"per_pair.{side}chosen_logp"] - arrays[f"per_pair.{side}rejected_logp"]
                        for side in ("", "reference_")
                    ]
                    if what == "effect":
                        return arrays["per_pair.effect"][:, 1:]
                    return margins[0] if what == "margin" else margins[0] - margins[1]

                off = {
                    what: float(np.sqrt(((values(found, what) - values(expected, what)) ** 2).mean(axis=0)).max())
                    for what in ("margin", "shift", "effect")
                }
                apart = [
                    one.mean - other.mean
                    for one, other in zip(record.patching.effect, exact.patching.effect, strict=True)
                ]
                row = {
                    "model": name, "step": step, "way": way, "rms": off,
                    "shift_sd": float(values(expected, "shift").std(ddof=1)),
                    "half_widths": float((np.abs(apart) / (widths / 2)).max()),
                    "peak": [exact.patching.peak_layer, record.patching.peak_layer],
                    "identity": record.controls.identity.verdict,
                }  # fmt: skip
                results.append(row)
                peaks = f"{exact.patching.peak_layer}, {record.patching.peak_layer}"
                print(
                    f"{name:>8}{step:>5}{way:>10}{off['margin']:>9.3f}{off['shift']:>9.3f}{off['effect']:>9.3f}"
                    f"{row['shift_sd']:>12.2f}{row['half_widths']:>26.3f}{peaks:>9}{row['identity']:>10}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
