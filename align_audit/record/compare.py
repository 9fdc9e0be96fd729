"""Two or more runs beside each other: at the last step that all have audited, and where they have moved the pairs equally far.

At equal steps a run with a larger rate is simply further along. What tells a ruined run from a fast one is what it paid for the
same reward margin, so that runs are also read where their margins are equal: between two audits by straight lines.

Differences are to the first run. Their intervals come from the values of common pairs: the same pairs are drawn for both runs,
as everywhere (METHODS §2). Runs on other pairs, or measured by other methods, stand side by side only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from align_audit.errors import RecordError, first_line, listed, plain
from align_audit.record.audit_record import AuditRecord, Estimate
from align_audit.record.course import present_course
from align_audit.record.figures import FIGURES, MARGIN_SHIFT, NO_MEAN, REWARD_MARGIN, Figure, Sample, beta_of, weighted
from align_audit.record.numbers import is_unknown
from align_audit.record.run import AuditRun
from align_audit.record.status import Status

Intervals = Callable[[Sample, np.ndarray | None], Estimate]
"""Makes the interval of a number from the values of its pairs ``[N, C]`` and the group ``[N]`` of each (None: each is one)."""

_AGREES = 1e-6
"""Relative error within which the values of pairs give the record's number."""


@dataclass(frozen=True)
class Side:
    """One run of a comparison, of one probe set, under the name it is called by."""

    name: str
    run: AuditRun

    @cached_property
    def latest(self) -> dict[int, AuditRecord]:
        """By step, the audit that counts: of the course the run is on, a full one where there was one."""
        audits: dict[int, AuditRecord] = {}
        for record in present_course(self.run.records):
            if record.kind == "full" or record.step not in audits or audits[record.step].kind == "health":
                audits[record.step] = record
        return dict(sorted(audits.items()))

    @property
    def newest(self) -> AuditRecord:
        """The audit of the last step."""
        return list(self.latest.values())[-1]


@dataclass(frozen=True)
class Between:
    """Where a run is read: at an audit, or so far on the way from one audit to a later one.

    Attributes:
        audits: one record, or two by step.
        weight: of the second; 0 where there is one.
    """

    audits: tuple[AuditRecord, ...]
    weight: float = 0.0

    def __str__(self) -> str:
        steps = [record.step for record in self.audits]
        return f"step {steps[0]}" if len(steps) == 1 else f"between steps {steps[0]} and {steps[1]}"


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
        differences: of each run but the first, to the first; empty where runs can only stand side by side.
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
    apart = list(_apart(sides))
    table = _Table(sides, margin, apart, intervals)
    return Comparison(
        tuple(sides),
        tuple(side.run.status for side in sides),
        margin,
        _at_step(sides, table),
        _at_margin(sides, table),
        (*apart, *_notes(sides)),
    )


# --- what can be compared ---------------------------------------------------------------------------------------------


def _apart(sides: Sequence[Side]) -> Iterator[str]:
    """Why there are no differences, where runs can only stand side by side."""
    for values, words in (
        ({side.newest.provenance.probe_hash for side in sides}, "they were audited on other probe pairs"),
        ({side.newest.methods_version for side in sides}, "their numbers are of other versions of the methods"),
    ):
        if len(values) > 1:
            yield f"Side by side only, without differences: {words} ({', '.join(map(str, sorted(values)))})."


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
    if len({record.provenance.reference_hash for record in records}) > 1:
        yield "Each was compared with a reference of its own: KL and margins are distances from other points."


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
    return Meeting("step", step, places, full, table.rows(places, full))


def _at_margin(sides: Sequence[Side], table: _Table) -> Meeting:
    """Where every run has the largest margin that all of them reach."""
    paths = [_path(side.latest.values(), table.margin) for side in sides]
    reached = [max((margin for margin, _ in path), default=math.nan) for path in paths]
    target = min(reached) if not any(map(math.isnan, reached)) else math.nan
    if not target > 0:
        reason = "no margin above 0 was reached by every run"
        return Meeting("margin", target, reason=reason)
    places: list[Between] = []
    for side, path in zip(sides, paths, strict=True):
        place = _crossing(path, target)
        if isinstance(place, str):
            return Meeting("margin", target, reason=f"{side.name}: {place}")
        places.append(place)
    full = tuple(
        _crossing(_path((record for record in side.latest.values() if record.kind == "full"), table.margin), target)
        for side in sides
    )
    return Meeting("margin", target, tuple(places), full, table.rows(places, full))


def _path(records: Iterable[AuditRecord], margin: Figure) -> list[tuple[float, AuditRecord]]:
    """The margins of a run, by step, where they are known."""
    path = []
    for record in records:
        value = margin.read(record).value
        if value is not None and not math.isnan(value):
            path.append((float(value), record))
    return path


def _crossing(path: Sequence[tuple[float, AuditRecord]], target: float) -> Between | str:
    """Where a run first comes to a margin; in words, why that is not known."""
    if not path:
        return "no such audit has a margin"
    if path[0][0] > target:
        return f"its first audit, of step {path[0][1].step}, was beyond that margin already"
    for place, (margin, record) in enumerate(path):
        if margin < target:
            continue
        if margin == target or place == 0:
            return Between((record,))
        below, earlier = path[place - 1]
        return Between((earlier, record), (target - below) / (margin - below))
    return "no such audit is at that margin or beyond"


# --- figures ----------------------------------------------------------------------------------------------------------


class _Table:
    """Reads every figure of every run at a place, and the differences.

    Args:
        apart: why there are none.
    """

    def __init__(self, sides: Sequence[Side], margin: Figure, apart: Sequence[str], intervals: Intervals) -> None:
        self.margin = margin
        self._sides, self._apart, self._intervals = sides, apart, intervals
        self._arrays: dict[tuple[int, int], dict[str, np.ndarray] | str] = {}

    def rows(self, health: Sequence[Between], full: Sequence[Between | str]) -> tuple[Row, ...]:
        """Of all figures.

        Args:
            health: where each run is read.
            full: the same of full audits; a text says why there is none.
        """
        return tuple(
            self._row(figure, health if figure.group == "health" else full) for figure in (self.margin, *FIGURES)
        )

    def _row(self, figure: Figure, places: Sequence[Between | str]) -> Row:
        readings = tuple(self._reading(figure, number, place) for number, place in enumerate(places))
        if self._apart:
            return Row(figure, readings)
        return Row(
            figure,
            readings,
            tuple(self._difference(figure, number, places, readings) for number in range(1, len(places))),
        )

    def _reading(self, figure: Figure, number: int, place: Between | str) -> Reading:
        if isinstance(place, str):
            return Reading(math.nan, reason=place)
        read = [figure.read(record) for record in place.audits]
        for each in read:
            if is_unknown(each.value):
                return Reading(math.nan, reason=each.reason or "not in the record")
        values = [float(each.value or 0.0) for each in read]
        if len(values) == 1:
            low, high = (math.nan if end is None else end for end in (read[0].low, read[0].high))
            return Reading(values[0], low, high, read[0].reason)
        if not figure.continuous and values[0] != values[1]:
            steps = [record.step for record in place.audits]
            return Reading(
                math.nan,
                reason=f"{values[0]:g} at step {steps[0]}, {values[1]:g} at step {steps[1]}: nothing lies between",
            )
        value = values[0] + place.weight * (values[1] - values[0])
        sample = self._sample(figure, number, place)
        if isinstance(sample, str):
            return Reading(value, reason=sample)
        estimate = self._intervals(sample, self._groups(number, place))
        return Reading(value, estimate.low, estimate.high, estimate.reason)

    def _difference(
        self, figure: Figure, number: int, places: Sequence[Between | str], readings: Sequence[Reading]
    ) -> Reading:
        """Of one run to the first."""
        first, reading, place, start = readings[0], readings[number], places[number], places[0]
        if figure is self.margin and math.isclose(first.value, reading.value, rel_tol=1e-9):
            return Reading(0.0, 0.0, 0.0)
        for each in (first, reading):
            if math.isnan(each.value):
                return Reading(math.nan, reason=each.reason)
        assert isinstance(place, Between) and isinstance(start, Between)
        depths = {record.provenance.num_layers for record in (*place.audits, *start.audits)}
        if figure.unit == "layer" and len(depths) > 1:
            return Reading(math.nan, reason="layers of models of other depths are not the same layers")
        value = reading.value - first.value
        samples = self._sample(figure, 0, start), self._sample(figure, number, place)
        for sample in samples:
            if isinstance(sample, str):
                return Reading(value, reason=sample)
        groups = self._groups(0, start)
        both = weighted([sample for sample in samples if isinstance(sample, Sample)], [-1.0, 1.0])
        estimate = self._intervals(both, groups)
        return Reading(value, estimate.low, estimate.high, estimate.reason)

    def _sample(self, figure: Figure, number: int, place: Between) -> Sample | str:
        """Values of pairs that give the reading; a text says why there are none."""
        if figure.sample is None:
            return NO_MEAN
        samples = []
        for record in place.audits:
            arrays = self._arrays_of(number, record)
            if isinstance(arrays, str):
                return arrays
            try:
                sample = figure.sample(record, arrays)
            except KeyError as error:
                return f"the values of pairs at step {record.step} hold no {error}"
            value = figure.read(record).value
            if value is None or not math.isclose(sample.value, value, rel_tol=_AGREES, abs_tol=_AGREES):
                return (
                    f"the values of pairs at step {record.step} do not give the record's number: it was estimated with a "
                    "correction, or they are of another audit"
                )
            samples.append(sample)
        weights = [1.0] if len(samples) == 1 else [1.0 - place.weight, place.weight]
        return weighted(samples, weights)

    def _groups(self, number: int, place: Between) -> np.ndarray | None:
        arrays = self._arrays_of(number, place.audits[0])
        return None if isinstance(arrays, str) else arrays.get("per_pair.group")

    def _arrays_of(self, number: int, record: AuditRecord) -> dict[str, np.ndarray] | str:
        key = number, record.step
        if key not in self._arrays:
            self._arrays[key] = _load(self._sides[number].run, record)
        return self._arrays[key]


def _load(run: AuditRun, record: AuditRecord) -> dict[str, np.ndarray] | str:
    """The values of pairs beside a record; in words, why they give no interval."""
    try:
        arrays = run.load_arrays(record.step, "arrays")
    except RecordError as error:
        return first_line(error)
    there = record.provenance
    if any(len(values) != there.pairs for name, values in arrays.items() if name.startswith("per_pair.")):
        return f"the values of pairs at step {record.step} are not of its {there.pairs} pairs"
    if there.groups is None or (there.groups < there.pairs and "per_pair.group" not in arrays):
        return "which pairs share a prompt is not in this log, so that they cannot be drawn together"
    return arrays
