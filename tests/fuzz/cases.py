"""How many inputs are tried, how they are counted, and what damages a good one.

``make test`` tries a few of each kind, the same ones every time; ``make fuzz`` sets ``$ALIGN_AUDIT_FUZZ`` to how many of each
test are tried, and draws new ones.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ASKED = int(os.environ.get("ALIGN_AUDIT_FUZZ", "0"))
USUAL = 25
COUNTS: Counter[str] = Counter()
"""Inputs tried so far, by test."""


def fuzz(share: float = 1.0, **inputs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that is called with many inputs.

    Args:
        share: of the usual number; less where a single one takes long.
        inputs: argument → strategy.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def counting(*args: Any, **kwargs: Any) -> None:
            COUNTS[f"{test.__module__.rpartition('.')[2]}.{test.__name__}"] += 1
            test(*args, **kwargs)

        return settings(
            max_examples=max(1, round((ASKED or USUAL) * share)), deadline=None, derandomize=not ASKED, database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**inputs)(counting))  # fmt: skip

    return decorated


numbers = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, -(2**70), 10**400, 1e308, 5e-324])
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "NaN", "Infinity", "-Infinity", "inf", "0", "1e999", "é", "\x1b[2J", "\u2028", "a" * 3000, "null"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
"""Whatever JSON can hold, and NaN and infinities."""


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything inside nested lists and dicts."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, part in inside for path in paths_in(part, (*here, key)))]


def changed(value: Any, path: tuple[Any, ...], change: str, new: Any) -> Any:
    """A copy in which what is at a path is replaced or removed, or something is added beside it."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    first = path[0]
    if len(path) > 1:
        copy[first] = changed(copy[first], path[1:], change, new)
    elif change == "replace":
        copy[first] = new
    elif change == "remove":
        del copy[first]
    elif isinstance(copy, dict):
        copy[str(new)[:50]] = new
    else:
        copy.insert(first, new)
    return copy


@st.composite
def damaged(draw: st.DrawFn, wholes: list[Any]) -> Any:
    """One of these nested values with one to three places of it changed."""
    value = draw(st.sampled_from(wholes))
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(value, dict | list):
            break
        path = draw(st.sampled_from(paths_in(value)))
        value = changed(value, path, draw(st.sampled_from(["replace", "replace", "remove", "add"])), draw(values))
    return value


MARKS = (b"\n", b'"', b"{", b"[", b"\\", b",", b"\xff", b"NaN")


@st.composite
def bytes_of(draw: st.DrawFn, wholes: list[bytes]) -> bytes:
    """One of these texts with bytes changed, removed, doubled or cut off."""
    data = draw(st.sampled_from(wholes))
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 20))
        data = draw(
            st.sampled_from(
                [
                    data[:place] + draw(st.binary(max_size=6)) + data[place + length :],
                    data[:place] + data[place + length :],
                    data[: place + length] + data[place:],
                    data[:place],
                    data[:place] + draw(st.sampled_from(MARKS)) + data[place:],
                ]
            )
        )
    return data


def as_json(value: Any) -> bytes:
    """The JSON of nested values, NaN and infinities as Python writes them."""
    return json.dumps(value).encode()


def told(error: Exception, limit: int = 10_000) -> None:
    """What a refusal says can be shown on a terminal, and read."""
    words = str(error)
    assert words
    assert len(words) < limit, f"{len(words)} characters"
    assert all(letter.isprintable() or letter == "\n" for letter in words), repr(words)
