"""The three small pretrained models, and the texts that each of them finds natural."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs, stories

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))

EVALUATED, PROBED, TRUTH_PAIRS, PROMPTS = 16, 64, 32, 16
MAX_LENGTH = 256
"""Tokens of a sequence, the context of the smallest model."""

Row = dict[str, str]


@dataclass(frozen=True)
class Texts:
    """What a run of one model trains on and is measured on: no pair is in two of these.

    Attributes:
        training: preference pairs, drawn for the run's seed.
        evaluated: the trainer's eval set.
        probes: what the audit draws its probe pairs from.
        preferred: pairs of the ground truth, the same for all seeds.
        natural: whole texts of either side, the same for all seeds.
        prompts: continued for the ground truth, the same for all seeds.
    """

    training: list[Row]
    evaluated: list[Row]
    probes: list[Row]
    preferred: list[Row]
    natural: list[str]
    prompts: list[str]


def model_dir(model: str) -> Path:
    """The folder of a model and its tokenizer.

    Raises:
        FileNotFoundError: it is not there, with what to do.
    """
    if model == "llama":
        return MODEL_DIR
    if model == "gpt2":
        from align_audit.lab.bases import base_dir

        return base_dir("gpt2")
    folder = DATA / "stories260k"
    if not folder.is_dir():
        raise FileNotFoundError(f"no stories260k in {DATA}; set ALIGN_AUDIT_DATA to the folder that holds it")
    return folder


def texts(model: str, seed: int, pairs: int) -> Texts:
    """The texts of one run. ``pairs`` is the number of different training pairs at most."""
    if model == "stories260k":
        return _stories260k(seed, pairs)
    held_out = preference_pairs(TRUTH_PAIRS + PROMPTS, seed=9_001)
    held_out_rows = preference_pairs(EVALUATED + PROBED, seed=20_000 + seed)
    return Texts(
        training=preference_pairs(pairs, seed=10_000 + seed),
        evaluated=held_out_rows[:EVALUATED],
        probes=held_out_rows[EVALUATED:],
        preferred=held_out[:TRUTH_PAIRS],
        natural=stories(TRUTH_PAIRS, seed=9_002),
        prompts=[row["prompt"] for row in held_out[TRUTH_PAIRS:]],
    )


def _stories260k(seed: int, pairs: int) -> Texts:
    import random

    lines = (DATA / "stories-pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    truth, shuffled = rows[-2 * TRUTH_PAIRS :], rows[: -2 * TRUTH_PAIRS]
    random.Random(f"stories260k {seed}").shuffle(shuffled)
    evaluated, probes, training = (
        shuffled[:EVALUATED], shuffled[EVALUATED : EVALUATED + PROBED], shuffled[EVALUATED + PROBED :],
    )  # fmt: skip
    natural = [
        row["prompt"] + " " + row["chosen" if place % 2 else "rejected"]
        for place, row in enumerate(truth[TRUTH_PAIRS:])
    ]
    return Texts(
        training=training[:pairs],
        evaluated=evaluated,
        probes=probes,
        preferred=truth[:TRUTH_PAIRS],
        natural=natural,
        prompts=[row["prompt"] for row in truth[TRUTH_PAIRS : TRUTH_PAIRS + PROMPTS]],
    )


@functools.cache
def vocabulary(model: str) -> frozenset[str]:
    """The words of the natural texts of a model, lower case, without punctuation."""
    if model == "stories260k":
        lines = (DATA / "stories-pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        corpus = [text for line in lines for text in json.loads(line).values()]
    else:
        corpus = stories(2_000, seed=9_003)
    return frozenset(word for text in corpus for word in words(text))


def words(text: str) -> list[str]:
    """What stands between spaces, lower case, without the punctuation that natural text puts around words."""
    return [bare for word in text.lower().split() if (bare := word.strip(".,!?;:\"'") or word)]


def load(model: str) -> tuple[Any, Any]:
    """A fresh copy of the pretrained model, float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_dir(model)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
