"""A mean with its interval, and the units that it is stored in."""

from __future__ import annotations

import math
from typing import Annotated, Self

from align_audit.record.schema import Part
from align_audit.record.units import In

NOT_MEASURED = "not measured by the version that wrote this record"
"""Why a number is not known that came with a later version."""


class Estimate(Part):
    """A mean over probe pairs with its bootstrap confidence interval; NaN with a ``reason`` when it cannot be known."""

    mean: float
    low: float
    high: float
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> Self:
        """NaN throughout, for that reason."""
        return cls(mean=math.nan, low=math.nan, high=math.nan, reason=reason)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]" if spec else repr(self)


Nats = Annotated[Estimate, In("nats")]
NatsPerToken = Annotated[Estimate, In("nats per token")]
Share = Annotated[Estimate, In("share")]
NatsByLayer = Annotated[list[Estimate], In("nats", along="layer")]
ShareByLayer = Annotated[list[Estimate], In("share", along="layer")]
Count = Annotated[int, In("count")]
Bare = Annotated[float, In("")]
