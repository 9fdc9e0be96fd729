"""What a control variate saves: intervals of the per-layer effects, some pairs patched, against all pairs patched.

    python benchmarks/equal_width.py --json equal_width.json                        # about four minutes on one core
    python benchmarks/equal_width.py --points 0                                     # first order only

Real DPO of the stories260k model (rate 1e-4, β 0.1, on 500 of its 600 pairs; ../shared/data or $ALIGN_AUDIT_DATA); the
policy is audited on held-out and training pairs at several steps, with the layer sweep alone switched on: once with
``--pairs`` pairs all patched, and then with more pairs attributed and fewer patched (``patching.exact_pairs``). Per step and
setting: the correlation of attribution with the exact effect (least over layers), the widest interval as a share of the
exact one's, the largest difference of the means in standard errors of the exact one, and the CPU time of both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from engine.contenders.ours import ONLY_THE_SWEEP

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SWEEP = {name: part for name, part in ONLY_THE_SWEEP.items() if name != "statistics"}


def train(rows: list[dict[str, str]], steps: list[int]) -> tuple[Any, Any, list[dict[str, Any]]]:
    """One healthy DPO run: its model, its tokenizer, and the weights at ``steps``."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    kept: list[dict[str, Any]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step in steps:
                kept.append({name: value.clone() for name, value in model.state_dict().items()})

    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            folder, learning_rate=1e-4, beta=0.1, max_steps=max(steps), seed=0, per_device_train_batch_size=8,
            lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, max_length=512, logging_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Keep()],
        )
        trainer.train()
    return model, tokenizer, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 80, 160])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument(
        "--settings", nargs="+", default=["96:8", "96:12", "96:16", "96:24", "128:21"], metavar="PAIRS:PATCHED"
    )
    parser.add_argument("--points", type=float, nargs="+", default=[0.0, 0.5], help="patching.attribution_points")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (DATA / "stories260k").is_dir():
        sys.exit(f"no stories260k in {DATA}; set ALIGN_AUDIT_DATA to the folder that holds it")
    import torch
    from transformers import AutoModelForCausalLM

    from align_audit import AuditConfig, ProbeSet, audit

    lines = (DATA / "stories-pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    model, tokenizer, kept = train(rows[:500], options.steps)
    reference = AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32).eval()
    probes = ProbeSet.from_dataset(rows[::-1], tokenizer, max_pairs=400, max_length=512)

    def sweep(pairs: int, exact: int | None) -> tuple[Any, float]:
        config = AuditConfig.from_dict(
            {**SWEEP, "patching": {**SWEEP["patching"], "exact_pairs": exact, "attribution_points": options.points}}
        )
        began = time.process_time()
        record = audit(model, reference, probes.subsample(pairs, 0), config)
        return record.patching, time.process_time() - began

    results = []
    print(
        f"{'step':>5}{'attributed':>11}{'patched':>8}{'correlation':>12}{'width':>7}{'means':>7}{'CPU s':>8}{'all patched':>12}"
    )
    for step, weights in zip(options.steps, kept, strict=True):
        model.load_state_dict(weights)
        model.eval()
        sweep(2, None)  # what is made once
        exact, seconds = sweep(options.pairs, None)
        widths = np.array([one.high - one.low for one in exact.effect])
        for setting in options.settings:
            pairs, patched = map(int, setting.split(":"))
            found, took = sweep(pairs, patched)
            width = np.array([one.high - one.low for one in found.effect]) / widths
            apart = np.array([one.mean - other.mean for one, other in zip(found.effect, exact.effect, strict=True)])
            row = {
                "step": step, "pairs": pairs, "patched": patched, "exact_pairs": options.pairs,
                "correlation": found.attribution.correlation, "width": width.tolist(),
                "means": (np.abs(apart) / (widths / 3.92)).tolist(), "cpu": took, "cpu_exact": seconds,
            }  # fmt: skip
            results.append(row)
            print(
                f"{step:>5}{pairs:>11}{patched:>8}{min(row['correlation']):>12.3f}{width.max():>7.2f}"
                f"{max(row['means']):>7.2f}{took:>8.2f}{seconds:>12.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
