"""``inside``: what each signal knows of a run's end when a part of the run is done, and how early it could say so.

AUROC of runs that end ruined or wasted against healthy ones, by one signal at the last audit before 10, 25, 50 and 75 % of the
run, with bootstrap intervals over seeds. Which side of a signal is the bad one is learned on the tuning split. *Lead*: the
signal's first step beyond all that healthy tuning runs show, before the line of the ground truth.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from destabilization.kinds import STEPS
from destabilization.score import Groups, share, table
from destabilization.signals import FAMILIES, LOGGED, Signal, logged
from destabilization.stored import DATA, StoredRun, load

PARTS = (0.1, 0.25, 0.5, 0.75)
RESAMPLES = 1_000
FEWEST = 3
"""Runs of each side without which nothing is said."""

Reading = Callable[[StoredRun, int], float]
"""The value of a signal in a run, as known at a step; NaN where it is not known."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")
    parser.add_argument("--json", type=Path, help="also write all of it there")


def readings() -> dict[tuple[str, str], Reading]:
    """(family, signal) → how to read it."""

    def of_audits(family: str, signal: Signal) -> Reading:
        def read(run: StoredRun, step: int) -> float:
            records = run.scheduled if family in ("behaviour", "continuations") else run.full
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


def auroc(bad: Sequence[float], good: Sequence[float]) -> float:
    """The chance that a bad run's value is the larger one, ties half; NaN where one side has too few.

    Example:
        >>> auroc([3, 4, 5], [1, 2, 3])
        0.9444444444444444
    """
    high, low = np.asarray(bad, float), np.asarray(good, float)
    if len(high) < FEWEST or len(low) < FEWEST:
        return math.nan
    larger, equal = high[:, None] > low[None, :], high[:, None] == low[None, :]
    return float((larger + 0.5 * equal).mean())


def finite(read: Reading, runs: Sequence[StoredRun], step: int) -> list[float]:
    """The values that are known."""
    return [value for run in runs if math.isfinite(value := read(run, step))]


def interval(
    read: Reading, sign: float, bad: Sequence[StoredRun], good: Sequence[StoredRun], step: int
) -> tuple[float, float]:
    """A bootstrap interval of the AUROC at 95 %: runs are drawn again on each side."""
    rng = np.random.default_rng(0)
    high = np.asarray(finite(read, bad, step)) * sign
    low = np.asarray(finite(read, good, step)) * sign
    if len(high) < FEWEST or len(low) < FEWEST:
        return math.nan, math.nan
    drawn = [auroc(rng.choice(high, len(high)), rng.choice(low, len(low))) for _ in range(RESAMPLES)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def sign_of(read: Reading, bad: Sequence[StoredRun], good: Sequence[StoredRun]) -> float:
    """1 where bad runs of the tuning split end with the larger value, −1 where with the smaller one."""
    value = auroc(finite(read, bad, STEPS), finite(read, good, STEPS))
    return -1.0 if value < 0.5 else 1.0


def lead(read: Reading, sign: float, limit: float, run: StoredRun) -> int | None:
    """Steps from the first look beyond the limit to the line; None where it never is."""
    since = run.outcome.since
    after = run.fault_step or 0
    first = next((step for step in run.looks if step > after and sign * read(run, step) > limit), None)
    return None if first is None or since is None else since - first


def main(options: argparse.Namespace) -> None:
    """Print the table."""
    tuning, scoring = (Groups.of(load(split, options.data)) for split in ("tuning", "scoring"))
    rows, result = [], []
    for (family, name), read in readings().items():
        sign = sign_of(read, tuning.harmed, tuning.healthy)
        usual = [sign * value for run in tuning.healthy for step in run.looks for value in finite(read, [run], step)]
        limit = max(usual, default=math.inf)
        row: list[Any] = [family, name]
        figures: dict[str, Any] = {"family": family, "signal": name, "sign": sign, "limit": limit}
        for part in PARTS:
            step = round(part * STEPS)
            value = auroc(
                [sign * number for number in finite(read, scoring.harmed, step)],
                [sign * number for number in finite(read, scoring.healthy, step)],
            )
            low, high = interval(read, sign, scoring.harmed, scoring.healthy, step)
            row.append("" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})")
            figures[f"auroc_{part:.0%}"] = [value, low, high]
        leads = [steps for run in scoring.harmed if (steps := lead(read, sign, limit, run)) is not None]
        false = sum(
            any(sign * value > limit for step in run.looks for value in finite(read, [run], step))
            for run in scoring.healthy
        )
        row += [f"{len(leads)}", f"{median(leads):+.0f}" if leads else "", share(false, len(scoring.healthy))]
        figures |= {"caught": len(leads), "median_lead": median(leads) if leads else None, "false": false}
        rows.append(row)
        result.append(figures)
    print(f"{len(scoring.harmed)} runs that end ruined or wasted against {len(scoring.healthy)} healthy ones.\n")
    head = [
        "from",
        "signal",
        *(f"AUROC at {part:.0%}" for part in PARTS),
        "caught",
        "median lead",
        "healthy beyond the limit",
    ]
    table(head, rows)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
