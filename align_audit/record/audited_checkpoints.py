"""Where the saved checkpoints lie that were audited into a log, which may be in another folder than they are.

``<output_dir>/align_audit/checkpoints.jsonl`` has a line for each. A run that is audited while it trains has none: its
checkpoints lie beside its log.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align_audit.record.lines import read_lines

CHECKPOINTS = "checkpoints.jsonl"


class AuditedCheckpoint(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True)

    step: int
    folder: str
    """Its absolute path."""


def audited_checkpoints(directory: Path) -> dict[int, str]:
    """Step → name of the checkpoints that were audited into a log and still exist; of two of one step, the one audited last.

    Args:
        directory: of the log.
    """
    lines = read_lines(directory / CHECKPOINTS, AuditedCheckpoint)
    return {line.step: Path(line.folder).name for line in lines if _exists(Path(line.folder))}


def _exists(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # no path that this machine can have
        return False
