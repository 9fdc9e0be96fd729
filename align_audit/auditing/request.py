"""What one audit is asked, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from align_audit.auditing.previous import PreviousAudit
from align_audit.config import AuditConfig
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditKind, AuditRecord
from align_audit.record.pair_texts import PairTexts


@dataclass(frozen=True)
class AuditRequest:
    """What to audit on, how, and what the models cannot say of themselves.

    Attributes:
        kind: everything, or health only.
        probe_name: what the run calls the probe set; None where it has only one, without a name.
        at_start: training has not begun, so policy and reference should compute the same.
        beta: of the training, for the record.
        last_sync_step: when the trainer last synchronized its reference; None: never.
        compare_precomputed: the pairs' precomputed reference log-probabilities are sums over all completion tokens, as ours.
        previous: what the previous audit of these pairs left.
    """

    probes: ProbeSet
    config: AuditConfig
    step: int = 0
    kind: AuditKind = "full"
    probe_name: str | None = None
    at_start: bool = False
    beta: float | None = None
    last_sync_step: int | None = None
    compare_precomputed: bool = True
    previous: PreviousAudit = field(default_factory=PreviousAudit)


@dataclass(frozen=True)
class AuditResult:
    """One audit.

    Attributes:
        arrays: what is too large for a record: numbers per pair, and each subspace basis.
        left: what the next audit of these pairs goes on from.
        texts: decodes what changed in text; None where no text is to be kept (``examples.pairs`` 0). It may raise what a
            tokenizer raises.
    """

    record: AuditRecord
    arrays: dict[str, np.ndarray]
    left: PreviousAudit
    texts: Callable[[], PairTexts] | None = None
