"""What the trainer calls the folders of its checkpoints: ``checkpoint-<step>``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

from align_audit.errors import ConfigurationError, quoted

_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
"""Of so many digits at most: a step is a number of 64 bits."""
LAST_STEP = 10**18 - 1
"""The last step that a name can say."""


def checkpoint_step(name: str) -> int | None:
    """The step that a folder's name says; None: it is no checkpoint's.

    Example:
        >>> checkpoint_step("checkpoint-40"), checkpoint_step("checkpoint-40-old")
        (40, None)
    """
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def as_called(folder: Path) -> Path:
    """A checkpoint by the name that says its step: its own, also of a link to a store, or else that of what it leads to."""
    # Not Path.resolve, which raises where links lead in a circle.
    return folder.absolute() if checkpoint_step(folder.name) is not None else Path(os.path.realpath(folder))


def step_of(folder: Path) -> int:
    """N of ``checkpoint-N``, else 0: as the folder is called, or else what a link or ``.`` leads to."""
    return checkpoint_step(as_called(folder).name) or 0


def step_to_record(step: int | None, folder: Path | None) -> int:
    """The step of an audit: as somebody says, else as the folder that its policy is read from is called, else 0.

    Raises:
        ConfigurationError: what somebody says is no step.
    """
    if step is not None:
        number = step if isinstance(step, Integral) and not isinstance(step, bool) else -1  # NumPy's as well
        if not 0 <= int(number) <= LAST_STEP:
            raise ConfigurationError(f"expected step to be a whole number from 0 to {LAST_STEP}, found {quoted(step)}")
        return int(number)
    return 0 if folder is None else step_of(folder)


def checkpoints_in(folder: Path) -> dict[int, str]:
    """Step → name of the checkpoints that exist in a folder now: the trainer deletes old ones (``save_total_limit``).

    Raises:
        OSError: the folder cannot be read.
    """
    return by_step(path.name for path in folder.glob("checkpoint-*") if path.is_dir())


def by_step(names: Iterable[str]) -> dict[int, str]:
    """Step → name, of those that are names of checkpoints; of two of one step, the shorter, which a trainer writes.

    Example:
        >>> by_step(["checkpoint-0020", "checkpoint-20", "runs"])
        {20: 'checkpoint-20'}
    """
    longest_first = sorted(names, key=len, reverse=True)
    return {step: name for name in longest_first if (step := checkpoint_step(name)) is not None}
