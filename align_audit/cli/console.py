"""Where commands print what is drawn as text: a terminal, or whatever else standard output is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNBROKEN = 500
"""Characters that a line may have where no terminal breaks it."""


def standard_output() -> Console:
    """Standard output, as wide as its terminal is; off a terminal (a file, a pipe, a log of CI) nothing is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNBROKEN)
