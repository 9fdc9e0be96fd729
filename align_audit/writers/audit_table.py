"""All that one audit measured, as a table of some fifteen lines on a terminal. Plain text where the output is no terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_audit.record.audit_record import GUARDED, AuditRecord, control_items
from align_audit.record.numbers import NO_REASON, Number, by_path, is_unknown, why_unknown
from align_audit.record.site_names import site_name
from align_audit.record.status import Status
from align_audit.writers.styled import RED, STATUS_STYLES, VERDICT_STYLES, Part, overflow_of, text_of
from align_audit.writers.words import on_probes, overshoot

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class _Row:
    label: str
    parts: tuple[Part, ...]
    """Text and style, in order."""

    @classmethod
    def of(cls, label: str, text: str, style: str = "") -> _Row:
        return cls(label, ((text, style),))


@dataclass(frozen=True)
class _Summary:
    title: str
    rows: tuple[_Row, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD if options.is_terminal else None,
            show_header=False,
            title=text_of([(self.title, "bold")], options),
            title_justify="left",
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column(no_wrap=True, overflow=overflow_of(options))
        table.add_column(ratio=1, overflow=overflow_of(options))
        for row in self.rows:
            table.add_row(row.label, text_of(row.parts, options))
        yield table


def summary_table(record: AuditRecord, status: Status | None = None) -> _Summary:
    """A rich renderable: how the run stands, and what one audit measured, in some fifteen lines of 80 columns."""
    provenance = record.provenance
    patched = ""
    if (attribution := record.attribution) is not None:
        least, most = attribution.exact_pairs, max(attribution.patched_pairs, default=attribution.exact_pairs)
        patched = f" ({least} patched)" if most == least else f" ({least} to {most} patched)"
    title = (
        f"align_audit, step {record.step}{on_probes(record)}: {provenance.pairs} pairs{patched}, "
        f"{provenance.model_type} with {provenance.num_layers} layers"
    )
    rows = list(_rows(record))
    if status is not None:
        # Why an alert is open is said by the alert itself.
        words = f"{status}: {status.reason}" if status.word == "BLIND" else str(status)
        rows.insert(0, _Row.of("status", words, STATUS_STYLES[status.word]))
    return _Summary(title, tuple(rows))


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(record: AuditRecord) -> Iterator[_Row]:
    at = by_path(record)
    if record.finding is not None:
        yield _Row.of("finding", record.finding.words, "bold" if record.finding.localized else "")
    yield _number_row("margin shift", at["margins.shift"], signed=True)
    yield _number_row("accuracy", at["margins.accuracy"])
    yield _number_row("chosen log-prob.", at["margins.chosen_logp_change_per_token"], signed=True)
    yield _number_row("KL to reference", at["margins.kl"])
    yield from _patching_rows(record, at)
    yield from _low_rank_rows(record)
    yield from _site_rows(record, at)
    yield from _spinal_rows(record, at)
    yield from _control_rows(record)
    if record.reference_check.verdict == "failed":
        yield _Row.of("reference", f"CHECK FAILED: {record.reference_check.reason}", "bold")
    cost = record.cost
    memory = cost.peak_memory / 2**20
    size = f"{memory / 1024:.1f} GiB" if memory >= 1024 else f"{memory:.0f} MiB"
    words = f"{cost.seconds:.1f} s, {size} at the peak, {cost.forward_equivalents:.0f} forwards"
    if cost.training_pairs is not None and cost.share_of_run is not None:
        words += f", as long as training on {cost.training_pairs:.0f} pairs ({cost.share_of_run:.1%} of the run so far)"
    yield _Row.of("cost", words)


def _number_row(label: str, number: Number, signed: bool = False) -> _Row:
    if is_unknown(number.value):
        return _unknown(label, number.reason or NO_REASON)
    return _Row.of(label, _interval(number, signed) + (f" {number.unit}" if number.unit.startswith("nats") else ""))


def _patching_rows(record: AuditRecord, at: Mapping[str, Number]) -> Iterator[_Row]:
    if record.patching is None:
        yield _unknown("patching", why_unknown(record, "patching"))
        return
    peak = record.patching.peak_layer
    if peak is None:
        yield _unknown("peak layer", why_unknown(record, "patching.peak_layer"))
    else:
        transplant = _interval(at[f"patching.block_transplant.{peak}"], signed=True)
        yield _Row.of("peak layer", f"{peak}, block transplant {transplant} nats")
    yield _number_row("additivity", at["patching.additivity"])


def _spinal_rows(record: AuditRecord, at: Mapping[str, Number]) -> Iterator[_Row]:
    if (spinal := record.spinal) is None:
        yield _unknown("SPINAL", why_unknown(record, "spinal"))
        return
    words = {
        "delta_align": f"{spinal.delta_align:+.3g}",
        "coherence": f"{_number(spinal.coherence)} (reference {_number(spinal.reference_coherence)})",
    }
    for name, text in words.items():
        number = at[f"spinal.{name}"]
        yield _unknown(name, number.reason or NO_REASON) if is_unknown(number.value) else _Row.of(name, text)


def _low_rank_rows(record: AuditRecord) -> Iterator[_Row]:
    curves = [(basis, layer, curve) for basis, by in record.low_rank.items() for layer, curve in sorted(by.items())]
    if not curves:
        yield _unknown("rank_95", why_unknown(record, "low_rank"))
        return
    # The shift basis is the alignment subspace proper. A few directions of the activations throw most of the stream away,
    # so that the margin may overshoot and a tiny rank look sufficient: the record and the pictures have that curve.
    curves = [curve for curve in curves if curve[0] == "shift"] or curves
    # Some lines at most: with every layer measured, the figures of the deepest reading are in the record.
    shown = curves if len(curves) <= 4 else [c for c in curves if c[1] == _peak(record, c[1])][:4] or curves[:4]
    said = []
    for basis, layer, curve in shown:
        rank = f"> {max(curve.ranks)}" if _unreached(curve) else _number(curve.rank_95)
        beyond = overshoot(curve)
        rank += "" if beyond is None else f", overshooting to {_number(beyond)} of the effect"
        said.append(f"{rank} (layer {layer}, {basis} basis)")
    more = f", {len(curves) - len(shown)} more in the record" if len(shown) < len(curves) else ""
    yield _Row.of("rank_95", ", ".join(said) + more)


def _site_rows(record: AuditRecord, at: Mapping[str, Number]) -> Iterator[_Row]:
    for place, curve in enumerate(record.sites):
        label = site_name(curve)
        if curve.peak is None:
            yield _unknown(label, why_unknown(record, f"sites.{place}.peak"))
            continue
        unit = curve.units[curve.peak]
        where = f"layer {unit.layer}" if unit.layer == unit.last_layer else f"layers {unit.layer}–{unit.last_layer}"
        where += "" if unit.head is None else f", head {unit.head}"
        text = f"peak {where}: {_interval(at[f'sites.{place}.sufficiency.{curve.peak}'], signed=True)} nats"
        if not curve.sufficiency_p_adjusted[curve.peak] < 0.05:
            text += ", not told from 0"
        if curve.correlation is not None:
            text += f" ({curve.estimator.replace('_', ' ')}, correlation {_number(curve.correlation[curve.peak])})"
        yield _Row.of(label, text)


def _peak(record: AuditRecord, default: int) -> int:
    peak = record.patching.peak_layer if record.patching is not None else None
    return default if peak is None else peak


def _unreached(curve: Any) -> bool:
    """Unknown because no rank was enough, which is a finding, and not because the effect was not known."""
    return is_unknown(curve.rank_95) and all(math.isfinite(fraction.mean) for fraction in curve.effect_fraction)


def _control_rows(record: AuditRecord) -> Iterator[_Row]:
    by_verdict: dict[str, list[str]] = {"passed": [], "failed": [], "not_run": []}
    for name, control in control_items(record):
        by_verdict[control.verdict].append(name.replace("_", " "))
    parts: list[Part] = []
    for verdict, names in by_verdict.items():
        if names:
            parts.append(("; " if parts else "", ""))
            style = RED if verdict == "failed" and "identity" in names else VERDICT_STYLES[verdict]
            parts.append((f"{verdict.replace('_', ' ')}: {', '.join(names)}", style))
    yield _Row("controls", tuple(parts))
    for name, control in control_items(record):
        if control.verdict == "failed":
            # What says nothing about the run is grey; only the identity control says that the measurement itself is broken.
            words = f"{GUARDED[name]} ({name.replace('_', ' ')}): {control.reason}"
            yield _Row.of("  not evidence", words, RED if name == "identity" else "dim")


def _unknown(label: str, reason: str) -> _Row:
    return _Row.of(label, f"not known: {reason}", "dim")


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.3g}"


def _interval(number: Number, signed: bool = False) -> str:
    """An estimate with its interval."""
    mean, low, high = (math.nan if end is None else end for end in (number.value, number.low, number.high))
    # One number of decimals for all three, from the width of the interval: 9.69 [7.2, 12.1] reads badly.
    width = high - low
    scale = width if width > 0 and math.isfinite(width) else abs(mean)
    of_size = scale > 0 and math.isfinite(scale)
    decimals = min(max(1 - math.floor(math.log10(scale)), 0), 6) if of_size else 2
    sign = "+" if signed else ""
    return f"{mean:{sign}.{decimals}f} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"
