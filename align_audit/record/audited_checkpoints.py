"""Where the saved checkpoints lie that were audited into a log, which may be in another folder than they are.

``<output_dir>/align_audit/checkpoints.jsonl`` has a line for each. A run that is audited while it trains has none: its
checkpoints lie beside its log.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align_audit.errors import first_line, plain
from align_audit.files import append_whole
from align_audit.record.lines import read_lines

CHECKPOINTS = "checkpoints.jsonl"


class AuditedCheckpoint(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True)

    step: int
    folder: str
    """Its absolute path."""


def note_checkpoint(directory: Path, step: int, folder: Path) -> None:
    """A saved checkpoint is audited into the log in ``directory``. What cannot be noted is said, and costs no audit."""
    line, path = AuditedCheckpoint(step=step, folder=os.path.abspath(folder)), directory / CHECKPOINTS
    noted = {each.step: each for each in read_lines(path, AuditedCheckpoint)}
    if noted.get(step) == line:
        return
    try:
        append_whole(path, (line.model_dump_json() + "\n").encode(errors="backslashreplace"))
    except OSError as error:
        warnings.warn(f"where a checkpoint lies could not be noted in {plain(path)}: {first_line(error)}", stacklevel=2)


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
