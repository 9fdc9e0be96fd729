"""From per-pair effects at finer sites to the curves of a record, with a reason for every NaN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align_audit.auditing.measurements.sites import SiteFindings
from align_audit.auditing.session.estimates import Assembler, estimate, floats
from align_audit.measures.control_variate import ControlVariate, control_variate_means
from align_audit.measures.statistics import benjamini_hochberg, bootstrap_p_values
from align_audit.record.audit_record import Estimate, SiteCurve, SiteUnit


def site_curves(build: Assembler, measured: Sequence[SiteFindings]) -> list[SiteCurve]:
    """One curve for each configuration; ``build.reasons`` fills with why numbers, or layers, are missing."""
    return [_curve(build, number, found) for number, found in enumerate(measured)]


def site_arrays(measured: Sequence[SiteFindings]) -> dict[str, np.ndarray]:
    """Per-pair effects, float64 [N, U] in nats, as they are stored beside a record."""
    arrays = {}
    for number, found in enumerate(measured):
        for direction, values in found.exact.items():
            arrays[f"per_pair.sites.{number}.{direction}"] = values
        for direction, values in found.attribution.items():
            arrays[f"per_pair.sites.{number}.{direction}_attribution"] = values
    return arrays


def _curve(build: Assembler, number: int, found: SiteFindings) -> SiteCurve:
    config, patched = found.config, found.exact_pairs
    path = f"sites.{number}"
    if found.absent is not None:
        build.reasons[f"{path}.units"] = found.absent
    estimates: dict[str, list[Estimate]] = {}
    correlation: dict[str, list[float] | None] = {}
    for direction, exact in found.exact.items():
        correlation[direction] = None
        if config.estimator == "exact":
            estimates[direction] = build.means(exact[patched])
            continue
        attribution = found.attribution[direction]
        combined = control_variate_means(exact, attribution, build.resamples, build.confidence, build.seed)
        name = "correlation" if direction == "sufficiency" else "necessity_correlation"
        correlation[direction] = floats([one.correlation for one in combined])
        for place, one in enumerate(combined):
            if np.isnan(one.correlation):
                build.reasons[f"{path}.{name}.{place}"] = _why_uncorrelated(one)
        if config.estimator == "attribution":
            estimates[direction] = build.means(attribution)
        else:
            estimates[direction] = [estimate(one.interval) for one in combined]
    tested = (
        found.attribution["sufficiency"] if config.estimator == "attribution" else found.exact["sufficiency"][patched]
    )
    p_values = floats(benjamini_hochberg(bootstrap_p_values(tested, build.resamples, build.seed)))
    if any(np.isnan(p_values)):
        build.reasons[f"{path}.sufficiency_p_adjusted"] = (
            "an effect is not finite, or there are too few pairs for a test"
        )
    peak, why = _peak(np.array([one.mean for one in estimates["sufficiency"]]))
    if why is not None:
        build.reasons[f"{path}.peak"] = why
    return SiteCurve(
        site=config.site,
        positions=config.positions,
        width=config.width,
        estimator=config.estimator,
        pairs=len(patched) if config.estimator == "exact" else build.found.num_pairs,
        exact_pairs=len(patched),
        units=[SiteUnit(layer=unit.layer, last_layer=unit.last, head=unit.head) for unit in found.units],
        sufficiency=estimates["sufficiency"],
        necessity=estimates["necessity"],
        sufficiency_p_adjusted=p_values,
        correlation=correlation["sufficiency"],
        necessity_correlation=correlation["necessity"],
        peak=peak,
    )


def _peak(means: np.ndarray) -> tuple[int | None, str | None]:
    """The unit with the largest mean, or why there is none."""
    if not np.isfinite(means).all():
        return None, "a unit's mean sufficiency is not finite"
    if len(means) > 1 and means.max() == means.min():
        return None, "every unit has the same mean sufficiency"
    return int(means.argmax()), None


def _why_uncorrelated(one: ControlVariate) -> str:
    return one.reason or f"neither effect nor attribution varies over the {one.exact_pairs} patched pairs"
