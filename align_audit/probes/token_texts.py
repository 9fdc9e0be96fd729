"""Tokens as the text they make: pieces that joined are the text, and none that is half a character."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from align_audit.probes.tokens import shared_prefix, text_tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_WAIT = 8
"""Tokens that may wait together for one that makes them text: a character has four bytes at most, and tokens that decode to
nothing, or stray bytes, may stand before it."""
_CONTEXT = 8
"""Tokens before the first one that are decoded with it: whether a word begins with a space depends on them."""


def text_pieces(tokenizer: Any, ids: Sequence[int], start: int = 0, limit: int | None = None) -> list[tuple[str, int]]:
    """``ids[start:]`` as pieces of text, each with the number of tokens it is made of.

    A piece is one token, but for tokens that are no text by themselves: those that make a character together, and those
    that decode to nothing, are one piece with the next. Bytes that no following token makes a character (a text that ends
    within one) are shown as the tokenizer shows them. Special tokens are shown by their name. The tokenizer is not changed.

    Args:
        tokenizer: of transformers, or a processor with one; None: tokens are shown by their ids.
        ids: all tokens of the sequence.
        start: the first token that is shown; those before it are context.
        limit: tokens that the pieces hold together, at most; a piece that would go beyond is left out with what follows.
    """
    end = len(ids) if limit is None else min(len(ids), start + limit)
    if tokenizer is None:
        return [(_id_text(token), 1) for token in ids[start:end]]
    tokenizer = text_tokenizer(tokenizer)
    vocabulary = len(tokenizer)
    pieces: list[tuple[str, int]] = []
    # Tokens from ``context`` to ``done`` are text already; those from there on wait until they are.
    context, done = max(0, start - _CONTEXT), start
    for token in range(start, len(ids)):
        if done >= end:
            break
        if ids[token] >= vocabulary:
            if token > done:
                pieces.append((_addition(tokenizer, ids[context:done], ids[done:token]), token - done))
            pieces.append((_id_text(ids[token]), 1))
            context = done = token + 1
            continue
        text = _addition(tokenizer, ids[context:done], ids[done : token + 1])
        waiting = (not text or text.endswith(_UNFINISHED)) and token + 1 - done < _LONGEST_WAIT
        if not waiting or token + 1 == len(ids):
            pieces.append((text, token + 1 - done))
            context, done = done, token + 1
    return _within(_without_empty(pieces, ids[start:]), end - start)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """All of ``ids`` as one text, as :func:`text_pieces` shows it."""
    if tokenizer is None:
        return "".join(map(_id_text, ids))
    tokenizer = text_tokenizer(tokenizer)
    vocabulary = len(tokenizer)
    runs = [(named, list(run)) for named, run in groupby(ids, lambda token: token < vocabulary)]
    return "".join(_decode(tokenizer, run) if named else "".join(map(_id_text, run)) for named, run in runs)


def _addition(tokenizer: Any, context: Sequence[int], ids: Sequence[int]) -> str:
    """What ``ids`` add to the text of ``context``."""
    text = _decode(tokenizer, [*context, *ids])
    # Where the context ends within a character that the next token completes, the two differ there.
    return text[shared_prefix(_decode(tokenizer, context), text) :]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # What is no valid text (half of a surrogate pair) is written with backslashes.
    return str(text).encode(errors="backslashreplace").decode()


def _without_empty(pieces: list[tuple[str, int]], ids: Sequence[int]) -> list[tuple[str, int]]:
    """A piece without text, as the last tokens may be, is part of the one before it, or shown by its ids."""
    kept: list[tuple[str, int]] = []
    place = 0
    for text, tokens in pieces:
        if text:
            kept.append((text, tokens))
        elif kept:
            kept[-1] = (kept[-1][0], kept[-1][1] + tokens)
        else:
            kept.append(("".join(map(_id_text, ids[place : place + tokens])), tokens))
        place += tokens
    return kept


def _within(pieces: list[tuple[str, int]], tokens: int) -> list[tuple[str, int]]:
    """The first pieces, as long as they hold no more than so many tokens together."""
    kept = []
    for text, count in pieces:
        tokens -= count
        if tokens < 0:
            break
        kept.append((text, count))
    return kept


def _id_text(token: int) -> str:
    return f"⟨id {token}⟩"
