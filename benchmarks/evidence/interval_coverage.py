"""Do the intervals hold? Coverage of nominal 95 % over repeated draws of 8 to 64 pairs from a large probe set.

    python benchmarks/evidence/interval_coverage.py --json coverage.json       # both models: a quarter of an hour on one core

The policies of ``trained.py`` are audited once on 600 pairs, whose means are the truth; then pairs are drawn with
replacement, again and again, and every interval that a record gives is made from them alone by the code that makes a
record's. Draws are independent of each other, whatever prompts the pairs share, so that 8 pairs are 8 groups. Printed per
model, step, number of pairs and quantity: the least and the largest coverage over layers (with the layer), and how many of
the draws gave an interval at all.
Monte Carlo error at 2,000 draws: 0.5 points.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trained

from align_audit.measures.control_variate import beside_attribution, control_variate_means
from align_audit.measures.patching import summarize_patching
from align_audit.measures.statistics import mean_intervals, share_interval

SOME_PATCHED = "effect, some patched"


def measured(policy: Any, reference: Any, probes: Any) -> dict[str, np.ndarray]:
    """Per-pair numbers over all pairs: effects [N, L + 1], transplants [N, L + 2], shift, accuracy, attribution."""
    from align_audit.auditing.once import audit_once
    from align_audit.config import AuditConfig
    from align_audit.models.reference import resolve_reference

    config = AuditConfig.from_dict(
        {
            "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "localization": {"enabled": False},
            "patching": {"exact_pairs": len(probes), "reverse": False, "noise_draws": 0}, "progress": False,
        }
    )  # fmt: skip
    arrays = audit_once(policy, resolve_reference(policy, reference), probes, config).arrays
    pair = {name.removeprefix("per_pair."): values for name, values in arrays.items()}
    shift = (pair["chosen_logp"] - pair["rejected_logp"]) - (
        pair["reference_chosen_logp"] - pair["reference_rejected_logp"]
    )
    return {
        "effect": pair["effect"], "transplant": pair["transplant"], "shift": shift, "kl": pair["kl"],
        "attribution": pair["attribution"][:, 1:],
    }  # fmt: skip


def populations(name: str, steps: list[int], folder: Path | None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Of each step what is measured of 600 pairs; kept in ``folder``, and taken from there."""
    from align_audit import ProbeSet

    files = {step: folder / f"{name}-{step}.npz" for step in steps} if folder is not None else {}
    if files and all(file.is_file() for file in files.values()):
        for step, file in files.items():
            with np.load(file) as kept:
                yield step, {key: kept[key] for key in kept.files}
        return
    run = trained.train(name, steps)
    probes = ProbeSet.from_dataset(run.held_out + run.rows, run.tokenizer, max_pairs=600, max_length=512)
    for step in steps:
        pair = measured(run.at(step), run.reference, probes)
        if files:
            files[step].parent.mkdir(parents=True, exist_ok=True)
            np.savez(files[step], **pair)
        yield step, pair


def intervals(pair: dict[str, np.ndarray], exact: int, **options: Any) -> dict[str, list[Any]]:
    """Every interval of a record that these per-pair numbers give."""
    summary = summarize_patching(pair["effect"], pair["transplant"], pair["shift"], **options)
    shift, kl = mean_intervals(np.column_stack([pair["shift"], pair["kl"]]), **options)
    accuracy = share_interval(pair["shift"] > 0, options["confidence"])
    some = np.where(np.arange(len(pair["shift"]))[:, None] < exact, pair["effect"][:, 1:], np.nan)
    combined = control_variate_means(some, beside_attribution(pair["attribution"], pair["shift"], exact))
    return {
        "margins.shift": [shift],
        "margins.accuracy": [accuracy],
        "margins.kl": [kl],
        "effect": summary.effect,
        SOME_PATCHED: [variate.interval for variate in combined],
        "recovery": summary.recovery,
        "layer_gain": summary.layer_gain,
        "block_transplant": summary.block_transplant,
        "additivity": [summary.additivity],
    }


def covered(
    pair: dict[str, np.ndarray],
    truth: dict[str, list[float]],
    pairs: int,
    options: argparse.Namespace,
    how: dict[str, Any],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per quantity and layer: in how many draws of so many pairs the interval holds the truth, and in how many there is one."""
    hits: dict[str, np.ndarray] = {}
    known: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(1)
    population = len(pair["shift"])
    for draw in range(options.draws):
        taken = generator.integers(0, population, size=pairs)
        drawn = intervals({key: values[taken] for key, values in pair.items()}, options.exact, seed=draw, **how)
        for key, values in drawn.items():
            inside = [each.low <= true <= each.high for each, true in zip(values, truth[key], strict=True)]
            have = [not np.isnan(each.low) for each in values]
            hits[key] = hits.get(key, 0) + np.array(inside, dtype=int)
            known[key] = known.get(key, 0) + np.array(have, dtype=int)
    return {key: (hits[key], known[key]) for key in hits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(trained.NAMES), choices=trained.NAMES)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 160])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 12, 16, 24, 32, 64])
    parser.add_argument("--exact", type=int, default=24, help="patched pairs where not all are")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--interval", choices=("percentile", "bca"), default="percentile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arrays", type=Path, help="folder to keep the pairs' numbers in, and to take them from")
    options = parser.parse_args()
    began, results = time.perf_counter(), []
    header = f"{'quantity':<26}{'coverage over layers':>22}{'draws with an interval':>24}"
    print(f"{'model':>8}{'step':>5}{'pairs':>6}  {header}")
    for name in trained.available(options.models):
        for step, pair in populations(name, options.steps, options.arrays):
            how: dict[str, Any] = {"resamples": 1000, "confidence": 0.95, "method": options.interval}
            truth = {
                key: [each.mean for each in values]
                for key, values in intervals(pair, len(pair["shift"]), seed=0, **how).items()
            }
            truth[SOME_PATCHED] = truth["effect"]
            for pairs in options.pairs:
                for key, (hits, known) in covered(pair, truth, pairs, options, how).items():
                    if key == SOME_PATCHED and pairs <= options.exact:
                        continue
                    share = hits / np.maximum(known, 1)
                    low, high = int(share.argmin()), int(share.argmax())
                    words = f"{share[low]:.3f} ({low}) … {share[high]:.3f} ({high})"
                    words = words if len(share) > 1 else f"{share[0]:.3f}"
                    have = f"{known.min():>18} of {options.draws}"
                    print(f"{name:>8}{step:>5}{pairs:>6}  {key:<26}{words:>22}{have}", flush=True)
                    results.append(
                        {
                            "model": name, "step": step, "quantity": key, "coverage": share.tolist(),
                            "known": known.tolist(), "draws": options.draws, "pairs": pairs,
                        }
                    )  # fmt: skip
    summarize(results, options.pairs)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def summarize(results: list[dict[str, Any]], sizes: list[int]) -> None:
    """By number of pairs: how many intervals cover 93 to 97 %, and the extremes."""
    for pairs in sizes:
        every = np.concatenate([row["coverage"] for row in results if row["pairs"] == pairs])
        inside = ((every >= 0.925) & (every < 0.975)).sum()
        print(
            f"{pairs} pairs: {inside} of {len(every)} intervals cover 93–97 %; mean {every.mean():.3f}, least "
            f"{every.min():.3f}, largest {every.max():.3f}"
        )


if __name__ == "__main__":
    main()
