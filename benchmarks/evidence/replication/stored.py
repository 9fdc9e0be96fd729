"""A stored run: its records and looks, and the values of its probe pairs after the last step. No weights, no texts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align_audit import AuditRun
from align_audit.record.audit_record import AuditRecord
from replication.auditing import AUDITS, read_spent
from replication.plan import FIRST, KINDS, SECOND, Case, Kind, Setup
from replication.training import TRAINED, TRAINER

DATA = Path(__file__).parent / "data"
ABOUT, RECORDS, LOOKS, VALUES = "run.json", "records.jsonl.gz", "looks.jsonl.gz", "values.npz"
DIGITS = 6
"""Significant digits that are kept of a number."""


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One run as it is judged.

    Attributes:
        about: what it took, and with which versions.
        records: full audits.
        looks: health audits in the run, by step.
        values: ``<slice>.effect`` ``[N, L + 1]`` (the embedding first), ``<slice>.shift`` ``[N]``, nats, after the last step.
    """

    setup: Setup
    kind: Kind
    seed: int
    about: dict[str, Any]
    records: list[AuditRecord]
    looks: list[AuditRecord]
    values: Mapping[str, np.ndarray]

    def audit(self, name: str, step: int) -> AuditRecord:
        """The full audit of a slice at a step."""
        return next(record for record in self.records if record.provenance.probe_name == name and record.step == step)

    @cached_property
    def last(self) -> list[AuditRecord]:
        """The audits of both slices after the last step."""
        return [self.audit(name, self.setup.audited[-1]) for name in (FIRST, SECOND)]

    @property
    def course(self) -> list[AuditRecord]:
        """The audits of the first slice, by step."""
        of_first = [record for record in self.records if record.provenance.probe_name == FIRST]
        return sorted(of_first, key=lambda record: record.step)


def pack(case: Case, folder: Path, data: Path, hidden: Mapping[str, str]) -> Path:
    """Keep of a finished run what claims need.

    Args:
        hidden: paths of this machine → what stands in their place.

    Returns:
        The folder of the stored run.
    """
    import torch
    import transformers
    import trl

    target = data / case.setup.name / case.name
    target.mkdir(parents=True, exist_ok=True)
    run = AuditRun.load(folder / AUDITS)
    looks = AuditRun.load(folder / TRAINER)
    _write(target / RECORDS, run.records, hidden)
    _write(target / LOOKS, looks.records, hidden)
    values: dict[str, np.ndarray] = {}
    for name in (FIRST, SECOND):
        arrays = run.select(name).load_arrays(case.setup.audited[-1], "arrays")
        shift = (arrays["per_pair.chosen_logp"] - arrays["per_pair.rejected_logp"]) - (
            arrays["per_pair.reference_chosen_logp"] - arrays["per_pair.reference_rejected_logp"]
        )
        values |= {f"{name}.effect": arrays["per_pair.effect"], f"{name}.shift": shift}
    small: dict[str, Any] = {name: array.astype(np.float32) for name, array in values.items()}
    np.savez_compressed(target / VALUES, **small)
    about = {
        "training": json.loads((folder / TRAINED).read_text(encoding="utf-8")),
        "audits": read_spent(folder),
        "learning_rate": case.learning_rate,
        "log": _log_ends(looks),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }
    (target / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (target.parent / "setup.json").write_text(json.dumps(case.setup.to_dict(), indent=1) + "\n", encoding="utf-8")
    return target


def _log_ends(run: AuditRun) -> dict[str, dict[str, float]]:
    """The trainer's first and last logged loss, accuracy and margin."""
    rows = [row for row in run.training_log if "loss" in row.logs]
    names = ("loss", "rewards/accuracies", "rewards/margins")
    return {
        place: {name: float(f"{row.logs[name]:.4g}") for name in names if name in row.logs}
        for place, row in (("first", rows[0]), ("last", rows[-1]))
    }


def _write(path: Path, records: Iterable[AuditRecord], hidden: Mapping[str, str]) -> None:
    # No time of writing and no name in it: the same runs are the same bytes.
    with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as out:
        for record in records:
            text = json.dumps(_rounded(json.loads(record.model_dump_json())), separators=(",", ":"))
            for found, said in hidden.items():
                text = text.replace(json.dumps(found)[1:-1], said)
            out.write((text + "\n").encode())


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    if isinstance(values, float) and math.isfinite(values):
        return float(f"{values:.{DIGITS}g}")
    return values


def read_records(path: Path) -> list[AuditRecord]:
    """The records of a packed file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [AuditRecord.from_values(json.loads(line), "a stored record") for line in lines]


def read_run(folder: Path) -> StoredRun:
    """A stored run out of its folder."""
    kind, _, seed = folder.name.rpartition("-")
    with np.load(folder / VALUES) as arrays:
        values = {name: arrays[name].astype(np.float64) for name in arrays.files}
    return StoredRun(
        Setup.from_dict(json.loads((folder.parent / "setup.json").read_text(encoding="utf-8"))),
        kind,  # type: ignore[arg-type]
        int(seed),
        json.loads((folder / ABOUT).read_text(encoding="utf-8")),
        read_records(folder / RECORDS),
        read_records(folder / LOOKS),
        values,
    )


Runs = dict[str, list[StoredRun]]
"""Kind → its runs, by seed; of one setup."""


def load(data: Path = DATA) -> list[Runs]:
    """The stored runs of each setup that has a healthy one.

    Raises:
        FileNotFoundError: there are none, with what to do.
    """
    setups = []
    for folder in sorted(path.parent for path in data.glob("*/setup.json")):
        runs = [read_run(path.parent) for path in folder.glob(f"*/{ABOUT}")]
        by_kind: Runs = {
            kind: sorted((run for run in runs if run.kind == kind), key=lambda run: run.seed) for kind in KINDS
        }
        if by_kind["healthy"]:
            setups.append(by_kind)
    if not setups:
        raise FileNotFoundError(f"no stored runs in {data}; make some with `replication run`")
    return setups
