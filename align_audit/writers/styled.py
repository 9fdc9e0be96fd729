"""Styled text on a terminal: which colours words have, and only characters that the output can encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from align_audit.errors import plain

if TYPE_CHECKING:
    from rich.console import ConsoleOptions

Part = tuple[str, str]
"""Text and style."""

RED = "bold red"
"""Of errors and of a broken identity control, and of nothing else."""
LEVEL_STYLES = {"info": "cyan", "warning": "yellow", "error": RED}
STATUS_STYLES = {"HEALTHY": "green", "WATCH": "yellow", "ERROR": RED, "BLIND": "bold magenta"}
VERDICT_STYLES = {"passed": "green", "failed": "dim", "not_run": "dim"}

_PLAIN = str.maketrans(
    {"≤": "<=", "–": "-", "—": "-", "−": "-", "…": "...", "’": "'", "‖": "||", "²": "2", "→": "->", "∞": "inf"}
)


def overflow_of(options: ConsoleOptions) -> Literal["crop", "ellipsis"]:
    """What becomes of a cell that has no room: rich's own mark for it is a character that not every output can encode."""
    return "crop" if options.ascii_only else "ellipsis"


def text_of(parts: Sequence[Part], options: ConsoleOptions) -> Any:
    """A rich text in which brackets are brackets, control characters are escaped, and all can be encoded."""
    from rich.text import Text

    text = Text()
    for string, style in parts:
        words = "\n".join(map(plain, string.split("\n")))
        if options.ascii_only:
            words = words.translate(_PLAIN).encode("ascii", "replace").decode()
        text.append(words, style=style)
    return text
