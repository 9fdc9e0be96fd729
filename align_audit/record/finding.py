"""The verdict in words: where the preference sits, or why no such claim is made. Made only from the record.

A localization is claimed when all of this holds (thresholds below; how often a claim is false is measured by
``benchmarks/evidence/null_audits.py``):

1. the mean margin shift lies above 0 with its whole interval, over at least 24 independent pairs: a preference was learned;
2. some layers stand out by what they contribute (``patching.standing_out``), the block transplant of every one of them with
   its whole interval above 0, the least contribution above all others with the whole interval of their ratio, and the same
   layers in at least ``patching.split_half_agreement`` of the bootstrap resamples;
3. together they carry most of the gain: the interval of their share lies above one half;
4. nothing works against them: neither the embedding, nor the head, nor another layer takes back more than a quarter of the
   shift, on top of what is below it or alone;
5. the controls hold: patching with itself changes nothing, noise of the same length does less at every one of
   these layers, and the reference's stream takes the effect away again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from align_audit.errors import plural
from align_audit.record.audit_record import Finding

if TYPE_CHECKING:
    from align_audit.record.audit_record import AuditRecord, Control, LayerSet, LowRankCurve, Patching
    from align_audit.record.estimate import Estimate

MOST = 0.5
"""Share of the gain that the layers of a claim carry at least, with the whole interval."""
TAKEN_BACK = 0.25
"""Share of the mean margin shift that no part outside a claim takes back more of."""
CLAIMED_FROM = 24
"""Fewest independent pairs that a localization is claimed from."""


_SAME = "policy and reference give the same margins"


def find(record: AuditRecord) -> Finding:
    """What the record says, as one sentence, and the layers of its claim.

    Example:
        >>> find(record).words                                                                # doctest: +SKIP
        'localized in layers 3–4 (92 % of the gain, 95 % CI 85–97 %), rank ≤ 4; controls passed: noise, reverse, identity'
    """
    against = list(_against(record))
    if against:
        return Finding(words="no localization claimed: " + "; ".join(against), localized=False)
    patching = record.patching
    assert patching is not None
    assert patching.standing_out is not None
    layers = patching.standing_out.layers
    where = "" if patching.positions == "all" else f", patched at {patching.positions.replace('_', ' ')} positions"
    words = (
        f"localized in {_layers(layers)} ({_gain(patching.standing_out.gain, record)}{where}), "
        f"{_rank(record, layers)}; {_controls(record)}"
    )
    return Finding(words=words, localized=True, layers=list(layers))


def _against(record: AuditRecord) -> Iterator[str]:
    """Every reason not to claim a localization; where there is nothing to localize, that one only."""
    shift, patching = record.margins.shift, record.patching
    if math.isnan(shift.low) or math.isnan(shift.high):
        if record.reference_check.same_weights:
            yield _SAME
            return
        yield f"the mean margin shift is not known ({shift.reason or record.reasons.get('margins.shift', 'no reason')})"
    elif shift.low == shift.high == 0.0:
        yield _SAME
    elif shift.low <= 0.0 <= shift.high:
        yield f"the interval of the mean margin shift, [{shift.low:.3g}, {shift.high:.3g}] nats, includes 0"
    elif shift.high < 0.0:
        yield f"the policy moved towards the rejected completions (mean margin shift {shift.mean:.3g} nats)"
    elif patching is None:
        yield record.reasons.get("patching", "patching was not measured")
    elif patching.standing_out is None:
        yield record.reasons.get("patching.standing_out", "which layers stand out was not measured")
    elif not patching.standing_out.layers:
        yield patching.standing_out.gain.reason or "no layer stands out"
    else:
        yield from _few(record)
        yield from _weak(record, patching, patching.standing_out)
        yield from _opposed(record, patching, patching.standing_out)
        yield from _uncontrolled(record, patching, patching.standing_out.layers)


def _few(record: AuditRecord) -> Iterator[str]:
    patching = record.patching
    assert patching is not None
    if patching.groups is not None and patching.groups < CLAIMED_FROM:
        yield f"a localization is claimed from {CLAIMED_FROM} independent patched pairs, found {patching.groups}"


def _opposed(record: AuditRecord, patching: Patching, standing: LayerSet) -> Iterator[str]:
    """What takes back more than a quarter of the shift, on top of what is below it (a gain) or alone (a transplant)."""
    shift, single = _shift_of_the_patched(record, patching), len(standing.layers) == 1
    against: dict[str, float] = {}
    parts = [
        ("the embedding", patching.embedding_gain, patching.embedding_transplant),
        ("the head", patching.head_gain, patching.head_transplant),
        *(
            (_layers([layer]), gain, patching.block_transplant[layer])
            for layer, gain in enumerate(patching.layer_gain)
            if layer not in standing.layers
        ),
    ]
    for name, gain, transplant in parts:
        shares = [share for share in (gain.mean, transplant.mean / shift) if not math.isnan(share)]
        if not shares and math.isnan(transplant.mean):
            yield f"whether {name} takes it back is not known ({transplant.reason or gain.reason})"
        if shares and min(shares) < -TAKEN_BACK:
            against[name] = min(shares)
    if against:
        share = "an unknown share" if math.isnan(standing.gain.mean) else f"{standing.gain.mean * 100:.0f} %"
        pushes = f"{_layers(standing.layers)} {'pushes' if single else 'push'} up by {share}"
        backs = [
            f"{name} takes {-share * 100:.0f} % back" for name, share in sorted(against.items(), key=lambda x: x[1])
        ]
        yield f"{pushes} of the shift, {', '.join(backs)}"


def _shift_of_the_patched(record: AuditRecord, patching: Patching) -> float:
    """Mean margin shift of the pairs that were patched, whose effects transplants are; nats. Of all pairs, margins have it."""
    transplants = (patching.embedding_transplant, *patching.block_transplant, patching.head_transplant)
    additivity = patching.additivity.mean
    if patching.attribution is None or not additivity:
        return record.margins.shift.mean
    there = sum(transplant.mean for transplant in transplants) / additivity
    return record.margins.shift.mean if math.isnan(there) else there


def _weak(record: AuditRecord, patching: Patching, standing: LayerSet) -> Iterator[str]:
    who, single = _layers(standing.layers), len(standing.layers) == 1
    wanted = float(record.provenance.config.get("patching", {}).get("split_half_agreement", 0.8))
    if math.isnan(standing.gain.low):
        yield f"what {who} {'carries' if single else 'carry'} of the gain is not known ({standing.gain.reason})"
    elif not standing.gain.low > MOST:
        only = "" if standing.gain.mean > MOST else "only "
        yield (
            f"{who} {'stands' if single else 'stand'} out most and {'carries' if single else 'carry'} "
            f"{only}{_gain(standing.gain, record)}"
        )
    no_effect = [layer for layer in standing.layers if not patching.block_transplant[layer].low > 0.0]
    if no_effect:
        yield f"the interval of the block transplant includes 0 at {_layers(no_effect)}"
    elif not standing.separation.low > 1.0:
        apart, clear = standing.separation, f"{'does' if single else 'do'} not stand clear of the others"
        interval = f"{confidence_in_words(record)} CI {apart.low:.3g} to {apart.high:.3g}"
        yield f"{who} {clear} ({apart.mean:.3g} times as much, {interval})"
    elif not standing.stability >= wanted:
        yield f"which layers stand out depends on the pairs: {standing.stability:.0%} of resamples agree on {who}"


def _uncontrolled(record: AuditRecord, patching: Patching, layers: Sequence[int]) -> Iterator[str]:
    controls = record.controls
    for name, control in (("identity", controls.identity), ("reverse", controls.reverse)):
        if control.verdict != "passed":
            yield f"the {name} control {_said(control)}"
    if controls.noise.verdict == "not_run" or controls.noise.effect is None:
        yield f"the noise control {_said(controls.noise)}"
        return
    noisy = [layer for layer in layers if not patching.effect[layer].low > controls.noise.effect[layer].high]
    if controls.noise.verdict == "failed" and not noisy:
        yield f"the noise control {_said(controls.noise)}"
    elif noisy:
        yield f"noise control failed at {_layers(noisy)}: a random shift of the same length does as much"


def _said(control: Control) -> str:
    return f"failed ({control.reason})" if control.verdict == "failed" else f"was not run ({control.reason})"


def _rank(record: AuditRecord, layers: Sequence[int]) -> str:
    measured_at = [layer for layer in record.low_rank.get("shift", {}) if layer in layers]
    curves: list[LowRankCurve] = [record.low_rank["shift"][layer] for layer in measured_at]
    if not curves:
        return "rank not measured there"
    if record.controls.random_subspace.verdict == "failed":
        return "rank not claimed (random subspaces do as well)"
    highs = [curve.rank_95 if math.isnan(curve.rank_95_high) else curve.rank_95_high for curve in curves]
    high = math.nan if any(map(math.isnan, highs)) else max(highs)  # of what is not known there is no largest
    where = "" if len(curves) == len(layers) else f" at {_layers(measured_at)}, the others not measured"
    if math.isfinite(high):
        return f"rank ≤ {high:.0f}{where}"
    measured = all(math.isfinite(share.mean) for curve in curves for share in curve.effect_fraction)
    return (
        f"rank not shown to be ≤ {max(max(curve.ranks) for curve in curves)}{where}" if measured else "rank not known"
    )


def _controls(record: AuditRecord) -> str:
    by_verdict: dict[str, list[str]] = {"passed": [], "failed": [], "not_run": []}
    for name in type(record.controls).model_fields:
        by_verdict[getattr(record.controls, name).verdict].append(name.replace("_", " "))
    words = "controls passed: " + ", ".join(by_verdict["passed"])
    for verdict in ("failed", "not_run"):
        if by_verdict[verdict]:
            words += f"; {verdict.replace('_', ' ')}: " + ", ".join(by_verdict[verdict])
    return words


def _gain(share: Estimate, record: AuditRecord) -> str:
    interval = f"{confidence_in_words(record)} CI {share.low * 100:.0f}–{share.high * 100:.0f} %"
    return f"{share.mean * 100:.0f} % of the gain, {interval}"


def confidence_in_words(record: AuditRecord) -> str:
    """That of a record's intervals: ``95 %``."""
    options = record.provenance.config.get("statistics", {})
    share = options.get("confidence") if isinstance(options, dict) else None
    return f"{share * 100:g} %" if isinstance(share, int | float) else "95 %"


def _layers(layers: Sequence[int]) -> str:
    """``layer 3``, ``layers 3–5, 8``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"{plural('layer', len(layers))} {', '.join(parts)}"
