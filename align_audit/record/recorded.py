"""What a run's own log says of each audit: which step, weights and pairs. Read lightly, without the numbers.

A checkpoint's files say where it came from, and files can be replaced. The log beside it was written while the run went on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError

from align_audit.record.checkpoint_names import checkpoint_step
from align_audit.record.log import FOLDER, RECORDS

_COMPARABLE_FROM = 2
"""Version of the methods since which hashes of weights are made as they are now: earlier ones tell nothing of these weights."""


class RecordedAudit(BaseModel):
    """Which weights and pairs a record speaks of; hashes as in its ``provenance``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    methods_version: int = 1
    policy_hash: str = Field(validation_alias=AliasPath("provenance", "policy_hash"))
    reference_hash: str = Field(validation_alias=AliasPath("provenance", "reference_hash"))
    probe_hash: str = Field(validation_alias=AliasPath("provenance", "probe_hash"))
    parameter_dtype: str = Field("", validation_alias=AliasPath("provenance", "parameter_dtype"))
    probe_source: str = Field("", validation_alias=AliasPath("provenance", "probe_source"))
    last_sync_step: int | None = Field(None, validation_alias=AliasPath("reference_check", "last_sync_step"))


@dataclass(frozen=True)
class RecordedRun:
    """One log, as far as it can be read.

    Attributes:
        path: of its ``records.jsonl``.
        audits: in the order of its lines.
    """

    path: Path
    audits: tuple[RecordedAudit, ...]

    def at(self, step: int) -> list[RecordedAudit]:
        """Those of one step."""
        return [audit for audit in self.audits if audit.step == step]

    def references(self, step: int | None) -> set[str]:
        """Hashes that the reference may have at a step. A reference that is synchronized is known at audited steps only."""
        moves = any(audit.last_sync_step is not None for audit in self.audits)
        audits = self.audits if step is None or not moves else self.at(step)
        return {audit.reference_hash for audit in audits}


def runs_beside(checkpoint: Path) -> list[RecordedRun]:
    """The logs of the run that a checkpoint lies in: the present one, and those that later runs set aside.

    They lie in the ``align_audit`` folder of the checkpoint's own folder (a final model in the output directory) or of the
    one that it is in. A log that cannot be read says nothing here.
    """
    folder = checkpoint.resolve()
    for place in (folder / FOLDER, folder.parent / FOLDER):
        paths = [place / RECORDS, *sorted(place.glob(f"previous-*/{RECORDS}"))]
        runs = [RecordedRun(path, audits) for path in paths if (audits := _audits(path))]
        if runs:
            return runs
    return []


def step_saved(checkpoint: Path) -> int | None:
    """At which step of training a checkpoint was saved; None: its folder does not say."""
    saved = checkpoint_step(checkpoint.resolve().name)
    if saved is not None:
        return saved
    return _in_state(checkpoint, "global_step")


def steps_planned(checkpoint: Path) -> int | None:
    """How many steps the training has that a checkpoint was saved by; None: its folder does not say."""
    steps = _in_state(checkpoint, "max_steps")
    return steps if steps is not None and steps > 0 else None


def _in_state(checkpoint: Path, name: str) -> int | None:
    """A whole number of what its trainer wrote of training."""
    try:
        value = json.loads((checkpoint / "trainer_state.json").read_bytes()).get(name)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _audits(path: Path) -> tuple[RecordedAudit, ...]:
    audits = []
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    audit = RecordedAudit.model_validate_json(line)
                except ValidationError:  # no record, or a damaged one: whoever reads the log says so
                    continue
                if audit.methods_version >= _COMPARABLE_FROM:
                    audits.append(audit)
    except OSError:
        return ()
    return tuple(audits)
