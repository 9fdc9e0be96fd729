"""Watch what preference training does inside a language model.

The public surface is the names in ``__all__``; everything else is private. Importing this package is cheap:
torch, transformers and trl load when something that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from align_audit.auditing.audit import audit
    from align_audit.auditing.transfer import transfer
    from align_audit.config import AuditConfig
    from align_audit.models.anatomy import Anatomy
    from align_audit.monitoring.callback import AlignmentAuditCallback
    from align_audit.probes.pairs import ProbeSet
    from align_audit.record.alert import Alert
    from align_audit.record.audit_record import AuditRecord
    from align_audit.record.transfer_record import TransferRecord
    from align_audit.writers.notebook import AuditRun

_WHERE = {
    "Alert": "align_audit.record.alert",
    "AlignmentAuditCallback": "align_audit.monitoring.callback",
    "Anatomy": "align_audit.models.anatomy",
    "AuditConfig": "align_audit.config",
    "AuditRecord": "align_audit.record.audit_record",
    "AuditRun": "align_audit.writers.notebook",
    "ProbeSet": "align_audit.probes.pairs",
    "TransferRecord": "align_audit.record.transfer_record",
    "audit": "align_audit.auditing.audit",
    "transfer": "align_audit.auditing.transfer",
}

__all__ = [
    "Alert",
    "AlignmentAuditCallback",
    "Anatomy",
    "AuditConfig",
    "AuditRecord",
    "AuditRun",
    "ProbeSet",
    "TransferRecord",
    "audit",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'align_audit' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
