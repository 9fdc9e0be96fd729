"""What a control variate saves: intervals of the per-layer effects, some pairs patched, against all pairs patched.

    python benchmarks/evidence/equal_width.py --json equal_width.json          # both models: about ten minutes on one core
    python benchmarks/evidence/equal_width.py --points 0                       # attribution to first order only
    python benchmarks/evidence/equal_width.py --steps 20 --pairs 100 --settings 160:10
    python benchmarks/evidence/equal_width.py --settings 96:auto 192:auto      # as many at each layer as it takes

The policies of ``trained.py``, early and late, are audited on held-out and training pairs with the layer sweep alone
switched on: once with ``--pairs`` pairs all patched, and then with more pairs attributed and fewer patched
(``patching.exact_pairs``; "auto": as many as it takes, from 12 pairs up, 10 with one point). Per step and setting: the
(multiple) correlation of attribution and margin shift with the exact effect (least over layers), the widest interval as a
share of the exact one's, the largest difference of the means in standard errors of the exact one, and the CPU time of both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.contenders.ours import ONLY_THE_SWEEP

SWEEP = {name: part for name, part in ONLY_THE_SWEEP.items() if name != "statistics"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 80, 160])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument(
        "--settings", nargs="+", default=["96:8", "96:12", "96:16", "96:24", "128:21"], metavar="PAIRS:PATCHED"
    )
    parser.add_argument("--points", type=float, nargs="+", default=[0.0, 0.5], help="patching.attribution_points")
    parser.add_argument("--path", choices=("joint", "layer"), default="joint", help="patching.attribution_path")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", default=list(trained.NAMES), choices=trained.NAMES)
    options = parser.parse_args()

    from align_audit import AuditConfig, ProbeSet
    from align_audit.auditing.once import audit_once
    from align_audit.auditing.previous import PreviousAudit
    from align_audit.models.reference import resolve_reference

    results = []
    print(
        f"{'model':>8}{'step':>5}{'attributed':>11}{'patched':>8}{'correlation':>12}{'width':>7}{'means':>7}{'CPU s':>8}"
        f"{'all ' + str(options.pairs) + ' patched':>16}"
    )
    for name in trained.available(options.models):
        run = trained.train(name, options.steps)
        probes = ProbeSet.from_dataset((run.rows + run.held_out)[::-1], run.tokenizer, max_pairs=400, max_length=512)
        before: dict[str, Any] = {}
        for step in options.steps:
            policy = run.at(step)

            def sweep(
                pairs: int, exact: Any, known: Any = None, policy: Any = policy, run: Any = run, probes: Any = probes
            ) -> Any:
                patching = {**SWEEP["patching"], "exact_pairs": exact, "attribution_points": options.points}
                patching["attribution_path"] = options.path
                if exact == "auto":
                    patching |= {"equivalent_pairs": options.pairs, "control_pairs": 10}
                config = AuditConfig.from_dict({**SWEEP, "patching": patching})
                began = time.process_time()
                resolved = resolve_reference(policy, run.reference)
                previous = PreviousAudit(attribution=known)
                result = audit_once(policy, resolved, probes.subsample(pairs, 0), config, previous=previous)
                return result.record.patching, time.process_time() - began

            sweep(2, None)  # what is made once
            exact, seconds = sweep(options.pairs, None)
            widths = np.array([one.high - one.low for one in exact.effect])
            for setting in options.settings:
                pairs, patched = (text if text == "auto" else int(text) for text in setting.split(":"))
                found, took = sweep(pairs, patched, before.get(setting))
                before[setting] = found.attribution
                counts = found.attribution.patched_pairs
                width = np.array([one.high - one.low for one in found.effect]) / widths
                apart = np.array([one.mean - other.mean for one, other in zip(found.effect, exact.effect, strict=True)])
                row = {
                    "model": name, "step": step, "pairs": pairs, "patched": counts, "exact_pairs": options.pairs,
                    "points": options.points, "correlation": found.attribution.joint_correlation,
                    "correlation_alone": found.attribution.correlation, "width": width.tolist(),
                    "means": (np.abs(apart) / (widths / 3.92)).tolist(), "cpu": took, "cpu_exact": seconds,
                }  # fmt: skip
                results.append(row)
                shown = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
                print(
                    f"{name:>8}{step:>5}{pairs:>11}{shown:>8}{min(row['correlation']):>12.3f}{width.max():>7.2f}"
                    f"{max(row['means']):>7.2f}{took:>8.2f}{seconds:>16.2f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
