"""What an audit hands on to the next one of its probe set, in memory during a run and from the run log afterwards."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from align_audit.errors import AlignAuditError
from align_audit.record.step_files import arrays_name

if TYPE_CHECKING:
    from align_audit.record.audit_record import Attribution, AuditRecord
    from align_audit.record.log import RunLog

Subspaces = dict[tuple[str, int], np.ndarray]
"""(basis, layer) → [d, k], orthonormal columns."""


@dataclass(frozen=True)
class PreviousAudit:
    """Of the previous audit, or of none.

    Attributes:
        subspaces: what principal angles are measured from.
        attribution: where ``exact_pairs`` "auto" begins.
    """

    subspaces: Subspaces = field(default_factory=dict)
    attribution: Attribution | None = None


def left_by(record: AuditRecord | None, log: RunLog) -> PreviousAudit:
    """What the audit of a stored record left; arrays that are gone or damaged cost the angles, not the audit."""
    if record is None:
        return PreviousAudit()
    subspaces: Subspaces = {}
    with contextlib.suppress(AlignAuditError):
        for name, values in log.load_arrays(record.step, arrays_name(record.provenance.probe_name)).items():
            if name.startswith("subspace."):
                _, basis, layer = name.split(".")
                subspaces[basis, int(layer)] = values
    return PreviousAudit(subspaces, record.attribution)
