"""What audited checkpoints have to keep: ``--gate 'kl<=0.5'`` and ``--fail-on error``.

A gate is about numbers that the user chose, ``--fail-on`` about what the alert rules say. Each checkpoint has to keep them all.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from align_audit.errors import ConfigurationError, counted, plain, quoted
from align_audit.options.rules import did_you_mean
from align_audit.record.audit_record import AuditRecord, RecordKey
from align_audit.record.course import present_course
from align_audit.record.measure_names import check_measure, measure
from align_audit.record.run import AuditRun
from align_audit.record.stored_records import Head, chosen
from align_audit.writers.standing import Standing, standing_at, standings_over

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([^\s<>=!]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")
_SERIOUS = {"error": ("ERROR", "BLIND"), "warning": ("ERROR", "BLIND", "WATCH")}


@dataclass(frozen=True)
class Gate:
    """A comparison of a number of a record, by its name, with a limit."""

    name: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME>=NUMBER``; also ``<=``, ``>``, ``<``, ``==``, ``!=``.

        Raises:
            ConfigurationError: it has another form, or no record has such a number.

        Example:
            >>> Gate.parse("margins.kl < 0.5")
            Gate(name='margins.kl', sign='<', limit=0.5)
        """
        match = _FORM.fullmatch(text)
        try:
            limit = math.nan if match is None else float(match[3])
        except ValueError:
            limit = math.nan
        if match is None or math.isnan(limit):
            raise ConfigurationError(
                f"--gate: found {quoted(text)}; expected NAME>=NUMBER (or <=, >, <, ==, !=), such as 'kl<=0.5'"
            )
        check_measure(match[1])
        return cls(match[1], match[2], limit)

    def __str__(self) -> str:
        limit = f"{self.limit:g}"
        return f"{self.name}{self.sign}{limit if float(limit) == self.limit else repr(self.limit)}"

    def broken_by(self, record: AuditRecord) -> str | None:
        """Why a record breaks it, in words; None: it keeps it."""
        value, reason = measure(record, self.name)
        if value is None or math.isnan(value):
            return f"{self.name} is not known ({plain(reason or 'the record gives no reason')})"
        if _COMPARISONS[self.sign](value, self.limit):
            return None
        # In as many digits as show that it is broken.
        shown = (f"{value:.{digits}g}" for digits in (4, 6, 9, 17))
        return f"{self.name} is " + next(text for text in shown if not _COMPARISONS[self.sign](float(text), self.limit))


@dataclass(frozen=True)
class Demands:
    """All that checkpoints have to keep."""

    gates: tuple[Gate, ...] = ()
    fail_on: str | None = None

    @classmethod
    def parse(cls, gates: Sequence[str], fail_on: str | None) -> Self:
        """What the options say.

        Raises:
            ConfigurationError: a gate that cannot be read, or a level that there is not.
        """
        if fail_on is not None and fail_on not in _SERIOUS:
            near = did_you_mean(fail_on, list(_SERIOUS))
            raise ConfigurationError(f"--fail-on: expected error or warning; found {quoted(fail_on)}{near}")
        return cls(tuple(map(Gate.parse, gates)), fail_on)

    def broken(
        self,
        records: Sequence[AuditRecord],
        output: Path,
        names: Mapping[int, str],
        not_audited: Sequence[str] = (),
    ) -> list[str]:
        """A line for each demand that a checkpoint breaks: the first that does, why, and how many more do.

        Args:
            records: of the checkpoints.
            output: of their log.
            names: step → checkpoint.
            not_audited: checkpoints of which nothing is known, and which therefore keep no demand.
        """
        broken = list(self._broken(records, output, names))
        if not_audited:
            demands = ", ".join([*(f"--gate {gate}" for gate in self.gates), *self._fail_on])
            more = _more(len(not_audited) - 1)
            broken.append(f"{plain(not_audited[0])} broke {demands}: it could not be audited{more}")
        return broken

    @property
    def _fail_on(self) -> list[str]:
        return [] if self.fail_on is None else [f"--fail-on {self.fail_on}"]

    def _broken(self, records: Sequence[AuditRecord], output: Path, names: Mapping[int, str]) -> Iterator[str]:
        for gate in self.gates:
            said = ((record, gate.broken_by(record)) for record in records)
            yield from _told(said, names, f"--gate {gate}")
        if self.fail_on is not None:
            words = _SERIOUS[self.fail_on]
            said = (
                (standing.record, _badly(standing) if standing.status.word in words else None)
                for standing in _standings(records, AuditRun.load(output))
            )
            yield from _told(said, names, *self._fail_on)


def _standings(records: Sequence[AuditRecord], run: AuditRun) -> Iterator[Standing]:
    """How a run stood at audits of it, whose courses are gone through once."""
    at_audit: dict[RecordKey, Standing] = {}
    for name in {record.provenance.probe_name for record in records}:
        of_set = chosen(run.records, partial(_is_of, name))
        at_audit |= {each.record.key: each for each in standings_over(present_course(of_set), run.training_log)}
    for record in records:
        # One that is on no present course: checkpoints may be audited in any order.
        yield at_audit.get(record.key) or standing_at(record, run.records, run.training_log)


def _is_of(name: str | None, head: Head) -> bool:
    return head.probe_name == name


def _badly(standing: Standing) -> str:
    return f"{standing.status.word}, {plain(standing.headline())}"


def _told(said: Iterable[tuple[AuditRecord, str | None]], names: Mapping[int, str], demand: str) -> Iterator[str]:
    broken = [(record, why) for record, why in said if why is not None]
    if not broken:
        return
    record, why = broken[0]
    there = record.provenance.probe_name
    on = "" if there is None else f" on {there!r}"
    checkpoint = plain(names.get(record.step, f"step {record.step}"))
    steps = len({each.step for each, _ in broken} - {record.step})
    yield f"{checkpoint}{on} broke {demand}: {why}{_more(steps)}"


def _more(checkpoints: int) -> str:
    return f" (and {counted(checkpoints, 'more checkpoint')})" if checkpoints else ""
