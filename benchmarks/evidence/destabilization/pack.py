"""``pack``: what scoring needs of finished runs, added to one small file a split. Weights stay where they are."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from destabilization.auditing import read_records
from destabilization.run import ABOUT, TRUTH
from destabilization.stored import DATA, packed
from destabilization.training import LOG, WEIGHTS

DIGITS = 5
"""Significant digits that are kept of a number: far more than an interval over pairs leaves certain."""
UNUSED_LOGS = ("epoch", "runtime", "per_second", "num_tokens", "logits/", "learning_rate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs' folders")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the packed files")


def main(options: argparse.Namespace) -> None:
    """Pack every split that has finished runs: they come beside those that were packed before, or in their place.

    Raises:
        ValueError: a run is not its twin until its fault begins.
    """
    options.data.mkdir(parents=True, exist_ok=True)
    for split in ("tuning", "scoring"):
        path = packed(split, options.data)
        lines = stored_lines(path)
        made = {line["about"]["name"]: line for line in map(pack, finished(options.out / split))}
        if not made:
            continue
        lines |= made
        lines = {
            name: line
            for name, line in lines.items()
            if line["about"]["twin"] is None or line["about"]["twin"] in lines
        }
        for line in lines.values():
            check_twin(line, lines)
        # No time of writing and no name in it: the same runs are the same bytes.
        with (
            path.open("wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0, compresslevel=9) as out,
        ):
            for name in sorted(lines):
                out.write((json.dumps(lines[name], separators=(",", ":")) + "\n").encode())
        print(
            f"{path}: {len(lines)} runs, {len(made)} of them from {options.out}, {path.stat().st_size / 2**20:.2f} MiB"
        )


def finished(folder: Path) -> Iterator[Path]:
    """The folders of a split's runs that have all that scoring needs."""
    for about in sorted(folder.glob(f"*/{ABOUT}")):
        if (about.parent / TRUTH).exists() and read_records(about.parent, "health"):
            yield about.parent


def stored_lines(path: Path) -> dict[str, dict[str, Any]]:
    """What is packed already, by the names of the runs."""
    if not path.exists():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {line["about"]["name"]: line for line in map(json.loads, file)}


def pack(folder: Path) -> dict[str, Any]:
    """One run in plain values."""
    weights = json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    truth = [json.loads(line) for line in (folder / TRUTH).read_text(encoding="utf-8").splitlines()]
    return {
        "about": json.loads((folder / ABOUT).read_text(encoding="utf-8")),
        "weights": {step: kept["policy"] for step, kept in weights.items()},
        "truth": [rounded(values) for values in truth],
        "log": [
            {
                "step": row["step"],
                "logs": rounded(
                    {name: value for name, value in row["logs"].items() if not any(map(name.__contains__, UNUSED_LOGS))}
                ),
            }
            for row in log
        ],
        "health": [compact(values) for values in read_records(folder, "health")],
        "full": [compact(values) for values in read_records(folder, "full")],
    }


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what no rule reads: settings, versions, reasons, alerts, controls' effects."""
    small = {**record, "alerts": [], "reasons": {}, "sites": []}
    small["provenance"] = {**record["provenance"], "config": {}, "versions": {}, "created": "", "probe_source": ""}
    small["controls"] = {
        name: {**control, "effect": None, "reason": ""} for name, control in record["controls"].items()
    }
    rounded_values: dict[str, Any] = rounded(small)
    return rounded_values


def rounded(values: Any) -> Any:
    """The same nested values with numbers of a few significant digits."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    if isinstance(values, float) and math.isfinite(values):
        return float(f"{values:.{DIGITS}g}")
    return values


def check_twin(line: dict[str, Any], lines: dict[str, dict[str, Any]]) -> None:
    """A run has its twin's weights, bit by bit, until its fault begins.

    Raises:
        ValueError: it has not.
    """
    twin = line["about"]["twin"]
    if twin is None:
        return
    twin_weights = lines[twin]["weights"]
    for step, weights in line["weights"].items():
        if int(step) <= line["about"]["fault_step"] and twin_weights[step] != weights:
            raise ValueError(
                f"{line['about']['name']} has other weights than its twin at step {step}, before its fault; expected equal ones"
            )
