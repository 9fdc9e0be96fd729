"""One audit with its arrays, of models that are opened for it alone: for programs that look at numbers per pair."""

from __future__ import annotations

from typing import Any

from torch import nn

from align_audit.auditing.audit import run_audit
from align_audit.auditing.request import AuditRequest, AuditResult
from align_audit.auditing.session.memory import memory_explained
from align_audit.auditing.session.open_models import OpenModels
from align_audit.config import AuditConfig
from align_audit.models.reference import Reference
from align_audit.probes.pairs import ProbeSet


def audit_once(
    policy: nn.Module, reference: Reference, probes: ProbeSet, config: AuditConfig, **asked: Any
) -> AuditResult:
    """One audit with its arrays, of models that are opened for it alone.

    Args:
        asked: ``autocast`` and ``anatomy`` of :class:`OpenModels`, ``cache`` of :func:`run_audit`, fields of the request.
    """
    opening = {name: asked.pop(name) for name in ("autocast", "anatomy") if name in asked}
    cache = asked.pop("cache", None)
    with memory_explained(), OpenModels(policy, reference, **opening) as models:
        return run_audit(models, AuditRequest(probes, config, **asked), cache)
