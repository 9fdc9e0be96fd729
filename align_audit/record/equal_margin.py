"""Figures of runs where their margins are equal, as one function of the values of pairs (``compare``).

A run's path is its audits by step; between two of them it is read by straight lines. Where runs meet depends on the pairs: the
margin that all of them reach is of these pairs, and so is the place at which each comes to it. Other pairs give another margin
and other places, and a resample of pairs has to find them anew, or intervals are those of another number: with both held, the
interval of a difference in KL holds it in 8 % of draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from align_audit.record.figures import Sample

Array = np.ndarray


class Crossing(NamedTuple):
    """Where paths first come to a margin.

    Attributes:
        lower, upper: int ``[...]``, places of two audits in the path.
        weight: ``[...]``, of the upper one, in (0, 1]; NaN where a path begins beyond the margin, or never comes to it.
    """

    lower: Array
    upper: Array
    weight: Array

    def read(self, values: Array) -> Array:
        """Values ``[..., K]`` along the path, where it crosses: ``[...]``. An audit that has no weight need not be known."""
        lower, upper = _at(values, self.lower), _at(values, self.upper)
        return np.where(self.weight == 1.0, upper, lower + self.weight * (upper - lower))


def common_margin(paths: Sequence[Array]) -> Array:
    """The largest margin that all paths ``[..., K]`` reach, ``[...]``.

    A draw of pairs may reach nothing above the start, where policies are still their reference; there it is read, then.

    Example:
        >>> common_margin([np.array([0.0, 2.0, 1.0]), np.array([0.0, 5.0])]).item()
        2.0
    """
    reached: Array = np.min([path.max(axis=-1) for path in paths], axis=0)
    return reached


def crossing(margins: Array, target: Array) -> Crossing:
    """Where a path of margins ``[..., K]``, K ≥ 1, first comes to a target ``[...]``.

    Example:
        >>> place = crossing(np.array([0.0, 4.0, 8.0]), np.array(5.0))
        >>> int(place.lower), int(place.upper), float(place.weight)
        (1, 2, 0.25)
    """
    reached = margins >= np.asarray(target)[..., None]
    upper = reached.argmax(axis=-1)
    lower = np.maximum(upper - 1, 0)
    below, above = _at(margins, lower), _at(margins, upper)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (target - below) / (above - below)
    weight = np.where(upper > 0, between, np.where(above == target, 1.0, np.nan))
    return Crossing(lower, upper, np.where(reached.any(axis=-1), weight, np.nan))


@dataclass(frozen=True, eq=False)
class Term:
    """A figure of one run where it comes to the common margin.

    Attributes:
        run: whose path.
        audits: int ``[A]``, those places of the path between which it is read.
        samples: the figure at each of them; of values that are NaN where it is not known.
        weight: that it has in a sum.
    """

    run: int
    audits: Array
    samples: tuple[Sample, ...]
    weight: float = 1.0


def at_common_margin(margins: Sequence[Array], terms: Sequence[Term]) -> Sample:
    """The weighted sum of figures of runs at the largest margin that all reach.

    Args:
        margins: of each run ``[N, K]``: of every pair, at each audit of the path.

    Returns:
        all of it as a function of column means, NaN where a run that has a term does not cross.
    """
    columns = [*margins, *(sample.columns for term in terms for sample in term.samples)]
    ends = np.cumsum([each.shape[1] for each in columns]).tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def statistic(means: Array) -> Array:
        paths = [means[..., span] for span in spans[: len(margins)]]
        target, rest = common_margin(paths), iter(spans[len(margins) :])
        total = np.zeros(target.shape)
        for term in terms:
            values = np.stack([sample.statistic(means[..., next(rest)]) for sample in term.samples], axis=-1)
            total = total + term.weight * crossing(paths[term.run][..., term.audits], target).read(values)
        return total

    return Sample(np.concatenate(columns, axis=1), statistic)


def places_of(margins: Sequence[Array], terms: Sequence[Term]) -> Sample:
    """The sum of the places at which the runs of these terms cross, between 0 and A − 1 each; NaN where one does not."""

    def place(term: Term) -> tuple[Sample, ...]:
        return tuple(Sample(np.full((len(margins[term.run]), 1), float(at)), _first) for at in range(len(term.audits)))

    return at_common_margin(margins, [Term(term.run, term.audits, place(term)) for term in terms])


def _first(means: Array) -> Array:
    return means[..., 0]


def _at(values: Array, places: Array) -> Array:
    return np.take_along_axis(values, np.asarray(places)[..., None], axis=-1)[..., 0]
