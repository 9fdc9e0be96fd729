"""A run as it is scored: its records, the trainer's log and its fate, out of one line of a packed file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align_audit.record.audit_record import AuditRecord
from align_audit.record.training_log import LogRow
from destabilization.kinds import STEPS, Split
from destabilization.lines import Outcome, Truth, outcome

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One run.

    Attributes:
        about: what ``run.describe`` says of it.
        truth: its ground truth, from step 0 on.
        log: the trainer's, oldest first; of each step, and of evaluations.
        health: audit records by step, the first one of before training: of scheduled looks and of all other steps kept.
        full: those of full audits.
        twin_truth: the ground truth of the run without the fault; None where there is none.
    """

    about: dict[str, Any]
    truth: list[Truth]
    log: list[LogRow]
    health: list[AuditRecord]
    full: list[AuditRecord]
    twin_truth: list[Truth] | None

    @property
    def name(self) -> str:
        return str(self.about["name"])

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    @property
    def group(self) -> str:
        return str(self.about["group"])

    @property
    def model(self) -> str:
        return str(self.about["settings"]["model"])

    @property
    def steps(self) -> int:
        """How long it is; the older ones, which do not say it, are all of one length."""
        return int(self.about["settings"].get("steps", STEPS))

    @property
    def faulty(self) -> bool:
        """Whether it was given a fault: nothing of what became of it."""
        return self.about["twin"] is not None

    @property
    def fault_step(self) -> int | None:
        """Steps before the fault, where it has one."""
        step = self.about["fault_step"]
        return None if step is None else int(step)

    @cached_property
    def outcome(self) -> Outcome:
        """What became of it, by the lines."""
        return outcome(self.truth, self.twin_truth)

    @property
    def looks(self) -> list[int]:
        """Steps of scheduled looks after the first step."""
        return [int(step) for step in self.about["looks"] if step > 0]

    @property
    def scheduled(self) -> list[AuditRecord]:
        """The health audits that the schedule asks for, and the one before training."""
        steps = {0, *self.looks}
        return [record for record in self.health if record.step in steps]


def load(split: Split, folder: Path = DATA) -> list[StoredRun]:
    """The packed runs of a split, in the order of their names.

    Raises:
        FileNotFoundError: there are none, with what to do.
    """
    path = packed(split, folder)
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; make it with the commands `run` and `pack`")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return read_runs([json.loads(line) for line in file])


def packed(split: Split, folder: Path = DATA) -> Path:
    """The file of a split."""
    return folder / f"{split}.jsonl.gz"


def read_runs(lines: Sequence[dict[str, Any]]) -> list[StoredRun]:
    """Runs out of what ``pack`` wrote of each."""
    truths = {line["about"]["name"]: [Truth(**values) for values in line["truth"]] for line in lines}
    return [
        StoredRun(
            line["about"],
            truths[line["about"]["name"]],
            [LogRow(row["step"], {name: float(value) for name, value in row["logs"].items()}) for row in line["log"]],
            [AuditRecord.from_values(values, "a packed record") for values in line["health"]],
            [AuditRecord.from_values(values, "a packed record") for values in line["full"]],
            truths.get(line["about"]["twin"]),
        )
        for line in sorted(lines, key=lambda line: str(line["about"]["name"]))
    ]
