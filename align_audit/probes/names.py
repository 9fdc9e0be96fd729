"""Names of probe sets: what they may be, how a command line gives them, and where what belongs to a set is kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align_audit.errors import ConfigurationError

_ALLOWED = re.compile(r"[A-Za-z0-9_.-]+")
_RULE = "letters, digits, '_', '.' and '-', at least one that is no '.', such as 'harmless'"


def check_names(names: Iterable[Any]) -> None:
    """Refuse names that could not name a folder, a file and a curve each.

    Raises:
        ConfigurationError: no name; one that is empty, no string, or holds other characters; two that are equal, or
            would be on a disk that does not tell upper from lower case.

    Example:
        >>> check_names(["harmless", "helpful-v1.1"])
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not _ALLOWED.fullmatch(name) or not name.strip("."):
            raise ConfigurationError(f"found {name!r} as the name of a probe set; a name is of {_RULE}")
        if (other := seen.get(name.lower())) is not None:
            raise ConfigurationError(
                f"found two probe sets called {other!r} and {name!r}; each needs a name of its own (not every disk tells "
                "upper from lower case)"
            )
        seen[name.lower()] = name
    if not seen:
        raise ConfigurationError("found no probe set; expected at least one name with its pairs")


def as_name(text: str) -> str:
    """A name made of what somebody else calls a set: other characters become ``_``.

    Example:
        >>> as_name("my set/1")
        'my_set_1'
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)


def read_arguments(arguments: Sequence[str]) -> dict[str, Path] | Path:
    """What ``--probes`` was given: one path without a name, or paths by name (``name=path``).

    A text that is the path of something that exists is a path, whatever characters it holds; and so is one with a
    separator before its ``=``.

    Raises:
        ConfigurationError: several sets of which one has no name, or bad names.

    Example:
        >>> read_arguments(["harmless=a.jsonl", "helpful=b.jsonl"])["helpful"].name
        'b.jsonl'
    """
    found: list[tuple[str | None, Path]] = []
    for text in arguments:
        name, equals, path = text.partition("=")
        plain = not equals or Path(text).exists() or "/" in name or "\\" in name
        found.append((None, Path(text)) if plain else (name, Path(path)))
    if len(found) == 1 and found[0][0] is None:
        return found[0][1]
    nameless = [str(path) for name, path in found if name is None]
    if nameless:
        raise ConfigurationError(
            f"found {len(found)} probe sets, of which {', '.join(nameless)} has no name; expected name=path for each, such "
            "as --probes harmless=a.jsonl --probes helpful=b.jsonl"
        )
    check_names(name for name, _ in found)
    return {name: path for name, path in found if name is not None}


__all__ = ["as_name", "check_names", "read_arguments"]
