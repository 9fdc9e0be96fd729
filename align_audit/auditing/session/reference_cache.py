"""What depends on the reference alone, kept for a run: computed once, found again by the next audit and after a resume."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from pydantic import BaseModel, ValidationError

from align_audit.files import write_atomically
from align_audit.record.audit_record import METHODS_VERSION, DepthTrace

logger = logging.getLogger(__name__)


class ReferenceTrace(BaseModel):
    """The reference's depth trace, and why a number in it is NaN (path within the trace → reason)."""

    key: list[str]
    methods_version: int
    trace: DepthTrace
    reasons: dict[str, str]


class ReferenceCache:
    """Depth traces of references by what they depend on: weights, probes, settings, dtype. In memory, and on disk.

    A reference that moves (``sync_ref_model``) has another weight hash, so its old trace is never found again.

    Args:
        directory: where traces are also kept as files; None: in memory only.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory is not None else None
        self._known: dict[tuple[str, ...], ReferenceTrace] = {}

    def get(self, key: tuple[str, ...]) -> ReferenceTrace | None:
        """What was put under ``key``, in this process or an earlier one; None when there is nothing, or nothing sound."""
        if key not in self._known and self.directory is not None:
            path = self._path(self.directory, key)
            try:
                found = ReferenceTrace.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                return None
            except (OSError, ValidationError) as error:
                logger.warning("%s cannot be used (%s); the reference is measured again", path, error)
                return None
            if found.key == list(key) and found.methods_version == METHODS_VERSION:
                self._known[key] = found
        return self._known.get(key)

    def put(self, key: tuple[str, ...], trace: DepthTrace, reasons: dict[str, str]) -> ReferenceTrace:
        """Keep a trace. A disk that refuses it costs the next process some time, and nothing else."""
        kept = ReferenceTrace(key=list(key), methods_version=METHODS_VERSION, trace=trace, reasons=reasons)
        self._known[key] = kept
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path(self.directory, key), kept.model_dump_json().encode())
            except OSError as error:
                logger.warning("align_audit could not keep the reference's trace in %s: %s", self.directory, error)
        return kept

    @staticmethod
    def _path(directory: Path, key: tuple[str, ...]) -> Path:
        digest = hashlib.blake2b(json.dumps([METHODS_VERSION, *key]).encode(), digest_size=8).hexdigest()
        return directory / f"reference-{digest}.json"
