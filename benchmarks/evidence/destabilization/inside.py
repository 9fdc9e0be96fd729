"""``inside``: what each signal knows of a run's end when a part of the run is done, and how early it could say so.

AUROC of runs that end ruined or wasted against healthy ones of the same model, by one signal at the last audit before 10, 25,
50 and 75 % of the run, with bootstrap intervals over runs. Which side of a signal is the bad one is learned on the tuning
split; of what full audits measure, of which that split has none, on the scoring split's seeds up to ``LEARNED``, and these runs
are not judged by it. *Lead*: from the signal's first step beyond all that healthy runs show that were learned from, to the line
of the ground truth.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from destabilization.score import print_and_write, table
from destabilization.signals import FAMILIES, LOGGED, OF_FULL_AUDITS, Signal, logged
from destabilization.stored import DATA, StoredRun, load
from destabilization.verdicts import Groups, share

BEGIN, END = "<!-- inside: the command inside writes what stands here -->", "<!-- end of inside -->"
PARTS = (0.1, 0.25, 0.5, 0.75)
RESAMPLES = 1_000
FEWEST = 3
"""Runs of each side without which nothing is said."""
LEARNED = 104
"""The last seed from which it is learned which side of a full audit's signal is the bad one."""

Reading = Callable[[StoredRun, int], float]
"""The value of a signal in a run, as known at a step; NaN where it is not known."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")
    parser.add_argument("--write", type=Path, help="also put the table into this document, between its marks")
    parser.add_argument("--json", type=Path, help="also write all of it there")


def readings() -> dict[tuple[str, str], Reading]:
    """(family, signal) → how to read it."""

    def of_audits(family: str, signal: Signal) -> Reading:
        def read(run: StoredRun, step: int) -> float:
            records = run.scheduled if family not in OF_FULL_AUDITS else run.full
            audited = [record for record in records if 0 < record.step <= step]
            return signal(audited[-1]) if audited else math.nan

        return read

    def of_log(name: str) -> Reading:
        return lambda run, step: logged(run.log, name, step)

    return {("training log", name): of_log(name) for name in LOGGED} | {
        (family, name): of_audits(family, signal)
        for family, signals in FAMILIES.items()
        for name, signal in signals.items()
    }


Values = list[tuple[str, float]]
"""Model and value of each run."""


def auroc(bad: Values, good: Values) -> float:
    """The chance that a bad run's value is larger than a good one's of the same model, ties half; NaN of too few runs.

    Example:
        >>> auroc([("a", 3), ("a", 4), ("b", 5)], [("a", 1), ("a", 2), ("b", 6)])
        0.8
    """
    if len(bad) < FEWEST or len(good) < FEWEST:
        return math.nan
    larger, pairs = 0.0, 0
    for model in {model for model, _ in bad}:
        high = np.array([value for name, value in bad if name == model])
        low = np.array([value for name, value in good if name == model])
        larger += float((high[:, None] > low[None, :]).sum() + 0.5 * (high[:, None] == low[None, :]).sum())
        pairs += len(high) * len(low)
    return larger / pairs if pairs else math.nan


def finite(read: Reading, sign: float, runs: Sequence[StoredRun], part: float) -> Values:
    """The values that are known when that part of each run is done, the bad side up."""
    return [(run.model, sign * value) for run in runs if math.isfinite(value := read(run, round(part * run.steps)))]


def highest(read: Reading, sign: float, run: StoredRun) -> float:
    """The worst value of all looks of a run, the bad side up; minus infinity where none is known."""
    values = (sign * read(run, step) for step in run.looks)
    return max(filter(math.isfinite, values), default=-math.inf)


def interval(bad: Values, good: Values) -> tuple[float, float]:
    """A bootstrap interval of the AUROC at 95 %: runs are drawn again on each side."""
    rng = np.random.default_rng(0)
    if len(bad) < FEWEST or len(good) < FEWEST:
        return math.nan, math.nan

    def again(values: Values) -> Values:
        return [values[place] for place in rng.integers(len(values), size=len(values))]

    drawn = [auroc(again(bad), again(good)) for _ in range(RESAMPLES)]
    return float(np.nanquantile(drawn, 0.025)), float(np.nanquantile(drawn, 0.975))


def sign_of(read: Reading, bad: Sequence[StoredRun], good: Sequence[StoredRun]) -> float:
    """1 where bad runs end with the larger value, −1 where with the smaller one."""
    value = auroc(finite(read, 1.0, bad, 1.0), finite(read, 1.0, good, 1.0))
    return -1.0 if value < 0.5 else 1.0


def lead(read: Reading, sign: float, limit: float, run: StoredRun) -> int | None:
    """Steps from the first look beyond the limit to the line; None where it never is."""
    since = run.outcome.since
    after = run.fault_step or 0
    first = next((step for step in run.looks if step > after and sign * read(run, step) > limit), None)
    return None if first is None or since is None else since - first


def main(options: argparse.Namespace) -> None:
    """Print the table, and write it where asked."""
    print_and_write(options, report, BEGIN, END)


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table; the figures."""
    tuning, scoring = (load(split, options.data) for split in ("tuning", "scoring"))
    by_looks = Groups.of(tuning), Groups.of(scoring)
    by_audits = (
        Groups.of([run for run in scoring if run.about["seed"] <= LEARNED]),
        Groups.of([run for run in scoring if run.about["seed"] > LEARNED and run.full]),
    )
    rows, result = [], []
    for (family, name), read in readings().items():
        learned, judged = by_audits if family in OF_FULL_AUDITS else by_looks
        sign = sign_of(read, learned.harmed, learned.healthy)
        known = [highest(read, sign, run) for run in learned.healthy]
        limit = max(filter(math.isfinite, known), default=math.inf)
        row: list[Any] = [family, name]
        figures: dict[str, Any] = {"family": family, "signal": name, "sign": sign, "limit": limit}
        for part in PARTS:
            bad, good = finite(read, sign, judged.harmed, part), finite(read, sign, judged.healthy, part)
            value, (low, high) = auroc(bad, good), interval(bad, good)
            counted = f"{len(bad)}, {len(good)}"
            row.append("" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f}; {counted})")
            figures[f"auroc_{part:.0%}"] = [value, low, high]
        leads = [steps for run in judged.harmed if (steps := lead(read, sign, limit, run)) is not None]
        false = sum(highest(read, sign, run) > limit for run in judged.healthy)
        row += [
            f"{len(leads)} of {len(judged.harmed)}",
            f"{median(leads):+.0f}" if leads else "",
            share(false, len(judged.healthy)),
        ]
        figures |= {"caught": len(leads), "median_lead": median(leads) if leads else None, "false": false}
        rows.append(row)
        result.append(figures)
    print("## What each signal knows, and when\n")
    print(
        f"Made by `python benchmarks/evidence/destabilization inside` ({datetime.date.today()}). AUROC of runs that end\n"
        "ruined or wasted against healthy ones of the same model, at the last audit before that part of the run is done;\n"
        "in brackets a bootstrap interval at 95 % and of how many harmed and healthy runs the signal is known. *Caught*:\n"
        "harmed runs in which it once lies beyond all that healthy runs show from which that limit was learned."
    )
    for words, (_, judged) in (("Signals of looks and log", by_looks), ("Signals of full audits", by_audits)):
        print(f"{words}: {len(judged.harmed)} harmed runs, {len(judged.healthy)} healthy ones.")
    print()
    head = [
        "from",
        "signal",
        *(f"AUROC at {part:.0%}" for part in PARTS),
        "caught",
        "median lead",
        "healthy beyond the limit",
    ]
    table(head, rows)
    return result
