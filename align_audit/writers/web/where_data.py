"""Where the preference sits, and with what evidence: layers over steps, finer sites, and the controls of each full audit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align_audit.errors import counted
from align_audit.record.audit_record import GUARDED, AuditRecord, control_items
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import why_unknown
from align_audit.record.site_curve import SiteCurve
from align_audit.record.site_names import site_name
from align_audit.writers.web.json_values import columns, estimate, number, row, text

LEAST_DELTA = 0.05
"""A Δalign below it is called no signature: a choice of ours, which SPINAL leaves open."""
JAGGED = 0.5
"""A path of less than this share of the reference's coherence is called none either, whatever its ends do; ours too."""
MOST_UNITS = 1500
"""Units of a curve of finer sites that a page takes; of more (heads of a large model), those of most effect."""


def where_data(audits: Sequence[AuditRecord]) -> dict[str, Any] | None:
    """Layers over steps.

    Args:
        audits: full ones in which something was patched, one a step, by step.

    Returns:
        ``steps``, ``layers`` (their number); by audit ``sentences``, ``claims`` (layers of the claim), ``peaks``,
        ``transplant`` and ``gain`` (``mean``, ``low``, ``high`` by layer; nats, and shares of the shift), ``ends`` (what
        embedding and head add), ``additivity``, and ``unknown``, why there are no gains; ``sites``, the finer
        ones of the last audit that has some. None: nothing was patched.
    """
    patched = [record for record in audits if record.patching is not None]
    if not patched:
        return None
    with_sites = [record for record in patched if record.sites]
    return {
        "steps": [record.step for record in patched],
        "layers": max(record.provenance.num_layers for record in patched),
        "sentences": [_sentence(record) for record in patched],
        "claims": [record.finding.layers if record.finding is not None else [] for record in patched],
        "peaks": [record.patching.peak_layer for record in patched if record.patching is not None],
        "transplant": [columns(record.patching.block_transplant) for record in patched if record.patching is not None],
        "gain": [columns(record.patching.layer_gain) for record in patched if record.patching is not None],
        "ends": [_ends(record) for record in patched],
        "additivity": [estimate(record.patching.additivity) for record in patched if record.patching is not None],
        "unknown": [_unknown(record) for record in patched],
        "sites": [_site(curve) for curve in with_sites[-1].sites] if with_sites else [],
        "sites_step": with_sites[-1].step if with_sites else None,
    }


def _sentence(record: AuditRecord) -> str:
    words = (
        record.finding.words if record.finding is not None else "where was not judged by the version that wrote this"
    )
    return text(words[:1].upper() + words[1:])


def _ends(record: AuditRecord) -> dict[str, Any]:
    """What lies below the first layer and above the last, as shares of the shift and alone."""
    patching = record.patching
    assert patching is not None
    return {
        "embedding_gain": estimate(patching.embedding_gain),
        "head_gain": estimate(patching.head_gain),
        "embedding_transplant": estimate(patching.embedding_transplant),
        "head_transplant": estimate(patching.head_transplant),
    }


def _unknown(record: AuditRecord) -> str:
    """Why layers have no gain, where none has."""
    patching = record.patching
    assert patching is not None
    if patching.layer_gain and all(math.isnan(gain.mean) for gain in patching.layer_gain):
        return text(why_unknown(record, "patching.layer_gain.0", patching.layer_gain[0]))
    return ""


def _site(curve: SiteCurve) -> dict[str, Any]:
    places = range(len(curve.units))
    if len(curve.units) > MOST_UNITS:
        strongest = sorted(places, key=lambda place: -_size(curve.sufficiency[place]))[:MOST_UNITS]
        kept = sorted(strongest)
    else:
        kept = list(places)
    name = site_name(curve)
    return {
        "name": name[:1].upper() + name[1:],
        "site": curve.site,
        "width": curve.width,
        "layers": [curve.units[place].layer for place in kept],
        "heads": [curve.units[place].head for place in kept] if curve.site == "head" else None,
        "sufficiency": columns([curve.sufficiency[place] for place in kept]),
        "left_out": len(curve.units) - len(kept),
        "estimator": curve.estimator,
        "pairs": curve.pairs,
    }


def _size(value: Estimate) -> float:
    return abs(value.mean) if math.isfinite(value.mean) else -1.0


# --- evidence ---------------------------------------------------------------------------------------------------------


def evidence_data(audits: Sequence[AuditRecord]) -> list[dict[str, Any]]:
    """The controls of each full audit, by step.

    Returns:
        By audit its ``step`` and ``chips``: ``name``, ``verdict`` (passed, failed, not run), ``reason``, ``guards`` (what is no
        evidence where it fails), and ``broken``: whether this is the identity control, and failed.
    """
    return [
        {
            "step": record.step,
            "chips": [
                {
                    "name": name.replace("_", " "),
                    "verdict": control.verdict.replace("_", " "),
                    "reason": text(control.reason),
                    "guards": GUARDED[name],
                    "value": number(control.value),
                    "broken": name == "identity" and control.verdict == "failed",
                }
                for name, control in control_items(record)
            ],
        }
        for record in audits
    ]


# --- folded -----------------------------------------------------------------------------------------------------------


def low_rank_data(record: AuditRecord | None) -> dict[str, Any] | None:
    """How few directions carry the change: the curves of the last audit that has some; None: there is none.

    Returns:
        ``title``, the finding; ``step``; ``curves`` of ``basis``, ``layer``, ``ranks``, ``fraction`` and ``explained``.
    """
    if record is None or not record.low_rank:
        return None
    curves = [
        {
            "basis": basis,
            "layer": layer,
            "ranks": curve.ranks,
            "fraction": columns(curve.effect_fraction),
            "explained": row(curve.explained_variance_ratio),
            "rank_95": number(curve.rank_95),
        }
        for basis, by_layer in record.low_rank.items()
        for layer, curve in by_layer.items()
    ]
    return {"title": _low_rank_title(record), "step": record.step, "curves": curves}


def _low_rank_title(record: AuditRecord) -> str:
    by_layer = record.low_rank.get("shift", {})
    if not by_layer:
        return "Low rank: measured in the activation basis alone"
    if record.controls.random_subspace.verdict == "failed":
        return "No low-rank subspace claimed: random subspaces do as well"
    enough = {layer: curve.rank_95 for layer, curve in by_layer.items() if math.isfinite(curve.rank_95)}
    most = max(max(curve.ranks) for curve in by_layer.values() if curve.ranks)
    if not enough:
        return f"No low-rank subspace: {most} directions do not carry 95 % of the effect"
    said = ", ".join(f"{rank:.0f} at layer {layer}" for layer, rank in list(enough.items())[:4])
    more = f" and {counted(len(enough) - 4, 'more layer')}" if len(enough) > 4 else ""
    return f"Directions that carry 95 % of the effect: {said}{more}"


def spinal_data(audits: Sequence[AuditRecord]) -> dict[str, Any] | None:
    """SPINAL of each full audit, and the depth traces of the last; None: it was not measured.

    Returns:
        ``title``, the finding; ``steps`` with ``delta_align``, ``coherence`` and ``reference_coherence``; ``policy`` and
        ``reference`` (``contraction`` and ``transport`` by layer), ``terminal_layers``.
    """
    measured = [(record, record.spinal) for record in audits if record.spinal is not None]
    if not measured:
        return None
    record, last = measured[-1]
    return {
        "title": _spinal_title(record),
        "step": record.step,
        "steps": [record.step for record, _ in measured],
        "delta_align": row(spinal.delta_align for _, spinal in measured),
        "coherence": row(spinal.coherence for _, spinal in measured),
        "reference_coherence": row(spinal.reference_coherence for _, spinal in measured),
        "policy": {"contraction": row(last.policy.contraction), "transport": row(last.policy.transport)},
        "reference": {"contraction": row(last.reference.contraction), "transport": row(last.reference.transport)},
        "terminal_layers": last.terminal_layers,
    }


def _spinal_title(record: AuditRecord) -> str:
    """SPINAL's signature is a positive Δalign on a path that is as coherent as the reference's: anything else is none."""
    spinal = record.spinal
    assert spinal is not None
    if record.reference_check.same_weights:
        return "SPINAL: nothing to compare, policy and reference are equal"
    if not math.isfinite(spinal.delta_align):
        return text(f"SPINAL: not known ({why_unknown(record, 'spinal.delta_align', spinal.delta_align)})")
    delta = f"Δalign {spinal.delta_align:+.2f}".replace("-", "−")
    coherence = ""
    if math.isfinite(spinal.coherence) and math.isfinite(spinal.reference_coherence):
        coherence = f", coherence {spinal.coherence:.2f} (reference {spinal.reference_coherence:.2f})"
    jagged = coherence and spinal.coherence < JAGGED * spinal.reference_coherence
    if spinal.delta_align < LEAST_DELTA or jagged:
        return f"No SPINAL signature: {delta}{coherence}"
    return f"Δalign is positive, as in SPINAL's signature: {delta}{coherence}"
