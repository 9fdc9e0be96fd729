"""Faults that are planted on one rank, at one moment of one audit; and ranks that dawdle."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

from align_audit.auditing import full
from align_audit.auditing.measurements import generations
from align_audit.models import verify
from align_audit.models.replay import Replay
from align_audit.monitoring import monitor
from align_audit.record.log import RunLog

_ERRORS: dict[str, type[Exception]] = {"error": ValueError, "memory": MemoryError, "disk": OSError}
_CALL = 8
"""At which call of a layer, from the first batch on: in the middle of a walk."""


def plant(where: str, kind: str, audit_number: int, call: int | None = None) -> None:
    """Break something once, in this process.

    Args:
        where: ``set-up``, ``layer``, ``head``, ``log``, ``writer`` or ``continuation``; ``stray``: a replay strays once from
            its recording, whatever ``kind``.
        kind: of :data:`_ERRORS`.
        audit_number: in which audit of the run; one before training is the first. A set-up is before all of them.
        call: at which call of the function in question; None: at one that all audits of these tests come to.
    """
    audits = _Counter()
    real = full.first_pass

    def counted(*args: Any, **kwargs: Any) -> Any:
        audits.count += 1
        return real(*args, **kwargs)

    full.first_pass = counted
    places: dict[str, tuple[Any, str, int]] = {
        "set-up": (verify, "_check_head", 1),
        "layer": (Replay, "layer", _CALL),
        "head": (Replay, "head", 2),
        "log": (RunLog, "append", 1),
        "writer": (monitor.Monitor, "tell", 1),
        "continuation": (generations, "continue_greedily", 1),
        "stray": (Replay, "layer", 1),
    }
    owner, name, usual = places[where]
    wanted = 0 if where == "set-up" else audit_number
    plan = functools.partial(_broken, getattr(owner, name), lambda: audits.count == wanted, call or usual)
    setattr(owner, name, plan(None if where == "stray" else _ERRORS[kind]))


def dawdle(seed: int, most: float) -> None:
    """Have this process sleep now and then, wherever an audit computes or writes.

    Args:
        most: seconds of the longest nap.
    """
    drawn = random.Random(seed)

    def slow(real: Callable[..., Any], share: float) -> Callable[..., Any]:
        def later(*args: Any, **kwargs: Any) -> Any:
            if drawn.random() < share:
                time.sleep(most * drawn.random())
            return real(*args, **kwargs)

        return later

    for owner, name, share in (
        (Replay, "layer", 0.02), (Replay, "head", 0.05), (generations, "continue_greedily", 1.0),
        (monitor.Monitor, "tell", 1.0), (RunLog, "append", 1.0), (monitor, "run_audit", 1.0),
    ):  # fmt: skip
        setattr(owner, name, slow(getattr(owner, name), share))


class _Counter:
    count = 0


FIRED = _Counter()
"""How many of the planted faults came to happen in this process."""


def _broken(
    real: Callable[..., Any], now: Callable[[], bool], call: int, error: type[Exception] | None
) -> Callable[..., Any]:
    """The same function, which at its ``call``-th call raises, or gives another tensor where there is no ``error``."""
    calls = _Counter()

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.count += now()
        planted = now() and calls.count == call
        FIRED.count += planted
        if planted and error is not None:
            raise error("planted")
        value = real(*args, **kwargs)
        return value + 1 if planted else value

    return broken
