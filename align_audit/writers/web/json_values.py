"""Numbers and foreign text as a page takes them: four digits, null for what is not known, and no control characters."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from align_audit.errors import plain
from align_audit.record.estimate import Estimate

_JOINERS = "\u200c\u200d"
"""Zero-width non-joiner and joiner: Persian and Indic words and many emoji are written with them."""
LONGEST = 2000
"""Characters of a text of the records that a page shows; a message of an alert has a few hundred."""


def number(value: float | None, digits: int = 4) -> float | None:
    """A number with so many significant digits; None: not known, or not finite, which JSON has no number for.

    Example:
        >>> number(0.123456), number(float("nan")), number(float("inf")), number(20.0)
        (0.1235, None, None, 20.0)
    """
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def row(values: Iterable[float | None]) -> list[float | None]:
    """Numbers, one after the other: see :func:`number`."""
    return [number(value) for value in values]


def estimate(value: Estimate) -> dict[str, Any]:
    """A mean with its interval, and the reason where one of them is not known."""
    said: dict[str, Any] = {"mean": number(value.mean), "low": number(value.low), "high": number(value.high)}
    if value.reason:
        said["reason"] = text(value.reason)
    return said


def columns(values: Sequence[Estimate]) -> dict[str, list[float | None]]:
    """Estimates as three sequences: their means, and the ends of their intervals."""
    return {
        "mean": row(value.mean for value in values),
        "low": row(value.low for value in values),
        "high": row(value.high for value in values),
    }


def text(words: object, limit: int = LONGEST) -> str:
    """Text of a record in one line; it is data, and whoever shows it sets it as text.

    Letters of every script are as they are, with the joiners and spaces between them. What controls a terminal, ends a line,
    or turns the direction of what stands beside it is spelled.

    Example:
        >>> text("a\\u202eb"), text("abcdef", 4)
        ('a\\\\u202eb', 'abc…')
    """
    if limit >= len(shown := "".join(map(_shown, str(words)[: limit + 1]))):
        return shown
    return shown[: limit - 1] + "…"


def lines(words: str, limit: int = LONGEST) -> str:
    """The same of a text whose lines and tabs are kept.

    Example:
        >>> lines("Hi\\n\\x1b[2J")
        'Hi\\n\\\\x1b[2J'
    """
    return "".join(letter if letter in "\n\t" else _shown(letter) for letter in words[: limit + 1])[: limit + 1]


def in_words(value: float | None) -> str | None:
    """What is no number in JSON, and no gap either: ``∞`` or ``−∞``; None: it is a number, or not known.

    Example:
        >>> in_words(float("-inf")), in_words(0.5), in_words(float("nan"))
        ('−∞', None, None)
    """
    if value is None or not math.isinf(value):
        return None
    return "∞" if value > 0 else "−∞"


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs":
        return letter
    return plain(letter)
