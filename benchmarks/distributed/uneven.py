"""Does a run of several processes ever come to stand still, or train otherwise, because of its audits?

    python benchmarks/distributed/uneven.py [--runs 50] [--first-seed 0]      # some minutes on two cores

Real ``DPOTrainer`` runs of two CPU processes, each with an audit at every step. In all of them both processes sleep at
moments of their own, so that now one and now the other is late wherever they meet; in four of five something breaks on one
of them: an error, memory or a disk, at a call that is drawn, in an audit that is drawn. A run that takes two minutes counts
as one that stands still.

Printed: a line for each run, and how many came to an end, trained the same bits as a run without the callback, and have each
step in their log once, as a record or as a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.distributed.launch import SECONDS, launch
from tests.distributed.reading import lines

STEPS = 4
ENGINES = ("ddp", "fsdp2")
MODES = ("ref_model made", "new adapter", "sync")
PLACES = {"layer": 60, "head": 12, "log": 1, "writer": 1, "continuation": 1, "set-up": 1}
"""Where something breaks, and up to which call."""
WRITTEN = ("log", "writer")
"""What the first process alone does."""
AUDIT: dict[str, Any] = {
    "schedule": {"every_n_steps": 1, "first_health": STEPS + 1, "escalate": False}, "batch_tokens": 100, "max_pairs": 8,
    "low_rank": {"enabled": True, "layers": [1], "ranks": [1], "random_draws": 1}, "spinal": {"enabled": True, "max_rows": 60},
    "generations": {"prompts": 3, "max_new_tokens": 8},
}  # fmt: skip


def drawn(seed: int) -> dict[str, Any]:
    """One run: engine, reference and fault, all by the seed."""
    draw = random.Random(seed)
    case: dict[str, Any] = {
        "engine": draw.choice(ENGINES), "mode": draw.choice(MODES), "audit": AUDIT, "dawdle": seed,
        "trainer": {"max_steps": STEPS, "save_strategy": "no"},
    }  # fmt: skip
    if draw.random() < 0.8:
        where = draw.choice(sorted(PLACES))
        fault = {
            "where": where,
            "kind": draw.choice(("error", "disk" if where in WRITTEN else "memory")),
            "rank": 0 if where in WRITTEN else draw.choice((0, 1)),
            "audit_number": draw.randint(1, STEPS + 1),
            "call": draw.randint(1, PLACES[where]),
        }
        case["plants"] = [fault]
    return case


def plain(case: dict[str, Any]) -> dict[str, Any]:
    """The same training without the callback."""
    return {name: case[name] for name in ("engine", "mode", "trainer")}


def words(case: dict[str, Any]) -> str:
    """What happens in a run."""
    fault = next(iter(case.get("plants", ())), None)
    said = "nothing breaks" if fault is None else (
        f"{fault['kind']} in call {fault['call']} of {fault['where']}, rank {fault['rank']}, audit {fault['audit_number']}"
    )  # fmt: skip
    return f"{case['engine']}, {case['mode']}: {said}"


def faults_of(folder: Path, name: str, said: Sequence[dict[str, Any]], without: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it should be, in words."""
    if any("hung" in rank for rank in said):
        return [f"stands still after {SECONDS:.0f} s"]
    if errors := [rank["words"] for rank in (*without, *said) if "error" in rank]:
        return [f"training broke: {errors[0]}"]
    found = []
    if any(
        rank[name] != other[name] for rank, other in zip(said, without, strict=True) for name in ("weights", "losses")
    ):
        found.append("trained otherwise")
    if any(rank["left"] for rank in said):
        found.append("left something in the model")
    recorded = [line["step"] for line in lines(folder, name, "records.jsonl")]
    broken = [line["step"] for line in lines(folder, name, "failures.jsonl")]
    if recorded != sorted(set(recorded)):
        found.append(f"records of steps {recorded}")
    if set(recorded) | set(broken) != set(range(STEPS + 1)):
        found.append(f"records of {recorded} and failures of {broken}, of {STEPS + 1} steps")
    return found


def main() -> None:
    """Run them and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    cases = {f"{seed}": drawn(seed) for seed in range(options.first_seed, options.first_seed + options.runs)}
    plains = {f"{case['engine']}, {case['mode']}": plain(case) for case in cases.values()}
    bad, failures = 0, 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        said = launch(folder, {**plains, **cases})
        for name, case in cases.items():
            found = faults_of(folder, name, said[name], said[f"{case['engine']}, {case['mode']}"])
            bad += bool(found)
            failures += len(lines(folder, name, "failures.jsonl"))
            print(f"{name:>4} {words(case)}: {'; '.join(found) or 'as it should be'}", flush=True)
    engines = [
        rank["engine"]
        for name, case in cases.items()
        if case["engine"] == "fsdp2"
        for rank in said[name]
        if "engine" in rank
    ]
    assert all(name.startswith("FSDP") for name in engines), "accelerate trains DDP in place of FSDP2 without a word"
    fired = sum(rank.get("fired", 0) for name in cases for rank in said[name])
    planted = sum(len(case.get("plants", ())) for case in cases.values())
    print(
        f"{len(cases)} runs, {fired} of {planted} faults came to happen (the others wait for a call that nobody makes), "
        f"{failures} audits broke: {len(cases) - bad} runs as they should be, {bad} not"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
