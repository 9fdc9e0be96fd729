"""Names of probe sets: what they may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
        if (earlier := seen.get(name.lower())) is not None:
            raise ConfigurationError(
                f"found two probe sets called {earlier!r} and {name!r}; each needs a name of its own (not every disk tells "
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


__all__ = ["as_name", "check_names"]
