"""Checkpoints as a trainer writes them, made of tiny models in a moment; whole, torn, or file by file."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests.helpers.dpo import ROWS, saved_model
from tests.helpers.tiny import perturbed

LATER = ("model.safetensors", "tokenizer.json", "config.json", "trainer_state.json")
"""The order of the trainer's files that matters here; the others come first."""


def probe_file(folder: Path) -> Path:
    """Preference pairs that the models' tokenizer reads."""
    path = folder / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[16:]), encoding="utf-8")
    return path


def base_model(folder: Path) -> Path:
    """The model that the trainings start from."""
    return Path(saved_model(folder / "base"))


def checkpoint_files(base: Path, folder: Path, step: int, max_steps: int, **saving: Any) -> Path:
    """A whole checkpoint of one step; the weights of each step are others, and always the same.

    Args:
        saving: how the model is saved (``max_shard_size``).
    """
    model = perturbed(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), seed=step)
    model.save_pretrained(folder, **saving)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)
    write_state(folder, step, max_steps)
    return folder


def write_state(folder: Path, step: int, max_steps: int) -> None:
    """What the trainer writes last."""
    history = [
        {"step": each, "loss": 0.7 - 0.01 * each, "learning_rate": 0.001, "epoch": 0.1} for each in range(1, step + 1)
    ]
    state = {"global_step": step, "max_steps": max_steps, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def arrive(source: Path, target: Path, pause: float = 0.0) -> None:
    """Write a checkpoint file by file, each in two halves, in the trainer's order.

    Args:
        pause: seconds between two writes.
    """
    target.mkdir(parents=True)
    names = sorted(
        (path.name for path in source.iterdir()), key=lambda name: LATER.index(name) if name in LATER else -1
    )
    for name in names:
        data = (source / name).read_bytes()
        with (target / name).open("wb", buffering=0) as file:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(half)
                time.sleep(pause)
