"""The errors a user of align_audit can meet. Each message says what was found, what was expected and what to do."""

from __future__ import annotations

import re
import reprlib
import signal
import traceback
from collections.abc import Iterable


class AlignAuditError(Exception):
    """Base of every error that align_audit raises on purpose."""


class ProbeError(AlignAuditError, ValueError):
    """The probe pairs cannot be used: empty, wrong columns, no usable pair, unreadable file."""


class AnatomyError(AlignAuditError, ValueError):
    """The model's decoder layers could not be established, or they cannot be replayed exactly."""


class ReferenceUnavailableError(AlignAuditError, ValueError):
    """No reference model can be had, or the one given does not fit the policy."""


class ConfigurationError(AlignAuditError, ValueError):
    """Something about the set-up (not about one audit) cannot work; raised before training starts."""


class SiteError(ConfigurationError):
    """A site to patch that the model, or one of its layers, does not have; the message lists what there is."""


class AuditMemoryError(AlignAuditError, MemoryError):
    """An audit ran out of memory although it had gone down to one pair and one stream at a time."""


class RecordError(AlignAuditError, ValueError):
    """A stored record or run log cannot be read: not a record, or written by a newer align_audit."""


# --- outside text in messages -----------------------------------------------------------------------------------------

SHOWN = 200
"""Characters of a foreign value that a message quotes."""

_LISTED = 20

_REPR = reprlib.Repr()
# Nested values may be exponentially larger than what they were read from (YAML aliases): only their beginning is formed.
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 4, SHOWN, SHOWN
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 12


def plain(text: object, limit: int | None = None) -> str:
    """Outside text (a path, a name) for a message: control characters escaped, cut to ``limit`` characters.

    Example:
        >>> plain("a\\x1b[2Jb\\n"), plain("abcdef", 4)
        ('a\\\\x1b[2Jb\\\\n', 'abc…')
    """
    words = _start(str(text), limit)
    if not words.isprintable():
        words = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in words)
    return words if limit is None or len(words) <= limit else words[: limit - 1] + "…"


def quoted(value: object, limit: int = SHOWN) -> str:
    """The ``repr`` of a foreign value for a message, cut to ``limit`` characters; of a large one only its beginning is formed.

    Example:
        >>> quoted({"a": [1, 2]}), len(quoted("x" * 10**6))
        ("{'a': [1, 2]}", 200)
    """
    if isinstance(value, str):
        return plain(repr(_start(value, limit)), limit)
    try:
        return plain(_REPR.repr(value), limit)
    except Exception:  # a foreign repr, or an integer too long to be written
        return type(value).__name__


def listed(names: Iterable[object]) -> str:
    """Foreign names (columns, keys) in a row for a message: each escaped and cut, the first twenty of them.

    Example:
        >>> listed(["prompt", "cho\x07sen"])
        'prompt, cho\\\\x07sen'
    """
    words = [plain(name, 60) for name in names]
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more


def counted(number: int, noun: str) -> str:
    """So many of something, in words.

    Args:
        noun: of one, whose plural ends in s; words may stand before it.

    Example:
        >>> counted(1, "more audit"), counted(0, "pair"), counted(12345, "token")
        ('1 more audit', '0 pairs', '12,345 tokens')
    """
    return f"{number:,} {plural(noun, number)}"


def plural(noun: str, number: int) -> str:
    """The noun as it stands for so many.

    Example:
        >>> plural("layer", 1), plural("layer", 2)
        ('layer', 'layers')
    """
    return noun if number == 1 else f"{noun}s"


def first_line(error: BaseException) -> str:
    """What a library says is wrong: the first line of its words, for a message of one line."""
    words = str(error).strip()
    return plain(words.splitlines()[0], SHOWN) if words else type(error).__name__


def named(error: BaseException) -> str:
    """The kind of an error and what it says; the kind alone where it says nothing.

    Example:
        >>> named(MemoryError()), named(KeyError("a"))
        ('MemoryError', "KeyError: 'a'")
    """
    words = str(error)
    return f"{type(error).__name__}: {words}" if words.strip() else type(error).__name__


_SECRETS = (
    # Up to the last at sign: passwords hold at signs and slashes.
    (re.compile(r"://\S*@"), "://…@"),
    (re.compile(r"(://[^\s?]*\?)[^\s'\")>]+"), r"\1…"),
    (re.compile(r"\b(bearer|basic)\s+[^\s'\",;)]+", re.IGNORECASE), r"\1 …"),
    (
        re.compile(
            r"""((?:api[_-]?key|token|password|passwd|secret)['"]?\s*[=:]\s*['"]?)[^\s'",;&)}]+""", re.IGNORECASE
        ),
        r"\1…",
    ),
)


def without_secrets(words: str, limit: int = 400) -> str:
    """A client's words in a line, without what may be secret in them.

    That is the user and password of an address and what follows its question mark, what follows ``Bearer`` and ``Basic``, and
    the values of what is called a key, a token, a password or a secret.

    Example:
        >>> without_secrets("cannot reach http://me:pa@ss/word@host/api?key=1 with token=abc")
        'cannot reach http://…@host/api?… with token=…'
    """
    for pattern, shown in _SECRETS:
        words = pattern.sub(shown, words)
    return plain(words, limit)


def pass_exit_on(error: BaseException) -> None:
    """Raise an exit that a program's own handler of a signal asks for, as one does that a cluster is about to stop: it is no
    fault of what it interrupts. An exit that a library asks for is one."""
    if not isinstance(error, SystemExit):
        return
    handlers = (signal.getsignal(number) for number in signal.valid_signals())
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    if any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error


def _start(text: str, limit: int | None) -> str:
    return text if limit is None else text[: limit + 1]
