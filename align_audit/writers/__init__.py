"""Writers turn stored records into curves, pictures and tables. They see records only: no model, no measure.

Here is what they share; the libraries they write with load when a writer is first used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from align_audit.record.audit_record import AuditRecord, Control, Controls, Estimate, LowRankCurve, SiteCurve

CONTROL_NAMES = tuple(Controls.model_fields)


def one_per_step(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    """The latest record of each step, by step: a resumed run may have audited a step twice.

    Raises:
        ValueError: the records are of several probe sets, which are not one curve.
    """
    records = list(records)
    names = list(dict.fromkeys(record.provenance.probe_name for record in records))
    if len(names) > 1:
        raise ValueError(
            f"found records of the probe sets {', '.join(map(repr, names))}; expected those of one: AuditRun.select(name)"
        )
    latest: dict[int, AuditRecord] = {}
    for record in sorted(records, key=lambda record: (record.step, record.provenance.created)):
        latest[record.step] = record
    return list(latest.values())


def by_probe_set(records: Iterable[AuditRecord]) -> dict[str | None, list[AuditRecord]]:
    """Records by the name of their probe set, in the order of the first of each; None for the set without a name."""
    found: dict[str | None, list[AuditRecord]] = {}
    for record in records:
        found.setdefault(record.provenance.probe_name, []).append(record)
    return found


def on_probes(record: AuditRecord) -> str:
    """For titles: which probe set, where that has a name.

    Example:
        ``" on 'harmless'"``, or nothing.
    """
    name = record.provenance.probe_name
    return "" if name is None else f" on {name!r}"


def control_items(record: AuditRecord) -> Iterator[tuple[str, Control]]:
    """Name and result of each control."""
    for name in CONTROL_NAMES:
        yield name, getattr(record.controls, name)


def site_name(curve: SiteCurve) -> str:
    """A curve of finer sites in words: what was swapped, and where."""
    names = {"attention_output": "attention output", "mlp_output": "MLP output", "head": "heads", "block": "blocks"}
    name = names[curve.site] if curve.width == 1 else f"windows of {curve.width} layers"
    return name if curve.positions == "all" else f"{name}, {curve.positions.replace('_', ' ')}"


def site_names(curves: Sequence[SiteCurve]) -> list[str]:
    """A short name for each curve, for tags and files: its site, with what sets it apart from the usual and the others.

    Example:
        ``["head", "block_width_2", "head_prompt_attribution", "head_again_2"]``
    """
    found: list[str] = []
    for curve in curves:
        name: str = curve.site
        if curve.width != 1:
            name += f"_width_{curve.width}"
        if curve.positions != "all":
            name += f"_{curve.positions}"
        if curve.estimator != "exact":
            name += f"_{curve.estimator}"
        same = sum(other == name or other.startswith(f"{name}_again_") for other in found)
        found.append(f"{name}_again_{same + 1}" if same else name)
    return found


def overshoot(curve: LowRankCurve) -> float | None:
    """The largest effect fraction from ``rank_95`` up, where that is above 1.5; else None.

    ``rank_95`` asks for at least 0.95 of the effect and sets no upper bound. A few directions of the activations throw
    most of the stream away, which can move the margin by several times the effect; half as much again is far outside the
    intervals of a fraction near 1.
    """
    fractions = [
        fraction.mean
        for k, fraction in zip(curve.ranks, curve.effect_fraction, strict=True)
        if not is_unknown(curve.rank_95) and k >= curve.rank_95
    ]
    return max(fractions) if fractions and max(fractions) > 1.5 else None


def why_unknown(record: AuditRecord, path: str, value: Estimate | float | None = None) -> str:
    """Why the number at a dotted path is NaN or None: its own reason, or that of the nearest part that has one.

    Example:
        ``why_unknown(record, "spinal.policy.contraction.3")`` looks for that path in ``record.reasons``, then for
        ``spinal.policy.contraction``, ``spinal.policy`` and ``spinal``.
    """
    if isinstance(value, Estimate) and value.reason:
        return value.reason
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        reason = record.reasons.get(".".join(parts[:end]))
        if reason:
            return reason
    return "the record gives no reason"


def is_unknown(value: Estimate | float | int | None) -> bool:
    """Is this number one that could not be known?"""
    if isinstance(value, Estimate):
        value = value.mean
    return value is None or math.isnan(value)


def span(numbers: Sequence[int], most: int = 6) -> str:
    """Integers in words, runs contracted: ``0–3, 7``; a long list is cut short."""
    if not numbers:
        return "none"
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs]
    if len(words) > most:
        words = [*words[: most - 1], "…", words[-1]]
    return ", ".join(words)
