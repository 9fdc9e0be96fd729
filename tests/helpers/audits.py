"""Audits of models in memory, with the arrays that lie beside a record."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from torch import nn

from align_audit.auditing.once import audit_once
from align_audit.auditing.request import AuditResult
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.models.reference import Reference, resolve_reference
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord

QUICK: dict[str, Any] = {
    "max_pairs": 4,
    "patching": {"noise_draws": 1, "reverse": False},
    "statistics": {"bootstrap_resamples": 100},
    "localization": {"enabled": False},
    "low_rank": {"enabled": False},
    "spinal": {"enabled": False},
    "tensorboard": "off",
    "progress": False,
    "budget": None,
    "generations": {"enabled": False},
}
"""The least that is a full audit, made wherever it is asked for, however short the run."""

QUICK_GENERATIONS: dict[str, Any] = {"prompts": 2, "max_new_tokens": 8}
"""The shortest continuations that are measured, where there have to be some: long ones take more than the rest of an audit."""

QUICK_LASSO: dict[str, Any] = {"folds": 2, "selection_resamples": 1, "permutations": 1}
"""Localization by the fewest fits, where there has to be one and no claim rests on its numbers."""

Audited: TypeAlias = tuple[AuditRecord, dict[str, np.ndarray]]
"""A record, and the arrays beside it."""


def audited(policy: nn.Module, reference: Any, probes: ProbeSet, config: AuditConfig, **asked: Any) -> Audited:
    """The record and the arrays; ``reference``: a model, a path, None, or a ``Reference``."""
    result = audited_whole(policy, reference, probes, config, **asked)
    return result.record, result.arrays


def audited_whole(
    policy: nn.Module, reference: Any, probes: ProbeSet, config: AuditConfig, **asked: Any
) -> AuditResult:
    """All that an audit gives; the arguments of :func:`audited`."""
    resolved = reference if isinstance(reference, Reference) else resolve_reference(policy, reference)
    return audit_once(policy, resolved, probes, config, **asked)


def session_of(models: OpenModels, probes: ProbeSet, config: AuditConfig) -> Session:
    """A session over these pairs, as an audit opens it."""
    return Session(models, probes.pairs, config, truncation_mode=probes.truncation_mode)
