"""Which probe sets a run is audited on now: one may be left out when training is resumed, and says nothing from then on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        audits: of one course.
        failures: what broke.

    Example:
        >>> from types import SimpleNamespace as Audit
        >>> audits = [Audit(step=step, probe_name="a") for step in (10, 20, 30)]
        >>> sorted(sets_in_use([Audit(step=5, probe_name="b"), *audits]))
        ['a']
    """
    first = min(sorted({audit.step for audit in audits})[-STEPS_APART:], default=0)
    return {each.probe_name for each in (*audits, *failures) if each.step >= first}
