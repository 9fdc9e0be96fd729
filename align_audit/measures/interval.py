"""A number with what is known of its error, or why it is not known (METHODS §2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self


class Value(NamedTuple):
    """A number without an interval; NaN with a ``reason`` when it cannot be known."""

    value: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Self:
        """NaN, for that reason."""
        return cls(math.nan, reason)


@dataclass(frozen=True)
class Interval:
    """An estimate over pairs with its confidence interval; what is NaN in it is explained by ``reason``."""

    mean: float
    low: float
    high: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Self:
        """NaN, for that reason."""
        return cls(math.nan, math.nan, math.nan, reason)

    def within(self, low: float, high: float) -> Self:
        """The part of it that lies in the range of what is estimated; an interval made of a few may reach beyond that.

        Example:
            >>> Interval(0.04, -0.05, 0.13).within(0.0, 1.0)
            Interval(mean=0.04, low=0.0, high=0.13, reason=None)
        """
        lower, upper = (end if math.isnan(end) else min(max(end, low), high) for end in (self.low, self.high))
        return replace(self, low=lower, high=upper)
