"""Which probe sets a run is audited on now: one may be left out when training is resumed, and says nothing from then on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

STEPS_APART = 3
"""A probe set is in use as long as an audit on it was made at one of the last so many steps of audits, or broke since the first
of them: all sets are audited together, and a run that is killed may have left some out once."""


class OfSet(Protocol):
    """An audit of a probe set, or a failure of one."""

    @property
    def step(self) -> int:
        """At which it was made, or broke."""

    @property
    def probe_name(self) -> str | None:
        """Of the set, where that has a name."""


def sets_in_use(audits: Sequence[OfSet], failures: Iterable[OfSet] = ()) -> set[str | None]:
    """The names of the sets in use after the last of these audits.

    Args:
        audits: of one course, by step.
        failures: what broke.

    Example:
        >>> from types import SimpleNamespace as Audit
        >>> audits = [Audit(step=step, probe_name="a") for step in (10, 20, 30)]
        >>> sorted(sets_in_use([Audit(step=5, probe_name="b"), *audits]))
        ['a']
    """
    recent = list(_recent(audits))
    first = recent[-1].step if recent else 0
    return {each.probe_name for each in (*recent, *failures) if each.step >= first}


def _recent(audits: Sequence[OfSet]) -> Iterator[OfSet]:
    """Those of the last steps, the newest first."""
    steps: set[int] = set()

    def is_recent(audit: OfSet) -> bool:
        steps.add(audit.step)
        return len(steps) <= STEPS_APART

    return takewhile(is_recent, reversed(audits))
