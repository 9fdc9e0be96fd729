"""Preference pairs: read, cut to what fits, and dealt out for a seed. None of them enters the project."""

from __future__ import annotations

import gzip
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replication.plan import EVALUATED, Case, Setup

DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
STORIES = "stories"
"""The pairs that the shipped model finds natural; ``align_audit.lab.corpus`` makes them."""
STORIES_MADE = 1_200
TURN = "\n\nAssistant:"
"""What the last turn of an HH dialogue begins with."""

Row = dict[str, str]


@dataclass(frozen=True)
class Dealt:
    """The pairs of one run: no pair is in two of these, but where the probe pairs are among those trained on."""

    training: list[Row]
    evaluated: list[Row]
    first: list[Row]
    second: list[Row]


def default_data(model: str) -> str:
    """What a model is trained on where nothing is said: HH harmless where it is there, the shipped model on its own stories."""
    return STORIES if model == "shipped" or not (DATA / "hh-harmless").is_dir() else str(DATA / "hh-harmless")


def data_name(data: str) -> str:
    """What data is called on the page: its folder's name, where its file has a general one."""
    if data == STORIES:
        return STORIES
    path = Path(data)
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if stem in ("pairs", "train", "test") else stem


def read_pairs(data: str) -> list[Row]:
    """All pairs of a file, or of the ``pairs.jsonl`` or ``pairs.jsonl.gz`` of a folder, in its order; or the stories.

    Raises:
        FileNotFoundError: there is none, with what to do.
        ValueError: a line is no pair.
    """
    if data == STORIES:
        from align_audit.lab.corpus import preference_pairs

        return preference_pairs(STORIES_MADE, seed=30_000)
    path = Path(data)
    candidates = [path / "pairs.jsonl", path / "pairs.jsonl.gz"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no preference pairs at {path}: expected a .jsonl or .jsonl.gz file, or a folder with pairs.jsonl or "
            f"pairs.jsonl.gz; name one with --data, or set ALIGN_AUDIT_DATA to the folder that holds hh-harmless"
        )
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"chosen", "rejected"} <= set(row):
            raise ValueError(f"{file}, line {number}: expected chosen and rejected, and perhaps prompt")
    return [with_prompt({name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}) for row in rows]


def with_prompt(row: Row) -> Row:
    """A pair of whole dialogues, as HH writes them, with what comes before the last turn as its prompt.

    The trainer would cut where the answers begin to differ, in the middle of a word if need be, which no model reads so. A pair
    that has a prompt, or differs before its last turn, stays as it is.
    """
    parts = [row[side].rpartition(TURN) for side in ("chosen", "rejected")]
    if "prompt" in row or parts[0][:2] != parts[1][:2] or not parts[0][1]:
        return row
    return {"prompt": parts[0][0] + TURN, "chosen": parts[0][2], "rejected": parts[1][2]}


def fitting(rows: list[Row], tokenizer: Any, max_length: int) -> list[Row]:
    """The pairs of which both sequences, with a token that ends them and one that may begin them, fit in ``max_length``."""

    def length(row: Row, side: str) -> int:
        return len(tokenizer(row.get("prompt", "") + row[side], add_special_tokens=False, verbose=False)["input_ids"])

    return [row for row in rows if max(length(row, "chosen"), length(row, "rejected")) + 2 <= max_length]


def deal(case: Case, rows: list[Row]) -> Dealt:
    """The pairs of a run, drawn by its seed: a null run has the healthy one's, with sides swapped by the toss of a coin.

    Raises:
        ValueError: there are too few.
    """
    setup = case.setup
    training = setup.steps * setup.batch
    needed = needed_pairs(setup)
    if len(rows) < needed:
        raise ValueError(
            f"{setup.name}: expected {needed} pairs of at most {setup.max_length} tokens ({training} to train on, two "
            f"slices of {setup.pairs}, {EVALUATED} held out), found {len(rows)}; lower --steps or --pairs, or raise "
            "--max-length"
        )
    shuffled = list(rows)
    random.Random(f"replication {case.seed}").shuffle(shuffled)
    shuffled = shuffled[:needed]
    first, second, rest = shuffled[: setup.pairs], shuffled[setup.pairs : 2 * setup.pairs], shuffled[2 * setup.pairs :]
    if setup.probed == "trained":
        rest = rest + first + second
    evaluated, trained = rest[:EVALUATED], rest[-training:]
    if case.kind == "null":
        coin = random.Random(f"replication null {case.seed}")
        trained = [swapped(row) if coin.random() < 0.5 else row for row in trained]
    return Dealt(trained, evaluated, first, second)


def needed_pairs(setup: Setup) -> int:
    """Pairs that a run takes."""
    training, probes = setup.steps * setup.batch, 2 * setup.pairs
    return EVALUATED + (max(training, probes) if setup.probed == "trained" else training + probes)


def swapped(row: Row) -> Row:
    """The pair with its sides exchanged."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
