"""One ``DPOTrainer`` run with the audit's callback in it, and checkpoints at the audited steps, from which it can go on."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from replication.pairs import Dealt
from replication.plan import LORA_RANK, Case

TRAINED = "trained.json"
"""Written when training has ended: what it took."""
TRAINER = "trainer"
"""The trainer's output directory, in the folder of a run."""


def checkpoint(folder: Path, step: int) -> Path:
    """Where the weights of a step lie."""
    return folder / TRAINER / f"checkpoint-{step}"


def train(case: Case, model: Path, dealt: Dealt, folder: Path) -> None:
    """Train, from the newest checkpoint where there is one."""
    import torch
    from transformers import PrinterCallback

    random.seed(case.seed)
    torch.manual_seed(case.seed)
    trainer = _trainer(case, model, dealt, folder)
    trainer.remove_callback(PrinterCallback)
    began, cpu = time.monotonic(), time.process_time()
    begun = [step for step in case.setup.audited if step and (checkpoint(folder, step) / "trainer_state.json").exists()]
    trainer.train(resume_from_checkpoint=str(checkpoint(folder, max(begun))) if begun else None)
    spent = {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "resumed_from": max(begun, default=0),
    }
    (folder / TRAINED).write_text(json.dumps(spent), encoding="utf-8")


def _trainer(case: Case, model: Path, dealt: Dealt, folder: Path) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from align_audit import AlignmentAuditCallback

    setup = case.setup
    looks = AlignmentAuditCallback(dealt.first[: case.setup.looked_at], look_options(case))
    extra: dict[str, Any] = {}
    if setup.method == "lora":
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, setup.dtype)),
        args=DPOConfig(
            str(folder / TRAINER), learning_rate=case.learning_rate, beta=setup.beta, max_steps=setup.steps,
            lr_scheduler_type="constant", per_device_train_batch_size=setup.micro_batch,
            gradient_accumulation_steps=setup.batch // setup.micro_batch, train_sampling_strategy="sequential",
            seed=case.seed, logging_steps=1, save_strategy="no", report_to=[], max_length=setup.max_length,
            gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(dealt.training),
        eval_dataset=Dataset.from_list(dealt.evaluated),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[looks],
        **extra,
    )  # fmt: skip
    looks.attach(trainer)
    trainer.add_callback(_saver(trainer, folder, frozenset(setup.audited)))
    return trainer


def look_options(case: Case) -> Any:
    """The health looks of a run: at its start, after 2, 4, 8 … steps, and some 10 more. Full audits are made afterwards."""
    from align_audit import AuditConfig

    return AuditConfig.from_dict(
        {
            "max_pairs": case.setup.looked_at, "max_length": case.setup.max_length, "budget": None, "progress": False,
            "spinal": case.setup.spinal, "tensorboard": "off", "report": False, "trackers": "off",
            "strict": True, "examples": {"pairs": 0},
            "schedule": {
                "first_health": 2, "most_looks": max(1, min(10, case.setup.steps // 4)),
                "on_save": False, "on_last_step": False, "escalate": False,
            },
        }
    )  # fmt: skip


def _saver(trainer: Any, folder: Path, steps: frozenset[int]) -> Any:
    """A callback that saves at certain steps; made here so that transformers loads only when needed."""
    from transformers.trainer_callback import TrainerCallback

    class Saver(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                trainer.save_model(str(checkpoint(folder, 0)))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step in steps

    return Saver()
