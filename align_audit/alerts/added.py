"""Rules of the user's own: a number and a limit, or a function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from align_audit.alerts.history import Detector, History, LogDetector, Sign, View
from align_audit.errors import named, plain, quoted
from align_audit.options.rule_settings import AddedRule
from align_audit.options.rules import Rule, Source
from align_audit.options.signals import is_log_signal
from align_audit.record.numbers import by_path

logger = logging.getLogger(__name__)

_NEXT = "Look at this record beside those of the audits before"


def rule_of(name: str, added: AddedRule) -> Rule:
    """A rule of the user's own, as one of the table: it is a cause of its own, and agrees with no other."""
    return Rule(
        name,
        cause=name,
        family=name,
        source=_source(added),
        # Somebody asked for just this: an error of theirs is one as soon as its patience says so.
        weight="certain" if added.level == "error" else "alone",
        reads=() if added.signal is None else (added.signal,),
        says="a rule of the configuration",
        patience=added.patience,
    )


def _source(added: AddedRule) -> Source:
    if added.signal is None:
        return "margins"
    if is_log_signal(added.signal):
        return "log"
    part = added.signal.split(".")[0]
    parts: dict[str, Source] = {
        "generations": "generations", "patching": "patching", "localization": "localization", "spinal": "spinal",
    }  # fmt: skip
    # Controls are run beside patching.
    return "patching" if part == "controls" else parts.get(part, "margins")


def detector_of(name: str, added: AddedRule) -> Detector:
    """What computes it."""
    if added.check is not None:
        return partial(_by_check, name, added, added.check)
    assert added.signal is not None  # the configuration has seen to it
    return partial(_by_limit, name, added, added.signal)


def log_detector_of(name: str, added: AddedRule) -> LogDetector:
    """What computes one that reads the trainer's log."""
    assert added.signal is not None
    return partial(_by_limit, name, added, added.signal)


def _by_limit(name: str, added: AddedRule, signal: str, view: View) -> Sign | None:
    low, value, high = _logged(view, signal) if is_log_signal(signal) else _recorded(view, signal)
    if added.above is not None and low > added.above:
        side, limit = "above", added.above
    elif added.below is not None and high < added.below:
        side, limit = "below", added.below
    else:
        return None
    message = f"{signal} is {value:.4g}, {side} {limit:g} (the rule {plain(name, 60)})."
    return Sign(rule_of(name, added), added.level, value, message, added.suggestion or _NEXT, limit=limit)


def _by_check(name: str, added: AddedRule, check: Callable[[Any], str | None], history: History) -> Sign | None:
    try:
        said = check(history)
    except Exception as error:  # a function of the user's costs no audit and no other alert
        logger.error("the alert rule %s broke and says nothing: %s", plain(name, 60), plain(named(error), 200))
        return None
    if said is None:
        return None
    if not isinstance(said, str) or not said.strip():
        logger.error("the alert rule %s: expected a message or None, found %s", plain(name, 60), quoted(said))
        return None
    return Sign(rule_of(name, added), added.level, math.nan, said, added.suggestion or _NEXT)


def answers(added: AddedRule, history: History) -> bool:
    """Does a user's function say something at a look, if only that there is nothing to say?"""
    assert added.check is not None
    try:
        said = added.check(history)
    except Exception:  # that it broke is said where it is asked for a sign
        return False
    return said is None or (isinstance(said, str) and bool(said.strip()))


def _logged(view: View, signal: str) -> tuple[float, float, float]:
    """What was logged last, as a number without an interval; NaN where it is not known."""
    value = view.log.latest(signal)
    return (math.nan,) * 3 if value is None else (value,) * 3


def _recorded(view: View, signal: str) -> tuple[float, float, float]:
    """A number of the record between the ends of its interval (itself, where it has none); NaN where it is not known."""
    assert isinstance(view, History)
    number = by_path(view.record).get(signal)
    if number is None or number.value is None:
        return (math.nan,) * 3
    value = float(number.value)
    low, high = (value if end is None or math.isnan(end) else end for end in (number.low, number.high))
    return low, value, high
