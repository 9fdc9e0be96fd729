"""Sums of figures of runs with their intervals: at audits, and where runs come to the margin that all of them reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align_audit.record.audit_record import AuditRecord
from align_audit.record.equal_margin import Term, at_common_margin, places_of
from align_audit.record.estimate import Estimate
from align_audit.record.figures import NO_MEAN, Figure, Sample, weighted
from align_audit.record.pair_values import PairValues

Intervals = Callable[[Sample, np.ndarray | None], Estimate]
"""Makes the interval of a number from the values of its pairs ``[N, C]`` and the group ``[N]`` of each (None: each is one)."""


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


Terms = Sequence[tuple[int, Between, float]]
"""Of a sum over runs: which run, where it is read, and its weight."""


def held_sum(values: Sequence[PairValues], intervals: Intervals, figure: Figure, terms: Terms) -> Estimate | str:
    """The weighted sum of figures of runs, each at the place where it is read; a text says why there is no interval."""
    samples, weights = [], []
    for number, place, weight in terms:
        shares = [1.0] if len(place.audits) == 1 else [1.0 - place.weight, place.weight]
        for record, share in zip(place.audits, shares, strict=True):
            sample = values[number].sample(figure, record)
            if isinstance(sample, str):
                return sample
            samples.append(sample)
            weights.append(weight * share)
    number, place, _ = terms[0]
    return intervals(weighted(samples, weights), values[number].groups(place.audits[0]))


class AtCommonMargin:
    """Intervals at the largest margin that all runs reach, which is found anew for each draw of pairs.

    Args:
        values: of the pairs of each run.
        margin: the figure that is equal.
        paths: of each run, by step.
        together: whether all runs are of the same pairs, measured by the same methods.
    """

    def __init__(
        self,
        values: Sequence[PairValues],
        margin: Figure,
        paths: Sequence[Sequence[AuditRecord]],
        intervals: Intervals,
        together: bool,
    ) -> None:
        self._values, self._paths, self._intervals = values, paths, intervals
        self._groups = values[0].groups(paths[0][0])
        self._margins = self._columns(margin) if together else "runs on other pairs cannot be drawn with these"

    def _columns(self, margin: Figure) -> list[np.ndarray] | str:
        """Margins of pairs ``[N, K]`` of each run, along its path; a text says why they give no interval."""
        columns = []
        for values, path in zip(self._values, self._paths, strict=True):
            samples = [values.sample(margin, record) for record in path]
            for sample in samples:
                if isinstance(sample, str):
                    return sample
            columns.append(np.column_stack([sample.columns for sample in samples if isinstance(sample, Sample)]))
        counts = sorted({len(each) for each in columns})
        if len(counts) > 1:
            return f"the values of pairs of the runs are of {counts[0]} and of {counts[-1]} pairs"
        return columns

    def sum(self, figure: Figure, terms: Terms) -> Estimate | str:
        """Of figures of runs, each by its weight; a text says why there is no interval."""
        if figure.sample is None:
            return NO_MEAN
        if isinstance(self._margins, str):
            return self._margins
        held = held_sum(self._values, self._intervals, figure, terms)
        if isinstance(held, str):
            return held
        moving = [self._term(figure, *term) for term in terms]
        shares = all(term.samples[0].share_weights is not None for term in moving)
        if shares:
            moving = [replace(term, samples=tuple(map(_constant, term.samples))) for term in moving]
        estimate = self._intervals(at_common_margin(self._margins, moving), self._groups)
        if math.isnan(estimate.low):
            # With the places held there is one: pairs are enough, and it is some draws that find no place.
            places = None if math.isnan(held.low) else self._intervals(places_of(self._margins, moving), self._groups)
            if places is not None and math.isnan(places.low):
                reason = f"{places.reason}, because there a run does not come to that margin between two audits"
                return estimate.model_copy(update={"reason": reason})
            return estimate
        return _wider(held, estimate, [weight for _, _, weight in terms]) if shares else estimate

    def _term(self, figure: Figure, number: int, place: Between, weight: float) -> Term:
        path = self._paths[number]
        audits = [at for at, record in enumerate(path) if figure.group == "health" or record.kind == "full"]
        samples = [self._values[number].sample(figure, path[at]) for at in audits]
        there = next(sample for sample in samples if isinstance(sample, Sample))
        nothing = replace(there, columns=np.full(there.columns.shape, math.nan))
        return Term(
            number,
            np.array(audits),
            tuple(nothing if isinstance(sample, str) else sample for sample in samples),
            weight,
        )


def _constant(sample: Sample) -> Sample:
    """The same number, of pairs that all have it."""
    return replace(sample, columns=np.broadcast_to(sample.columns.mean(axis=0), sample.columns.shape))


def _wider(held: Estimate, moved: Estimate, weights: Sequence[float]) -> Estimate:
    """A sum of shares: as far as it may lie from its value with the places held, and as far as the places may move it.

    Resamples of shares near 0 and 1 do not vary as they should, so that the two are not drawn together; as in
    ``combined_share_interval`` the distances are those of parts that do not go together. Where hits and margins of a run do, it
    is to the safe side: pairs with larger margins agree more often, and bring the run to the margin earlier.
    """
    low = held.mean - math.hypot(held.mean - held.low, moved.mean - moved.low)
    high = held.mean + math.hypot(held.high - held.mean, moved.high - moved.mean)
    least, most = (sum(weight for weight in weights if weight * sign > 0.0) for sign in (-1.0, 1.0))
    return Estimate(mean=held.mean, low=max(low, least), high=min(high, most))
