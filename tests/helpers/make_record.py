"""Synthetic audit records for tests: the shapes, sizes and gaps of real ones, made in a millisecond with no model.

``make_run("healthy")`` and ``make_run("destabilizing")`` give the audits of a whole run; ``make_record`` a single one.
The parts of a record agree with each other as a real audit's do (gains sum to 1, recovery is effect over shift,
``rank_95`` follows from its curve, ...), so a test may check one against the other. All of it is a function of the
arguments: equal calls give equal records.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from align_audit.record.audit_record import AuditRecord, Cost, ReferenceCheck
from align_audit.record.estimate import Estimate
from align_audit.record.finding import find
from align_audit.record.site_curve import SiteCurve, SiteUnit
from tests.helpers.record_parts import PAIRS, Kind, Maker


def make_run(
    kind: Kind = "healthy", audits: int = 4, layers: int = 12, every: int = 50, seed: int = 0, **parts: Any
) -> list[AuditRecord]:
    """The audits of one run, the first before training (step 0), the last at its end.

    ``healthy``: the margin grows, everything else stays calm. ``destabilizing``: the same until 40 % of the run; then
    the chosen log-probability, next-token accuracy and additivity collapse while margins and accuracy still look well.
    """
    last = max(audits - 1, 1)
    return [
        make_record(step=i * every, layers=layers, kind=kind, progress=i / last, seed=seed, **parts)
        for i in range(audits)
    ]


def make_record(
    step: int = 100,
    *,
    layers: int = 12,
    kind: Kind = "healthy",
    progress: float = 0.5,
    seed: int = 0,
    patching: bool = True,
    localization: bool = True,
    low_rank: bool | Literal["all"] = True,
    spinal: bool = True,
    **overrides: Any,
) -> AuditRecord:
    """One record, ``progress`` (0 to 1) into a run of the given kind; a part set to False was switched off.

    At progress 0 the policy is its reference, as before training: shifts are exactly 0 and shares of them unknown.
    ``low_rank="all"`` has a curve for every layer. ``overrides`` replace fields of the finished record.
    """
    rng = np.random.default_rng([seed, step, layers, int(kind == "healthy")])
    made = Maker(rng, step, layers, kind, progress, seed)
    margins = made.margins()
    patched = made.patching(margins.shift) if patching else None
    low_rank_curves = made.low_rank(patched, every_layer=low_rank == "all") if low_rank and patched else {}
    values: dict[str, Any] = {
        "step": step,
        "provenance": made.provenance(),
        "reference_check": ReferenceCheck(
            source="the trainer's ref_model",
            same_weights=made.identical,
            verdict="passed",
            reason="the reference has not moved since the first audit",
        ),
        "margins": margins,
        "patching": patched,
        "controls": made.controls(margins.shift, patched),
        "localization": made.localization(patched) if localization else None,
        "low_rank": low_rank_curves,
        "spinal": made.spinal() if spinal else None,
        "alerts": made.alerts(margins, patched),
        "cost": Cost(
            seconds=6.0 + 0.8 * layers, peak_memory=(300 + 20 * layers) << 20, forward_equivalents=3.5 * layers
        ),
        "reasons": made.reasons,
    }
    parts = (("patching", patching), ("localization", localization), ("low_rank", low_rank), ("spinal", spinal))
    for name, part in parts:
        if not part:
            made.reasons[name] = "switched off in the configuration"
    record = AuditRecord(**(values | overrides))
    return record if "finding" in overrides else record.model_copy(update={"finding": find(record)})


def make_sites(layers: int = 12, heads: int = 8, peak: int = 5, seed: int = 0) -> list[SiteCurve]:
    """Curves of all finer sites, largest at layer ``peak`` (head 2); the heads' by attribution, with one unknown head.

    For ``make_record(sites=make_sites())``.
    """
    rng = np.random.default_rng([seed, layers, heads])

    def curve(site: Any, units: list[SiteUnit], **more: Any) -> SiteCurve:
        means = rng.normal(0.0, 0.05, len(units))
        best = next(i for i, unit in enumerate(units) if unit.layer == peak and unit.head in (None, 2))
        means[best] = 1.2
        half = 0.1 + 0.05 * rng.random(len(units))
        low = [Estimate(mean=m, low=m - h, high=m + h) for m, h in zip(means, half, strict=True)]
        back = [Estimate(mean=-0.9 * m, low=-0.9 * m - h, high=-0.9 * m + h) for m, h in zip(means, half, strict=True)]
        return SiteCurve(
            site=site, **{"positions": "all", "pairs": PAIRS, "exact_pairs": PAIRS, **more}, units=units,
            sufficiency=low, necessity=back,
            sufficiency_p_adjusted=[0.001 if abs(m) > h else 0.4 for m, h in zip(means, half, strict=True)], peak=best,
        )  # fmt: skip

    alone = [SiteUnit(layer=layer, last_layer=layer) for layer in range(layers)]
    single = [SiteUnit(layer=unit.layer, last_layer=unit.layer, head=head) for unit in alone for head in range(heads)]
    found = curve("head", single, estimator="attribution", exact_pairs=16)
    unknown = [Estimate.unknown("1 of 64 values are not finite"), *found.sufficiency[1:]]
    correlation = [float("nan"), *np.clip(0.9 + 0.1 * rng.random(len(single) - 1), 0, 1).tolist()]
    return [
        curve("attention_output", alone),
        curve("mlp_output", alone, positions="completion"),
        found.model_copy(update={"sufficiency": unknown, "correlation": correlation}),
        curve("block", [SiteUnit(layer=at, last_layer=at + 1) for at in range(layers - 1)], width=2),
    ]
