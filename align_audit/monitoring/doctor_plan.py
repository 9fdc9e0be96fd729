"""The training that is planned, and what was seen of it before it began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Check:
    """A thing that was looked at.

    Attributes:
        level: ``green``: as it should be. ``yellow``: works, but. ``red``: audits, or training, would not work.
        observation: what there is, in a sentence.
        fix: what to do about it; empty where nothing is to be done.
    """

    name: str
    level: Level
    observation: str
    fix: str = ""


@dataclass(frozen=True)
class Plan:
    """The training that is planned, as far as it is known.

    Attributes:
        model: a folder or hub name: what training starts from.
        probes: where the pairs are, or several sets by name.
        reference: a folder or hub name; None: what the trainer takes, which is the model as it starts.
        max_steps: optimizer steps; None: not known, and no share of the run is foreseen.
        pairs_per_step: of an optimizer step, on one process.
        save_steps, eval_steps: None or 0: never.
        output_dir: where the run writes; None: not known.
        report_to: the trackers, by the names that ``report_to`` takes; None: not known.
        lora: adapters are trained, not the model.
        device, dtype: as :func:`~align_audit.models.loading.load_model` takes them; a dtype of None is that of the file.
        mixed_precision: the dtype of the trainer's autocast; None: it has none.
        revision: of a model that is a hub name; None: the newest.
        attention: the attention implementation; None: transformers' choice.
        max_length, truncation_mode: of the training's sequences; no length: they are not cut.
        processes: that train together.
        resumes: training goes on from a checkpoint.
        allow_pickle: weights that are pickles are read.
        untried: what the training does and cannot be tried here, each in words that a colon can follow.
        unforeseen: what the forecast leaves out, each in such words.
    """

    model: str
    probes: str | Path | Mapping[str, str | Path]
    reference: str | None = None
    max_steps: int | None = None
    pairs_per_step: int = 8
    save_steps: int | None = 500
    eval_steps: int | None = None
    output_dir: Path | None = None
    report_to: tuple[str, ...] | None = None
    lora: bool = False
    gradient_checkpointing: bool = True
    beta: float = 0.1
    device: str = "cpu"
    dtype: str | None = None
    mixed_precision: Literal["bfloat16", "float16"] | None = None
    revision: str | None = None
    attention: str | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    processes: int = 1
    resumes: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    untried: tuple[str, ...] = ()
    unforeseen: tuple[str, ...] = ()
