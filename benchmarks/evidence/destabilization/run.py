"""``run``: makes the runs that are missing, one after the other, in one process of one thread.

Each run is a folder of its own and has four parts: training (log and weights), ground truth, health audits, full audits.
A part that is there is not made again, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quiet import quieten

from destabilization.kinds import SEEDS, Case, cases
from destabilization.lines import Truth

TRUTH = "truth.jsonl"
ABOUT = "run.json"
BROKEN = "broken.txt"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs' folders")
    parser.add_argument("--split", choices=["tuning", "scoring"], action="append", help="default: both, tuning first")
    parser.add_argument("--seeds", type=int, default=3, help="of each split, from its first one on")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first seed within the split")
    parser.add_argument("--runs", nargs="+", help="only these kinds, by the names of kinds.py (with their twins)")
    parser.add_argument("--budget-minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--no-full", action="store_true", help="leave the full audits for another time")
    parser.add_argument(
        "--drop-weights", action="store_true", help="delete a run's weights when all is measured on them"
    )


def main(options: argparse.Namespace) -> None:
    """Make what is missing of the runs that are asked for."""
    quieten()
    began = time.monotonic()
    truths = stored_truths(options.out)
    for case in asked(options):
        if options.budget_minutes is not None and time.monotonic() - began > 60 * options.budget_minutes:
            print("the budget is spent", flush=True)
            return
        folder = options.out / case.split / case.name
        try:
            spent = make(case, folder, truths, full=not options.no_full)
        except KeyboardInterrupt:
            raise
        except Exception:
            # One run that cannot be made costs no other; what went wrong lies in its folder.
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BROKEN).write_text(traceback.format_exc(), encoding="utf-8")
            print(f"{case.split} {case.name}: broken, see {folder / BROKEN}", flush=True)
            continue
        if options.drop_weights and not options.no_full:
            shutil.rmtree(folder / "weights", ignore_errors=True)
        if spent:
            said = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
            print(f"{time.strftime('%H:%M:%S')} {case.split} {case.name}: {said}", flush=True)


def asked(options: argparse.Namespace) -> Iterator[Case]:
    """The runs of a command, split by split and seed by seed; twins come before the runs with faults.

    Raises:
        SystemExit: a kind has no such name.
    """
    splits = options.split or ["tuning", "scoring"]
    names = {case.kind for split in splits for seed in range(3) for case in cases(split, seed)}
    if unknown := sorted(set(options.runs or ()) - names):
        sys.exit(f"unknown kinds {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    for split in splits:
        for seed in range(options.first_seed, min(options.first_seed + options.seeds, SEEDS)):
            chosen = [case for case in cases(split, seed) if options.runs is None or case.kind in options.runs]
            twins = {case.twin.name for case in chosen if case.twin is not None}
            yield from (case for case in cases(split, seed) if case in chosen or case.name in twins)


def make(case: Case, folder: Path, truths: dict[str, Truth], *, full: bool) -> dict[str, float]:
    """Make the parts of a run that are missing: part → seconds it took.

    Args:
        truths: by hash of the weights; what is measured here is added.
    """
    from destabilization.auditing import audit_run, audits_file
    from destabilization.looks import kept_steps
    from destabilization.training import WEIGHTS, train

    parts: list[tuple[str, str, Callable[[], None]]] = [
        ("training", WEIGHTS, lambda: train(case, folder, kept_steps(case))),
        ("truth", TRUTH, lambda: measure(case, folder, truths)),
        ("health", audits_file("health"), lambda: audit_run(case, folder, "health")),
    ]
    if full:
        parts.append(("full", audits_file("full"), lambda: audit_run(case, folder, "full")))
    spent = {}
    for name, file, make_part in parts:
        if not (folder / file).exists():
            began = time.monotonic()
            make_part()
            spent[name] = time.monotonic() - began
    if spent:
        about = folder / ABOUT
        earlier = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        seconds = earlier.get("seconds", {}) | {name: round(value, 1) for name, value in spent.items()}
        about.write_text(json.dumps(describe(case) | {"seconds": seconds}, indent=1), encoding="utf-8")
        (folder / BROKEN).unlink(missing_ok=True)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    return spent


def describe(case: Case) -> dict[str, Any]:
    """What a run is, in plain values."""
    import torch
    import transformers
    import trl

    from destabilization.looks import looks

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    twin = case.twin
    return {
        "name": case.name, "split": case.split, "kind": case.kind, "group": case.group, "seed": case.seed,
        "looks": looks(case).scheduled, "base": case.base.name, "fault_step": None if case.fault is None else case.fault.step,
        "twin": None if twin is None else twin.name, "settings": asdict(case.settings), "versions": versions,
        "machine": platform.machine(),
    }  # fmt: skip


def measure(case: Case, folder: Path, truths: dict[str, Truth]) -> None:
    """The ground truth of a trained run, on its stored weights. Weights that were measured before are not measured again."""
    from destabilization.looks import truth_steps
    from destabilization.models import load, texts
    from destabilization.training import WEIGHTS, load_weights
    from destabilization.truth import TruthMeter

    kept: dict[str, dict[str, str]] = json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))
    policy, tokenizer = load(case.settings.model)
    meter = TruthMeter(case.settings.model, tokenizer, texts(case.settings.model, case.seed, 1))
    lines = []
    for step in truth_steps(case):
        weights = kept[str(step)]["policy"]
        if weights not in truths:
            truths[weights] = meter.measure(load_weights(policy, folder, weights), step, weights)
        lines.append(json.dumps(asdict(truths[weights]) | {"step": step}))
    (folder / TRUTH).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_truth(path: Path) -> list[Truth]:
    """The ground truth that a run has on disk."""
    return [Truth(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def stored_truths(out: Path) -> dict[str, Truth]:
    """The ground truth of all weights that were measured before, by their hash: it is of the same texts in each run."""
    return {truth.weights: truth for path in out.glob(f"*/*/{TRUTH}") for truth in read_truth(path)}
