"""One ``DPOTrainer`` run: its log of every step, and the weights of policy and reference at some, as it went."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from destabilization.corruptions import training_rows
from destabilization.faults import EVENTS, AtStep
from destabilization.kinds import BATCH, EVALUATE_EVERY, Case
from destabilization.models import MAX_LENGTH, load, texts

LOG = "training.jsonl"
WEIGHTS = "weights.json"
"""Step → names of the files (hashes) that hold the weights of policy and reference then."""


def digest(state: dict[str, Any]) -> str:
    """A hash of weights, bit by bit."""
    total = hashlib.blake2b(digest_size=12)
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def merged_state(model: Any) -> dict[str, Any]:
    """The weights as a plain model's: adapters are added to what they adapt. Clones, without tied duplicates."""
    peft = hasattr(model, "peft_config")
    plain = model.get_base_model() if peft else model
    tied = {"lm_head.weight"} if plain.config.tie_word_embeddings else set()
    state = {}
    for name, value in plain.state_dict().items():
        if ".lora_" in name or name in tied:
            continue
        state[name.replace(".base_layer", "")] = value.detach().clone()
    if peft:
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight"):
                state[f"{name}.weight"] += module.get_delta_weight("default").detach()
    return state


def train(case: Case, folder: Path, steps: frozenset[int]) -> None:
    """Train, and leave log and weights in ``folder``.

    Args:
        steps: those whose weights are kept. 0 is before the first.
    """
    import torch
    from transformers import PrinterCallback

    random.seed(case.seed)
    torch.manual_seed(case.seed)
    trainer = _trainer(case, folder)
    trainer.remove_callback(PrinterCallback)
    keeper = _keeper(trainer, folder, steps)
    trainer.add_callback(keeper)  # after TRL's own: what is kept of a step is what follows all that happens in it
    if case.fault is not None and case.fault.event is not None:
        action, count = EVENTS[case.fault.event]
        trainer.add_callback(AtStep(trainer, action, case.fault.step, count))
    trainer.train()
    keeper.close()


def _trainer(case: Case, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = case.settings
    model, tokenizer = load(settings.model)
    data = texts(settings.model, case.seed, settings.pairs)
    fault = case.fault
    rows = training_rows(
        data.training, settings.steps * BATCH, case.seed,
        corruption=None if fault is None else fault.rows,
        begin=0 if fault is None else fault.step * BATCH,
        wrong_labels=settings.wrong_labels,
    )  # fmt: skip
    extra: dict[str, Any] = {}
    if settings.lora_rank:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(
            r=settings.lora_rank, target_modules=list(settings.lora_targets), task_type="CAUSAL_LM"
        )
    options = DPOConfig(
        str(folder / "trainer"), learning_rate=settings.learning_rate, beta=settings.beta, max_steps=settings.steps,
        lr_scheduler_type=settings.schedule, warmup_steps=settings.warmup_steps, loss_type=list(settings.loss_type),
        label_smoothing=settings.label_smoothing, per_device_train_batch_size=BATCH, per_device_eval_batch_size=16,
        train_sampling_strategy="sequential",  # the rows stand in the order of the run
        sync_ref_model=settings.sync_every is not None, ref_model_sync_steps=settings.sync_every or 1,
        ref_model_mixup_alpha=1.0, seed=case.seed, logging_steps=1, eval_strategy="steps",
        eval_steps=EVALUATE_EVERY, eval_on_start=True, save_strategy="no", report_to=[], max_length=MAX_LENGTH,
        gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(data.evaluated),
        processing_class=tokenizer,
        **extra,
    )


def _keeper(trainer: Any, folder: Path, steps: frozenset[int]) -> Any:
    """A callback that keeps the log and the weights; made here so that transformers loads only when needed."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        def __init__(self) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = (folder / LOG).open("w", encoding="utf-8")
            self._kept: dict[int, dict[str, str]] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._keep(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "train_runtime" in logs:
                return
            line = {"step": state.global_step, "logs": {name: plain(value) for name, value in logs.items()}}
            self._log.write(json.dumps(line) + "\n")
            if "loss" in logs and state.global_step in steps:
                self._keep(state.global_step)

        def _keep(self, step: int) -> None:
            kept = {"policy": self._save(merged_state(trainer.model))}
            reference = trainer.ref_model
            kept["reference"] = self._kept[0]["policy"] if step and reference is None else kept["policy"]
            if reference is not None:
                kept["reference"] = self._save(merged_state(reference))
            self._kept[step] = kept

        def _save(self, state: dict[str, Any]) -> str:
            name = digest(state)
            path = folder / "weights" / f"{name}.safetensors"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                save_file(state, path)
            return name

        def close(self) -> None:
            self._log.close()
            (folder / WEIGHTS).write_text(json.dumps(self._kept), encoding="utf-8")

    return Keeper()


def plain(value: Any) -> float | str:
    """A number as JSON can hold it: those that are not finite as words."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def load_weights(model: Any, folder: Path, name: str) -> Any:
    """The model with weights that :func:`train` left, in eval mode."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(folder / "weights" / f"{name}.safetensors"), strict=False)
    if unexpected or any("lm_head" not in name and "attn.bias" not in name for name in missing):
        raise ValueError(f"{folder.name}: weights {name} do not fit the model: {missing} {unexpected}")
    return model.eval()
