"""The values of pairs beside a run's records: what gives figures their intervals, or why nothing does."""

from __future__ import annotations

import math

import numpy as np

from align_audit.errors import RecordError, first_line
from align_audit.record.audit_record import AuditRecord
from align_audit.record.figures import NO_MEAN, Figure, Sample
from align_audit.record.run import AuditRun

_AGREES = 1e-6
"""Relative error within which the values of pairs give the record's number."""


class PairValues:
    """The values of pairs of one run; each file is read once."""

    def __init__(self, run: AuditRun) -> None:
        self._run = run
        self._arrays: dict[int, dict[str, np.ndarray] | str] = {}
        self._samples: dict[tuple[str, int], Sample | str] = {}

    def sample(self, figure: Figure, record: AuditRecord) -> Sample | str:
        """What gives the figure of a record; a text says why nothing does."""
        key = figure.name, record.step
        if key not in self._samples:
            self._samples[key] = self._sample_of(figure, record)
        return self._samples[key]

    def _sample_of(self, figure: Figure, record: AuditRecord) -> Sample | str:
        if figure.sample is None:
            return NO_MEAN
        arrays = self._arrays_of(record)
        if isinstance(arrays, str):
            return arrays
        try:
            sample = figure.sample(record, arrays)
        except KeyError as error:
            return f"the values of pairs at step {record.step} hold no {error}"
        lost = int((~np.isfinite(sample.columns)).any(axis=1).sum())
        if lost:
            return f"{lost} of the {len(sample.columns)} values of pairs at step {record.step} are not finite"
        value = figure.read(record).value
        if value is None or not math.isclose(sample.value, value, rel_tol=_AGREES, abs_tol=_AGREES):
            return (
                f"the values of pairs at step {record.step} do not give the record's number: it was estimated with a "
                "correction, or they are of another audit"
            )
        return sample

    def groups(self, record: AuditRecord) -> np.ndarray | None:
        """Which pairs share a prompt ``[N]``; None: none do, or it is not known."""
        arrays = self._arrays_of(record)
        return None if isinstance(arrays, str) else arrays.get("per_pair.group")

    def _arrays_of(self, record: AuditRecord) -> dict[str, np.ndarray] | str:
        if record.step not in self._arrays:
            self._arrays[record.step] = _load(self._run, record)
        return self._arrays[record.step]


def _load(run: AuditRun, record: AuditRecord) -> dict[str, np.ndarray] | str:
    """The values of pairs beside a record; in words, why they give no interval."""
    try:
        arrays = run.load_arrays(record.step, "arrays")
    except RecordError as error:
        return first_line(error)
    there = record.provenance
    if any(len(values) != there.pairs for name, values in arrays.items() if name.startswith("per_pair.")):
        return f"the values of pairs at step {record.step} are not of its {there.pairs} pairs"
    if there.groups is None or (there.groups < there.pairs and "per_pair.group" not in arrays):
        return "which pairs share a prompt is not in this log, so that they cannot be drawn together"
    return arrays
