"""Is the change still where it was, and what it was? Patching, subspaces and the depth trace: second witnesses, mostly.

Where a number has an interval, these rules go by it alone: of too few pairs they say nothing.
"""

from __future__ import annotations

import math
from statistics import median

from align_audit.alerts.behaviour import SLOW_DOWN
from align_audit.alerts.history import History, Sign, beyond, level_of
from align_audit.options.rules import BY_NAME
from align_audit.record.audit_record import AuditRecord, DepthTrace, LowRankCurve

_LOOK = "Look at the layers' transplants and the depth trace of this record beside those of the audits before"


def additivity_high(history: History) -> Sign | None:
    """The layers' updates add up to far more than the shift."""
    patching = history.record.patching
    if patching is None or beyond(history, patching.additivity.low, "additivity_high") is None:
        return None
    additivity = patching.additivity
    message = (
        f"Additivity is {additivity.mean:.2f}: transplanted one by one, the layers' updates move the margin by far more than "
        "all of them together. They have found one shortcut, each for itself (a length, a token), and saturate it."
    )
    at = history.limit("additivity_high")
    suggestion = (
        "Look for what all chosen completions share and no rejected one has: a length, a format, a token at the end"
    )
    return Sign(BY_NAME["additivity_high"], "warning", additivity.mean, message, suggestion, limit=at)


def additivity_collapsed(history: History) -> Sign | None:
    """The layers' updates no longer act separately."""
    if history.record.patching is None:
        return None
    additivity = history.record.patching.additivity
    baseline = history.baseline(
        lambda record: record.patching.additivity.mean if record.patching else math.nan, "patching"
    )
    at = history.limit("additivity_warning")
    at = at if baseline is None else min(at, 0.6 * baseline)
    if not additivity.high < at:
        return None
    message = (
        f"Additivity is {additivity.mean:.2f}: transplanted one by one, the layers' updates explain only that share of "
        "the margin shift. The rest exists only when all layers move together, away from what each could do in the "
        "reference."
    )
    rule = BY_NAME["additivity_collapsed"]
    return Sign(rule, "warning", additivity.mean, message, SLOW_DOWN, limit=at, baseline=baseline)


def localization_moved(history: History) -> Sign | None:
    """The change moves to other depths, or spreads over the layers, against the run's own first audits."""
    here = history.record.localization
    if here is None:
        return None
    rule = BY_NAME["localization_moved"]
    center = history.baseline(
        lambda record: record.localization.center_of_mass if record.localization else math.nan, "localization"
    )
    if center is not None:
        moved = abs(here.center_of_mass - center)
        if beyond(history, moved, "center_moved"):
            message = (
                f"The layers that carry the preference lie at {here.center_of_mass:.0%} of the depth; at this run's first "
                f"healthy audits at {center:.0%}."
            )
            at = center + math.copysign(history.limit("center_moved"), here.center_of_mass - center)
            return Sign(rule, "warning", here.center_of_mass, message, _LOOK, limit=at, baseline=center)
    spread = history.baseline(
        lambda record: record.localization.entropy if record.localization else math.nan, "localization"
    )
    if spread is None or not beyond(history, here.entropy - spread, "localization_spread"):
        return None
    message = (
        f"The preference spreads over the layers: the entropy of its profile is {here.entropy:.2f} of 1; at this run's first "
        f"healthy audits {spread:.2f}."
    )
    at = spread + history.limit("localization_spread")
    return Sign(rule, "warning", here.entropy, message, _LOOK, limit=at, baseline=spread)


def _curve(record: AuditRecord) -> tuple[int, LowRankCurve] | None:
    """The curve of the shift at the layer whose effect is largest."""
    curves = record.low_rank.get("shift", {})
    effects = {layer: abs(curve.full_effect.mean) for layer, curve in curves.items()}
    finite = {layer: effect for layer, effect in effects.items() if math.isfinite(effect)}
    if not finite:
        return None
    layer = max(finite, key=lambda layer: finite[layer])
    return layer, curves[layer]


def _rank(record: AuditRecord) -> float:
    curve = _curve(record)
    return math.nan if curve is None else curve[1].rank_95


def rank_inflated(history: History) -> Sign | None:
    """The change needs many more directions than at the run's own first audits."""
    peak = _curve(history.record)
    baseline = None if peak is None else history.baseline(_rank, "low_rank")
    if peak is None or not baseline:
        return None
    layer, curve = peak
    if not beyond(history, curve.rank_95 / baseline, "rank_ratio"):
        return None
    return Sign(
        BY_NAME["rank_inflated"],
        "warning",
        curve.rank_95,
        f"At layer {layer} the change needs {curve.rank_95:g} directions for 95 % of its effect; at this run's first healthy "
        f"audits {baseline:g}.",
        _LOOK,
        limit=history.limit("rank_ratio") * baseline,
        baseline=baseline,
        layers=[layer],
    )


def subspace_rotated(history: History) -> Sign | None:
    """The subspace of the change turned since the audit before, in more than half of its directions."""
    peak = _curve(history.record)
    if peak is None or not peak[1].principal_angles:
        return None
    layer, angle = peak[0], median(peak[1].principal_angles)
    if not beyond(history, angle, "rotation"):
        return None
    return Sign(
        BY_NAME["subspace_rotated"],
        "warning",
        angle,
        f"At layer {layer} the subspace of the change turned by {angle:.2f} radians since the audit before (median of its "
        "principal angles; a right angle is 1.57): what is learned now is something else.",
        _LOOK,
        limit=history.limit("rotation"),
        layers=[layer],
    )


def coherence_collapsed(history: History) -> Sign | None:
    """The depth trace of the terminal block has become jagged."""
    spinal = history.record.spinal
    if spinal is None or not math.isfinite(spinal.coherence):
        return None
    usual = history.baseline(lambda record: record.spinal.coherence if record.spinal else math.nan, "spinal")
    baseline = spinal.reference_coherence if usual is None else usual
    if not baseline > 0:
        return None
    if not beyond(history, 1 - spinal.coherence / baseline, "coherence_drop_warning"):
        return None
    share = 1 - history.limit("coherence_drop_warning")
    against = "the reference's" if usual is None else "this run's own first"
    message = (
        f"Coherence of the depth trace is {spinal.coherence:.2f}, less than {share:.0%} of {against} {baseline:.2f}: "
        "in the last layers contraction and transport no longer change smoothly from layer to layer."
    )
    return Sign(
        BY_NAME["coherence_collapsed"],
        "warning",
        spinal.coherence,
        message,
        SLOW_DOWN,
        limit=share * baseline,
        baseline=baseline,
        layers=spinal.terminal_layers,
    )


def _moved(policy: list[float], reference: list[float], layers: list[int]) -> float:
    """Mean absolute difference at these layers, of those where both are finite; NaN where none is."""
    apart = [
        abs(policy[layer] - reference[layer])
        for layer in layers
        if 0 <= layer < min(len(policy), len(reference)) and math.isfinite(policy[layer] - reference[layer])
    ]
    return sum(apart) / len(apart) if apart else math.nan


def terminal_jump(history: History) -> Sign | None:
    """Contraction or transport of the terminal block is far from the reference's."""
    spinal = history.record.spinal
    if spinal is None:
        return None
    layers = spinal.terminal_layers
    policy: DepthTrace = spinal.policy
    measures = (
        ("contraction", policy.contraction, spinal.reference.contraction, "contraction_moved", ""),
        ("transport", policy.transport, spinal.reference.transport, "transport_moved", " radians"),
    )
    for name, here, reference, option, unit in measures:
        apart = _moved(here, reference, layers)
        limit = beyond(history, apart, option)
        if limit is not None:
            message = (
                f"{name.capitalize()} of the last {len(layers)} layers lies {apart:.2f}{unit} from the reference's on "
                "average."
            )
            at = history.limit(option)
            return Sign(
                BY_NAME["terminal_jump"],
                level_of(limit),
                apart,
                message,
                SLOW_DOWN,
                limit=at,
                baseline=0.0,
                layers=layers,
            )
    return None


def gradient_left_terminal(history: History) -> Sign | None:
    """The margin's gradient leaves the last layers, against the run's own first audits."""
    spinal = history.record.spinal
    if spinal is None:
        return None
    share = spinal.gradient_concentration
    baseline = history.baseline(
        lambda record: record.spinal.gradient_concentration.mean if record.spinal else math.nan, "spinal"
    )
    if not baseline or not beyond(history, 1 - share.high / baseline, "concentration_drop"):
        return None
    return Sign(
        BY_NAME["gradient_left_terminal"],
        "warning",
        share.mean,
        f"The last {len(spinal.terminal_layers)} layers have {share.mean:.0%} of the margin's gradient; at this run's first "
        f"healthy audits {baseline:.0%}.",
        _LOOK,
        limit=(1 - history.limit("concentration_drop")) * baseline,
        baseline=baseline,
        layers=spinal.terminal_layers,
    )
