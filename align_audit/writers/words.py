"""Words that several writers share: titles, warnings about failed controls, and which records are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from align_audit.errors import counted
from align_audit.record.audit_record import AuditRecord, LowRankCurve
from align_audit.record.numbers import is_unknown
from align_audit.record.run import one_per_step
from align_audit.record.stored_records import Head
from align_audit.record.transfer_record import TransferRecord


def on_probes(record: AuditRecord) -> str:
    """For titles: which probe set, where that has a name.

    Example:
        ``" on 'harmless'"``, or nothing.
    """
    name = record.provenance.probe_name
    return "" if name is None else f" on {name!r}"


def pairs_in_words(record: AuditRecord, noun: str = "pairs") -> str:
    """How many pairs an audit was made on, and whether the policy was trained on them.

    Example:
        ``24 held-out pairs``, ``64 pairs that are trained on``, ``64 pairs`` where nobody said.
    """
    count, held_out = record.provenance.pairs, record.provenance.probe_held_out
    noun = noun.removesuffix("s") if count == 1 else noun
    if held_out is None:
        return f"{count} {noun}"
    return f"{count} held-out {noun}" if held_out else f"{count} {noun} that {'is' if count == 1 else 'are'} trained on"


SCRIPT = """\
  from align_audit import AlignmentAuditCallback

  callback = AlignmentAuditCallback()
  trainer = DPOTrainer(..., callbacks=[callback])
  callback.attach(trainer)"""
"""What goes into a training script."""


def duration(seconds: float) -> str:
    """A time in words, rounded.

    Example:
        >>> duration(3.21), duration(12.3), duration(200), duration(3600), duration(5000)
        ('3.2 s', '12 s', '3 min', '1 h', '1 h 23 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s" if round(seconds, 1) >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def cost_in_words(heads: Sequence[Head]) -> str:
    """What audits took, and what the trainer would have done in that time; of the run's share what its last audit knows.

    Example:
        ``12 audits took 41 s, as long as training on 310 pairs; all audits, with what is written of them, took 4.2 % of
        the run``; without a trainer
        ``12 audits took 41 s``.
    """
    total = sum(head.seconds for head in heads)
    words = f"{counted(len(heads), 'audit')} took {total:.{0 if total >= 10 else 1}f} s"
    occasions = [head.occasion for head in reversed(heads) if head.occasion is not None]
    pair = next((each.training_pair_seconds for each in occasions if each.training_pair_seconds), None)
    share = next((each.share_spent for each in occasions if each.share_spent is not None), None)
    if pair is not None:
        words += f", as long as training on {counted(round(total / pair), 'pair')}"
    return (
        words
        if share is None
        else f"{words}; all audits, with what is written of them, took {share * 100:.1f} % of the run"
    )


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


def to_draw(records: Sequence[AuditRecord]) -> list[AuditRecord]:
    """One record a step.

    Raises:
        ValueError: there are none.
    """
    latest = one_per_step(records)
    if not latest:
        raise ValueError("no records to draw; expected at least one audit")
    return latest


def titled(title: str, record: AuditRecord) -> str:
    """The title, with the name of the probe set where it has one."""
    name = record.provenance.probe_name
    return title if name is None else f"Probes {name!r}. {title}"


def failed_controls(records: Sequence[AuditRecord], names: Sequence[str]) -> list[str]:
    """One warning per failed control: what it takes the ground from is not evidence."""
    warnings = []
    for name in names:
        failed = [record for record in records if getattr(record.controls, name).verdict == "failed"]
        if not failed:
            continue
        title = name.replace("_", " ")
        # Unstable halves cast doubt on which layer is the peak, not on the layers' values.
        doubt = "Peak layer is not evidence" if name == "split_half" else "Not evidence"
        if len(records) == 1:
            warnings.append(f"{doubt}: {title} control failed ({getattr(failed[0].controls, name).reason})")
        else:
            steps = [record.step for record in failed]
            where = (
                f"steps {', '.join(map(str, steps))}"
                if 1 < len(steps) <= 6
                else f"step {steps[0]}"
                if len(steps) == 1
                else f"{len(steps)} of {len(records)} audits, steps {steps[0]} to {steps[-1]}"
            )
            warnings.append(f"{doubt} at {where}: {title} control failed")
    return warnings


def overlap_notes(record: TransferRecord) -> list[str]:
    """What the sets of a transfer share, and what was done about it."""
    notes = []
    cells = next(iter(next(iter(record.cells.values())).values()))
    for fitted, by_patch in record.shared_pairs.items():
        for patched, shared in by_patch.items():
            if shared:
                cell = cells[fitted][patched]
                notes.append(
                    f"{shared} of {record.provenance[patched].pairs} pairs of {patched} are in {fitted} too: "
                    f"{cell.cross_fitted} patched with the half of {fitted} they are not in, {cell.excluded} left out"
                )
    return notes
