"""What can be said of a continuation from its tokens alone (METHODS §6): how much of it repeats, where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

GRAM = 4
"""Tokens of a run whose return counts as repetition."""


def repeated_share(tokens: Sequence[int], gram: int = GRAM) -> float:
    """Share of the ``gram``-grams of a sequence that stood in it before, in [0, 1); 0 of fewer than ``gram`` tokens.

    One minus the "distinct-n" of Li et al. (arXiv 1510.03055) of a single text.

    Example:
        >>> repeated_share([1, 2, 3, 4, 5, 6]), repeated_share([7] * 8)
        (0.0, 0.8)
    """
    grams = [tuple(tokens[start : start + gram]) for start in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """The tokens up to and with the first that ends a text, and whether there is one.

    Example:
        >>> until_end([5, 6, 2, 9], {2})
        ([5, 6, 2], True)
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1]), True
    return list(tokens), False
