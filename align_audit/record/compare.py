"""Two or more runs beside each other: at the last step that all have audited, and where they have moved the pairs equally far.

At equal steps a run with a larger rate is simply further along. What tells a ruined run from a fast one is what it paid for the
same reward margin, so that runs are also read where their margins are equal: between two audits by straight lines.

Differences are to the first run. Their intervals come from the values of common pairs: the same pairs are drawn for both runs,
as everywhere (METHODS §2), and where margins are equal is found anew in each draw. Records of other pairs, or measured by
other methods, stand side by side only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from align_audit.errors import RecordError, listed, plain
from align_audit.record.audit_record import AuditRecord
from align_audit.record.course import present_course
from align_audit.record.equal_margin import common_margin, crossing
from align_audit.record.estimate import Estimate
from align_audit.record.figures import FIGURES, MARGIN_SHIFT, REWARD_MARGIN, Figure, beta_of
from align_audit.record.numbers import is_unknown, span
from align_audit.record.pair_values import PairValues
from align_audit.record.run import AuditRun
from align_audit.record.run_sums import AtCommonMargin, Between, Intervals, held_sum
from align_audit.record.status import Status

_ROUNDING = 1e-4
"""Relative: by so much at most do numbers of one reference differ that is run on its own, or under adapters that are off."""


@dataclass(frozen=True)
class Side:
    """One run of a comparison, of one probe set, under the name it is called by."""

    name: str
    run: AuditRun

    @cached_property
    def _course(self) -> tuple[AuditRecord, ...]:
        """The audits of the course that the run is on, by step."""
        return tuple(present_course(self.run.records))

    @cached_property
    def latest(self) -> dict[int, AuditRecord]:
        """By step, the audit that counts: on the pairs of the last one, a full one where there was one."""
        audits: dict[int, AuditRecord] = {}
        for record in self._course:
            if record.provenance.probe_hash != self._course[-1].provenance.probe_hash:
                continue
            if record.kind == "full" or record.step not in audits or audits[record.step].kind == "health":
                audits[record.step] = record
        return dict(sorted(audits.items()))

    @property
    def left_out(self) -> list[int]:
        """Steps of the audits on other pairs than the last."""
        return sorted({record.step for record in self._course} - self.latest.keys())

    @property
    def path(self) -> list[AuditRecord]:
        """Those audits, by step, between which the run may be read: by the methods of the last."""
        return [record for record in self.latest.values() if record.methods_version == self.newest.methods_version]

    @property
    def newest(self) -> AuditRecord:
        """The audit of the last step."""
        return list(self.latest.values())[-1]


@dataclass(frozen=True)
class Reading:
    """A figure of one run, or the difference of two; NaN with a reason where it is not known, and so its interval."""

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One figure of all runs.

    Attributes:
        readings: of each run, in their order.
        differences: of each run but the first, to the first; empty where all can only stand side by side, and of the margin
            where that is what is equal.
    """

    figure: Figure
    readings: tuple[Reading, ...]
    differences: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class Meeting:
    """All runs at one place.

    Attributes:
        kind: at a common step, or at equal margin.
        value: the step, or the margin.
        places: where each run is read.
        full: where its full audits are read, which say where the policy was changed; a text says why they cannot be.
        rows: empty where there is no such place.
        reason: why there is none.
    """

    kind: Literal["step", "margin"]
    value: float
    places: tuple[Between, ...] = ()
    full: tuple[Between | str, ...] = ()
    rows: tuple[Row, ...] = ()
    reason: str | None = None

    def row(self, name: str) -> Row | None:
        """The row of a figure."""
        return next((row for row in self.rows if row.figure.name == name), None)


@dataclass(frozen=True)
class Comparison:
    """What comparing says.

    Attributes:
        sides: the runs, in the order they were given.
        statuses: how each stands now.
        margin: the figure that equal margins are of.
        notes: what cannot be compared, or not as it seems, in sentences.
    """

    sides: tuple[Side, ...]
    statuses: tuple[Status, ...]
    margin: Figure
    at_step: Meeting
    at_margin: Meeting
    notes: tuple[str, ...] = field(default=())


def by_probes(runs: Sequence[AuditRun], names: Sequence[str]) -> dict[str | None, list[AuditRun]]:
    """The runs narrowed to each probe set that all have; of one set each, whatever it is called.

    Raises:
        RecordError: a run has no audit, or no set is common to all.
    """
    for name, run in zip(names, runs, strict=True):
        if not run.records:
            raise RecordError(f"{plain(name)} has no audit to compare: {plain(run.status.reason)}")
    sets = [run.probe_names for run in runs]
    if all(len(each) == 1 for each in sets):
        return {sets[0][0]: [run.select(each[0]) for run, each in zip(runs, sets, strict=True)]}
    common = [name for name in sets[0] if all(name in each for each in sets)]
    if not common:
        told = "; ".join(f"{plain(name)}: {listed(map(repr, each))}" for name, each in zip(names, sets, strict=True))
        raise RecordError(f"no probe set is common to the runs ({told}); expected one that all were audited on")
    return {name: [run.select(name) for run in runs] for name in common}


def compare(sides: Sequence[Side], intervals: Intervals) -> Comparison:
    """Compare runs of one probe set each.

    Args:
        sides: at least two, each with at least one audit.
        intervals: makes intervals from values of pairs.

    Raises:
        RecordError: fewer than two runs, or one without an audit.
    """
    if len(sides) < 2:
        raise RecordError(f"expected at least two runs to compare, found {len(sides)}")
    for side in sides:
        if not side.latest:
            raise RecordError(f"{side.name} has no audit to compare: {side.run.status.reason}")
    betas = [beta_of(side.newest) for side in sides]
    margin = MARGIN_SHIFT if None in betas else REWARD_MARGIN
    table = _Table(sides, margin, intervals)
    at_step, at_margin = _at_step(sides, table), _at_margin(sides, table)
    return Comparison(
        tuple(sides),
        tuple(side.run.status for side in sides),
        margin,
        at_step,
        at_margin,
        (*_apart_notes(sides, at_step), *_notes(sides)),
    )


# --- what can be compared ---------------------------------------------------------------------------------------------


def _apart(record: AuditRecord, first: AuditRecord) -> str | None:
    """Why two records have no difference, in words; None: they have."""
    for values, words in (
        ({each.provenance.probe_hash for each in (record, first)}, "they were audited on other probe pairs"),
        ({each.methods_version for each in (record, first)}, "their numbers are of other versions of the methods"),
    ):
        if len(values) > 1:
            return f"{words} ({', '.join(map(str, sorted(values)))})"
    return None


def _apart_notes(sides: Sequence[Side], at_step: Meeting) -> Iterator[str]:
    """Where runs stand side by side only, and why; what is left out of a run."""
    for number, side in enumerate(sides[1:], start=1):
        reasons = {"at equal margin": _apart(side.newest, sides[0].newest)}
        if at_step.places:
            reasons["at the last common step"] = _apart(at_step.places[number].audits[0], at_step.places[0].audits[0])
        who = "" if len(sides) == 2 else f"{side.name} and {sides[0].name} "
        for reason in dict.fromkeys(reason for reason in reasons.values() if reason is not None):
            where = [words for words, each in reasons.items() if each == reason]
            start = f"{who}{'' if len(where) == len(reasons) else where[0] + ' '}side by side only"
            yield f"{start[0].upper() if not who else start[0]}{start[1:]}, without differences: {reason}."
    for side in sides:
        if side.left_out:
            yield f"{side.name}: its audits of steps {span(side.left_out)} were on other probe pairs, and are left out."
        older = [step for step, record in side.latest.items() if record.methods_version != side.newest.methods_version]
        if older:
            yield (
                f"{side.name}: its audits of steps {span(older)} are of another version of the methods than its last, and are "
                "left out at equal margin."
            )


def _notes(sides: Sequence[Side]) -> Iterator[str]:
    """What is not the same of the runs, and what follows."""
    records = [side.newest for side in sides]
    betas = [beta_of(record) for record in records]
    if None in betas:
        yield "β is not known of every run, so that margins are margin shifts in nats, and no reward margins."
    elif len(set(betas)) > 1:
        values = _series(f"{beta:g}" for beta in betas if beta is not None)
        yield f"β is {values}: an equal reward margin is another margin in nats."
    for words, kinds in (
        ("models", [f"{r.provenance.model_type} with {r.provenance.num_layers} layers" for r in records]),
        ("compute dtypes", [record.provenance.compute_dtype for record in records]),
    ):
        if len(set(kinds)) > 1:
            yield f"Other {words}: {_series(kinds)}."
    if not _one_reference(records):
        yield "Each was compared with a reference of its own: KL and margins are distances from other points."


def _one_reference(records: Sequence[AuditRecord]) -> bool:
    """Is it one reference? The same one has another hash under adapters than by itself; on the same pairs it has one margin."""
    if len({record.provenance.reference_hash for record in records}) == 1:
        return True
    if len({record.provenance.probe_hash for record in records}) > 1:
        return False
    read = [(record.margins.reference.mean, record.margins.reference_entropy.mean) for record in records]
    return all(
        math.isclose(value, first, rel_tol=_ROUNDING)
        for each in read[1:]
        for value, first in zip(each, read[0], strict=True)
    )


def _series(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


# --- places -----------------------------------------------------------------------------------------------------------


def _at_step(sides: Sequence[Side], table: _Table) -> Meeting:
    common = set.intersection(*(set(side.latest) for side in sides))
    if not common:
        steps = "; ".join(f"{side.name}: {', '.join(map(str, side.latest))}" for side in sides)
        return Meeting("step", math.nan, reason=f"no step was audited in every run ({steps})")
    step = max(common)
    places = tuple(Between((side.latest[step],)) for side in sides)
    full = tuple(
        place if place.audits[0].kind == "full" else "only health was audited at this step" for place in places
    )
    return Meeting("step", step, places, full, table.at_step(places, full))


def _at_margin(sides: Sequence[Side], table: _Table) -> Meeting:
    """Where every run has the largest margin that all of them reach."""
    paths = [_path(side.path, table.margin) for side in sides]
    target = math.nan
    if all(paths):
        target = float(common_margin([_margins(path, table.margin) for path in paths]))
    if not target > 0.0:
        return Meeting("margin", target, reason="no margin above 0 was reached by every run")
    places: list[Between] = []
    for side, path in zip(sides, paths, strict=True):
        place = _crossing(path, table.margin, target)
        if isinstance(place, str):
            return Meeting("margin", target, reason=f"{side.name}: {place}")
        places.append(place)
    full = tuple(
        _crossing([record for record in path if record.kind == "full"], table.margin, target) for path in paths
    )
    return Meeting("margin", target, tuple(places), full, table.at_margin(places, full, paths))


def _path(records: Iterable[AuditRecord], margin: Figure) -> list[AuditRecord]:
    """Those whose margin is known."""
    return [record for record in records if not is_unknown(margin.read(record).value)]


def _margins(path: Sequence[AuditRecord], margin: Figure) -> np.ndarray:
    return np.array([margin.read(record).value for record in path], dtype=np.float64)


def _crossing(path: Sequence[AuditRecord], margin: Figure, target: float) -> Between | str:
    """Where a run first comes to a margin; in words, why that is not known."""
    if not path:
        return "no such audit has a margin"
    margins = _margins(path, margin)
    place = crossing(margins, np.asarray(target))
    if math.isnan(place.weight):
        if margins[0] > target:
            return f"its first audit, of step {path[0].step}, was beyond that margin already"
        return "no such audit is at that margin or beyond"
    if place.weight == 1.0:
        return Between((path[int(place.upper)],))
    return Between((path[int(place.lower)], path[int(place.upper)]), float(place.weight))


# --- figures ----------------------------------------------------------------------------------------------------------


class _Table:
    """Reads every figure of every run at a place, and the differences."""

    def __init__(self, sides: Sequence[Side], margin: Figure, intervals: Intervals) -> None:
        self.margin = margin
        self._sides, self._intervals = sides, intervals
        self._values = [PairValues(side.run) for side in sides]

    def at_step(self, health: Sequence[Between], full: Sequence[Between | str]) -> tuple[Row, ...]:
        """All figures at audits.

        Args:
            health: where each run is read.
            full: the same of full audits; a text says why there is none.
        """
        return tuple(self._row(figure, health, full) for figure in (self.margin, *FIGURES))

    def at_margin(
        self, health: Sequence[Between], full: Sequence[Between | str], paths: Sequence[Sequence[AuditRecord]]
    ) -> tuple[Row, ...]:
        """All figures at the common margin of these paths; of the margin itself there is no difference."""
        together = all(_apart(path[-1], paths[0][-1]) is None for path in paths)
        equal = AtCommonMargin(self._values, self.margin, paths, self._intervals, together)
        margin, *rest = (self._row(figure, health, full, equal) for figure in (self.margin, *FIGURES))
        return (replace(margin, differences=()), *rest)

    def _row(
        self,
        figure: Figure,
        health: Sequence[Between],
        full: Sequence[Between | str],
        equal: AtCommonMargin | None = None,
    ) -> Row:
        places = health if figure.group == "health" else full
        readings = tuple(self._reading(figure, number, place, equal) for number, place in enumerate(places))
        apart = [_apart(place.audits[0], health[0].audits[0]) for place in health[1:]]
        if all(reason is not None for reason in apart):
            return Row(figure, readings)
        differences = (
            self._difference(figure, number, places, readings, equal)
            if reason is None
            else Reading(math.nan, reason=reason)
            for number, reason in enumerate(apart, start=1)
        )
        return Row(figure, readings, tuple(differences))

    def _reading(self, figure: Figure, number: int, place: Between | str, equal: AtCommonMargin | None) -> Reading:
        if isinstance(place, str):
            return Reading(math.nan, reason=place)
        read = [figure.read(record) for record in place.audits]
        for each in read:
            if is_unknown(each.value):
                return Reading(math.nan, reason=each.reason or "not in the record")
        values = [float(each.value or 0.0) for each in read]
        if equal is None:
            low, high = (math.nan if end is None else end for end in (read[0].low, read[0].high))
            return Reading(values[0], low, high, read[0].reason)
        if not figure.continuous and len(set(values)) > 1:
            steps = [record.step for record in place.audits]
            return Reading(
                math.nan,
                reason=f"{values[0]:g} at step {steps[0]}, {values[1]:g} at step {steps[1]}: nothing lies between",
            )
        value = values[0] + place.weight * (values[-1] - values[0])
        return _reading_of(value, equal.sum(figure, [(number, place, 1.0)]))

    def _difference(
        self,
        figure: Figure,
        number: int,
        places: Sequence[Between | str],
        readings: Sequence[Reading],
        equal: AtCommonMargin | None,
    ) -> Reading:
        """Of one run to the first."""
        first, reading, place, start = readings[0], readings[number], places[number], places[0]
        for each in (first, reading):
            if math.isnan(each.value):
                return Reading(math.nan, reason=each.reason)
        assert isinstance(place, Between) and isinstance(start, Between)
        depths = {record.provenance.num_layers for record in (*place.audits, *start.audits)}
        if figure.unit == "layer" and len(depths) > 1:
            return Reading(math.nan, reason="layers of models of other depths are not the same layers")
        terms = [(0, start, -1.0), (number, place, 1.0)]
        estimate = held_sum(self._values, self._intervals, figure, terms) if equal is None else equal.sum(figure, terms)
        return _reading_of(reading.value - first.value, estimate)


def _reading_of(value: float, estimate: Estimate | str) -> Reading:
    if isinstance(estimate, str):
        return Reading(value, reason=estimate)
    return Reading(value, estimate.low, estimate.high, estimate.reason)
