"""Real, tiny ``DPOTrainer`` runs in every reference mode, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import DEVICE, tiny_model

MODES = (
    "ref_model passed", "ref_model made", "new adapter", "pretrained adapter", "precompute", "sync", "bf16", "dropout",
)  # fmt: skip

ROWS = [
    {
        "prompt": f"What is the capital of {place}?",
        "chosen": f" The capital of {place} is Paris." + " Hello." * (i % 3),
        "rejected": " The sky is blue" + ", wonderful world" * (i % 4) + ".",
    }
    for i, place in enumerate(["France", "the world", "the sky", "dog", "house", "little house", "Paris", "blue"] * 3)
]


@dataclass
class Trained:
    trainer: DPOTrainer
    model: Any
    losses: list[Any] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


class Losses(TrainerCallback):
    """Keeps what the trainer logs, unrounded."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Speeds differ from run to run; everything else must not.
        timed = ("runtime", "per_second", "flos")
        self.seen.append({key: value for key, value in (logs or {}).items() if not any(word in key for word in timed)})


def saved_model(folder: Path, **changes: Any) -> str:
    """A tiny float32 model and its tokenizer on disk, as a user would have it."""
    tokenizer = make_tokenizer()
    model = tiny_model(
        "llama", dtype=torch.float32, vocab_size=len(tokenizer), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, num_hidden_layers=3, **changes,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(
    output: Path,
    mode: str,
    callbacks: list[TrainerCallback],
    base: Path | None = None,
    shape: Mapping[str, Any] | None = None,
    attention: str | None = None,
    **options: Any,
) -> Trained:
    """A trainer in the given reference mode, not yet run. The base model is written to ``base`` (``output/../base``).

    Args:
        shape: of the base model's configuration, what is other than usual.
        attention: ``attn_implementation`` of policy and reference.
    """
    changes = {**(shape or {}), **({"attention_dropout": 0.2} if mode == "dropout" else {})}
    path = saved_model(base or output.parent / "base", **changes)
    torch.manual_seed(0)
    loaded: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    model: Any = AutoModelForCausalLM.from_pretrained(path, **loaded)
    extra: dict[str, Any] = {}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": [],
        "use_cpu": DEVICE.type == "cpu",
        "bf16": mode == "bf16", "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True,
        "precompute_ref_log_probs": mode == "precompute", "disable_dropout": mode != "dropout",
        "sync_ref_model": mode == "sync", "ref_model_sync_steps": 2, "seed": 7, "save_only_model": False,
    }  # fmt: skip
    settings.update(options)
    if mode == "model by name":
        model = path
    elif mode == "ref_model passed":
        extra["ref_model"] = AutoModelForCausalLM.from_pretrained(path, **loaded)
    elif mode == "new adapter":
        extra["peft_config"] = lora
    elif mode == "pretrained adapter":
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    losses = Losses()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(str(output), **settings),
        train_dataset=Dataset.from_list(ROWS[:16]),
        eval_dataset=Dataset.from_list(ROWS[16:]),
        processing_class=make_tokenizer(),
        callbacks=[losses, *callbacks],
        **extra,
    )
    return Trained(trainer, trainer.model, losses.seen)


def train(output: Path, mode: str, callback: Any = None, attach: bool = True, **options: Any) -> Trained:
    """Run it. With a callback, attached or not."""
    run = build(output, mode, [] if callback is None else [callback], **options)
    if callback is not None and attach:
        callback.attach(run.trainer)
    with contextlib.redirect_stdout(None):
        run.trainer.train()
    return run
