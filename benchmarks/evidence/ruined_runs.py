"""Do error alerts fire on runs that ruin the model, early, and never on healthy ones? Real model, real DPO runs.

    python benchmarks/evidence/ruined_runs.py --json results.json             # the whole grid, about half an hour on two cores
    python benchmarks/evidence/ruined_runs.py --kind ruined --limit 2         # a taste

Needs the stories260k model and its 600 pairs in ../shared/data (or $ALIGN_AUDIT_DATA). Ruined: learning rate 1e-3 to 3e-3,
beta 0.02 and 0.05, audits at steps 0, 10, 20; an error alert must fire by step 20. Healthy: 5e-5 to 2e-4, beta 0.1 and
0.3, 160 steps, audits every 40; no error alert may fire. Variants change the seed and which pairs are trained on. Exits
with 1 when a run is judged wrongly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@dataclass(frozen=True)
class Case:
    """One training run; ``variant`` picks the seed and the 500 training pairs."""

    kind: str
    learning_rate: float
    beta: float
    variant: int

    @property
    def steps(self) -> int:
        return 20 if self.kind == "ruined" else 160

    @property
    def audit_every(self) -> int:
        return 10 if self.kind == "ruined" else 40


def grid() -> list[Case]:
    """All runs, the ones described with the data first."""
    ruined = [
        Case("ruined", rate, beta, variant)
        for variant, rate, beta in itertools.product((0, 1, 2), (3e-3, 2e-3, 1e-3), (0.02, 0.05))
    ]
    healthy = [
        Case("healthy", rate, beta, variant)
        for variant, rate, beta in itertools.product((0, 1), (1e-4, 2e-4, 5e-5), (0.1, 0.3))
    ]
    return ruined + healthy


def run(case: Case, pairs: int = 48) -> dict[str, Any]:
    """Train and audit; the figures of the last audit, the last training log line, and the alerts."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun

    logged: dict[str, float] = {}

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.update({key: float(value) for key, value in (logs or {}).items()})

    lines = (DATA / "stories-pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shift = 50 * case.variant  # 500 pairs train; the other 100 are held out
    rows = rows[shift:] + rows[:shift]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(case.variant)
        settings = {
            "max_pairs": pairs,
            "schedule": {"every_n_steps": case.audit_every},
            "low_rank": {"enabled": False},
            "tensorboard": "off",
            "progress": False,
            "strict": True,
        }
        callback = AlignmentAuditCallback(config=AuditConfig.from_dict(settings))
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32),
            args=DPOConfig(
                folder, learning_rate=case.learning_rate, beta=case.beta, max_steps=case.steps, seed=case.variant,
                per_device_train_batch_size=8, lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[],
                gradient_checkpointing=False, save_strategy="no", logging_steps=10, disable_tqdm=True, max_length=512,
            ),
            train_dataset=Dataset.from_list(rows[:500]),
            eval_dataset=Dataset.from_list(rows[500:]),
            processing_class=AutoTokenizer.from_pretrained(DATA / "stories260k"),
            callbacks=[Log(), callback],
        )  # fmt: skip
        callback.attach(trainer)
        trainer.train()
        audits = AuditRun.load(folder)
    errors = [alert for alert in audits.alerts if alert.level == "error"]
    warnings = [alert for alert in audits.alerts if alert.level == "warning"]
    last = audits.records[-1].margins
    first_error = min((alert.step for alert in errors), default=None)
    return {
        **asdict(case),
        "first_error_step": first_error,
        "error_rules": sorted({alert.rule for alert in errors}),
        "first_warning_step": min((alert.step for alert in warnings), default=None),
        "warning_rules": sorted({alert.rule for alert in warnings}),
        "log_loss": logged.get("loss", logged.get("train_loss")),
        "log_accuracy": logged.get("rewards/accuracies"),
        "log_margin": logged.get("rewards/margins"),
        "chosen_per_token": last.chosen_logp_change_per_token.mean,
        "kl_per_token": last.kl.mean,
        "token_accuracy": last.token_accuracy.mean,
        "right": (first_error is not None and first_error <= 20) == (case.kind == "ruined"),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["ruined", "healthy"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (DATA / "stories260k").is_dir():
        sys.exit(f"no stories260k in {DATA}; set ALIGN_AUDIT_DATA to the folder that holds it")
    cases = [case for case in grid() if options.kind in (None, case.kind)][: options.limit]
    results = []
    head = f"{'kind':<8}{'rate':>7}{'beta':>6}{'var':>4} | {'log: loss':>9}{'acc':>6}{'margin':>8} |"
    report = sys.stderr  # the audits' own tables go to standard output
    print(head + f"{'chosen/tok':>11}{'KL/tok':>8}{'tok acc':>8} | first error", file=report)
    for case in cases:
        row = run(case, options.pairs)
        results.append(row)
        print(
            f"{case.kind:<8}{case.learning_rate:>7.0e}{case.beta:>6.2f}{case.variant:>4} | {row['log_loss']:>9.3f}"
            f"{row['log_accuracy']:>6.2f}{row['log_margin']:>8.2f} |{row['chosen_per_token']:>11.2f}"
            f"{row['kl_per_token']:>8.2f}{row['token_accuracy']:>8.2f} | {row['first_error_step']} "
            f"{', '.join(row['error_rules'])}{'' if row['right'] else '   <-- WRONG'}",
            file=report,
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for kind in ("ruined", "healthy"):
        of_kind = [row for row in results if row["kind"] == kind]
        if of_kind:
            print(f"{kind}: {sum(row['right'] for row in of_kind)} of {len(of_kind)} judged rightly", file=report)
    sys.exit(0 if all(row["right"] for row in results) else 1)


if __name__ == "__main__":
    main()
