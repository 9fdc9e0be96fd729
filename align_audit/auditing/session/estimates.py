"""From numbers per pair to estimates with intervals, as the options say they are to be made."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import numpy as np

from align_audit.config import AuditConfig
from align_audit.measures.interval import Interval
from align_audit.measures.patching import Options
from align_audit.measures.statistics import mean_interval, mean_intervals, ratio_intervals, share_interval
from align_audit.record.estimate import Estimate


class Estimates:
    """Makes the estimates of one audit: ``statistics`` and ``seed`` of its options, over pairs of which some share a prompt.

    Args:
        groups: [N], which pairs belong together.

    Attributes:
        resamples, confidence, method, seed: how intervals are made.
    """

    def __init__(self, config: AuditConfig, groups: np.ndarray) -> None:
        self.resamples = config.statistics.bootstrap_resamples
        self.confidence = config.statistics.confidence
        self.method = config.statistics.interval
        self.seed = config.seed
        self.groups = groups

    def over(self, places: np.ndarray) -> Self:
        """The same for values of the pairs at ``places`` alone, in that order."""
        some = copy.copy(self)
        some.groups = self.groups[places]
        return some

    @property
    def independent(self) -> int:
        """How many groups the pairs form."""
        return len(np.unique(self.groups))

    @property
    def options(self) -> Options:
        """For functions that make intervals themselves."""
        return {
            "resamples": self.resamples, "confidence": self.confidence, "method": self.method, "seed": self.seed,
            "groups": self.groups,
        }  # fmt: skip

    def mean(self, values: np.ndarray, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """Mean of per-pair values [N], which lie in [low, high], with its interval."""
        return estimate(mean_interval(values, **self.options).within(low, high))

    def means(self, values: np.ndarray) -> list[Estimate]:
        """Means of the columns of [N, K], all from the same resampled groups."""
        return [estimate(interval) for interval in mean_intervals(values, **self.options)]

    def share(self, hits: np.ndarray) -> Estimate:
        """Share of pairs [N] for which something holds (1 or 0; NaN: not known), with its interval."""
        return estimate(share_interval(hits, self.confidence, self.groups))

    def fractions(self, parts: np.ndarray, full: np.ndarray) -> list[Interval]:
        """Effects of partial patches [N, K] over the full patch's [N]: ratios of sums."""
        return ratio_intervals(parts, full, **self.options, denominator_name="effect of the full patch")


def estimate(interval: Interval) -> Estimate:
    """An interval as a record keeps it."""
    return Estimate(
        mean=float(interval.mean), low=float(interval.low), high=float(interval.high), reason=interval.reason
    )


def no_shift(shift: Estimate) -> str | None:
    """Why what needs a margin shift cannot be run, or None."""
    if math.isnan(shift.mean) or math.isnan(shift.low):
        return f"the mean margin shift is not known: {shift.reason}"
    if shift.low <= 0.0 <= shift.high:
        return f"the interval of the mean margin shift, [{shift.low:.3g}, {shift.high:.3g}] nats, includes 0"
    return None


def beyond(values: Sequence[Estimate], chance: Sequence[Estimate], sign: float) -> list[bool]:
    """Whether each interval lies beyond its counterpart in the direction of ``sign``; False where a bound is unknown."""
    return [
        min(sign * value.low, sign * value.high) > max(sign * random.low, sign * random.high)
        for value, random in zip(values, chance, strict=True)
    ]


def floats(values: object) -> list[float]:
    """A plain list of floats from any one-dimensional array."""
    return [float(value) for value in np.asarray(values).ravel()]
