"""What was measured at one kind of site below the residual stream, as records store it."""

from __future__ import annotations

from typing import Annotated, Literal

from align_audit.record.estimate import Count, Estimate
from align_audit.record.schema import Labelled, Part
from align_audit.record.units import In, Labels


class SiteUnit(Part):
    """What was swapped at once: layers ``layer`` to ``last_layer`` (one, but for windows), or one head of a layer."""

    layer: int
    last_layer: int
    head: int | None = None


class SiteCurve(Labelled):
    """Patching of one kind of finer site (METHODS §1, "Sites"); sequences run along ``units``, effects in nats."""

    site: Literal["attention_output", "mlp_output", "head", "block"]
    positions: str
    width: Count = 1
    """Adjacent layers in a unit of site ``block``."""
    estimator: Literal["exact", "attribution", "control_variate"] = "exact"
    pairs: Count
    """That the estimates speak of."""
    exact_pairs: Count
    """That were patched; beside an attribution the others were not."""
    units: Annotated[list[SiteUnit], Labels("unit")]
    sufficiency: Annotated[list[Estimate], In("nats", along="unit")]
    """The policy's site put into the reference: change of the reference's margin."""
    necessity: Annotated[list[Estimate], In("nats", along="unit")]
    """The reference's site put into the policy: change of the policy's margin."""
    sufficiency_p_adjusted: Annotated[list[float], In("probability", along="unit")]
    """Two-sided p-values of sufficiency ≠ 0, of the same estimates, Benjamini–Hochberg adjusted over units."""
    correlation: Annotated[list[float] | None, In("", along="unit")] = None
    """Between attribution and exact sufficiency of a pair, over the patched pairs; None where all is exact."""
    necessity_correlation: Annotated[list[float] | None, In("", along="unit")] = None
    peak: Annotated[int | None, In("unit")] = None
    """Index of the unit whose mean sufficiency reaches furthest in the direction of the mean margin shift; None, with a reason,
    where there is none, or several."""
