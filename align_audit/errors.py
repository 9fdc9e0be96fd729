"""The errors a user of align_audit can meet. Each message says what was found, what was expected and what to do."""

from __future__ import annotations


class AlignAuditError(Exception):
    """Base of every error that align_audit raises on purpose."""


class ProbeError(AlignAuditError, ValueError):
    """The probe pairs cannot be used: empty, wrong columns, no usable pair, unreadable file."""


class AnatomyError(AlignAuditError, ValueError):
    """The model's decoder layers could not be established, or they cannot be replayed exactly."""


class ReferenceUnavailableError(AlignAuditError, ValueError):
    """No reference model can be had, or the one given does not fit the policy."""


class ConfigurationError(AlignAuditError, ValueError):
    """Something about the set-up (not about one audit) cannot work; raised before training starts."""


class SiteError(ConfigurationError):
    """A site to patch that the model, or one of its layers, does not have; the message lists what there is."""


class AuditMemoryError(AlignAuditError, MemoryError):
    """An audit ran out of memory although it had gone down to one pair and one stream at a time."""


class RecordError(AlignAuditError, ValueError):
    """A stored record or run log cannot be read: not a record, or written by a newer align_audit."""
