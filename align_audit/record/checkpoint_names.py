"""What the trainer calls the folders of its checkpoints: ``checkpoint-<step>``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
"""Of so many digits at most: a step is a number of 64 bits."""


def checkpoint_step(name: str) -> int | None:
    """The step that a folder's name says; None: it is no checkpoint's.

    Example:
        >>> checkpoint_step("checkpoint-40"), checkpoint_step("checkpoint-40-old")
        (40, None)
    """
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def checkpoints_in(folder: Path) -> dict[int, str]:
    """Step → name of the checkpoints that exist in a folder now: the trainer deletes old ones (``save_total_limit``).

    Raises:
        OSError: the folder cannot be read.
    """
    return by_step(path.name for path in folder.glob("checkpoint-*") if path.is_dir())


def by_step(names: Iterable[str]) -> dict[int, str]:
    """Step → name, of those that are names of checkpoints."""
    return {step: name for name in names if (step := checkpoint_step(name)) is not None}
