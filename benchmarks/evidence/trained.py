"""Policies of real DPO runs, early and late, for the benchmarks of evidence: of the shipped model, and of stories260k.

Both runs are healthy: rate 1e-4, β 0.1, constant, batch 8, fp32, seed 0. ``stories``: 500 of the 600 pairs in
../shared/data (or $ALIGN_AUDIT_DATA); ``demo``: 500 pairs of ``align_audit.lab.corpus``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
NAMES = ("demo", "stories")
TRAINED_ON = 500


@dataclass(frozen=True)
class Run:
    """One base model with its tokenizer, the pairs it is trained on, and others; ``weights[step]`` of the policy."""

    name: str
    reference: Any
    policy: Any
    tokenizer: Any
    rows: list[dict[str, str]]
    held_out: list[dict[str, str]]
    weights: dict[int, dict[str, Any]]

    def at(self, step: int) -> Any:
        """The policy with its weights of that step."""
        self.policy.load_state_dict(self.weights[step])
        return self.policy.eval()


def available(names: list[str]) -> list[str]:
    """Those of ``names`` whose model is there; says which are not."""
    if "stories" in names and not (DATA / "stories260k").is_dir():
        print(f"no stories260k in {DATA}; set ALIGN_AUDIT_DATA to the folder that holds it", file=sys.stderr)
        names = [name for name in names if name != "stories"]
    return names


def train(name: str, steps: list[int], held_out: int = 100) -> Run:
    """Train the policy and keep its weights at ``steps``."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from align_audit.lab import MODEL_DIR
    from align_audit.lab.corpus import preference_pairs

    if name == "demo":
        folder = MODEL_DIR
        rows = preference_pairs(TRAINED_ON, seed=3)
        others = preference_pairs(held_out, seed=4)
    else:
        folder = DATA / "stories260k"
        lines = (DATA / "stories-pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        everything = [json.loads(line) for line in lines]
        rows, others = everything[:TRAINED_ON], everything[TRAINED_ON:]
    kept: dict[int, dict[str, Any]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step in steps:
                kept[state.global_step] = {key: value.clone() for key, value in model.state_dict().items()}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        options = DPOConfig(
            output, learning_rate=1e-4, beta=0.1, max_steps=max(steps), seed=0, per_device_train_batch_size=8,
            lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, max_length=512, logging_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=policy,
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Keep()],
        )
        trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Run(name, reference, policy, tokenizer, rows, others, kept)
