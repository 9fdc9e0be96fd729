"""Records as TensorBoard curves, pictures and text.

Curves are those of :mod:`align_audit.writers.scalars`, under its tags. TensorBoard cannot draw NaN: what is not known is
left out and listed, with its reason, in the text ``align_audit/not_known``. Other texts are ``align_audit/alerts`` and
``align_audit/controls``; the pictures of :mod:`align_audit.writers.plots.gallery` stand under
``align_audit/<group>/<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align_audit.record.audit_record import Alert, AuditRecord, SiteCurve, control_items, site_names
from align_audit.record.numbers import is_unknown, span
from align_audit.record.run import one_per_step
from align_audit.writers.scalars import not_known, root_of, scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes audits with a summary writer that belongs to somebody else: it is flushed, never closed.

    Args:
        summary_writer: any ``torch.utils.tensorboard.SummaryWriter``; the trainer's own, for curves side by side.
        images: draw heat maps and traces too (a few seconds an audit).
        probe_names: of all sets that will be written; TensorBoard reads one layout, which has to name them all.
    """

    def __init__(
        self, summary_writer: SummaryWriter, images: bool = True, probe_names: Sequence[str | None] = (None,)
    ) -> None:
        self._writer = summary_writer
        self._images = images
        self._probe_names = tuple(probe_names)
        self._layout_written = False

    def redirect(self, summary_writer: SummaryWriter) -> None:
        """Go on with another writer of the same log folder, because the first was closed."""
        self._writer = summary_writer

    def write(self, record: AuditRecord, history: Sequence[AuditRecord] = ()) -> None:
        """Write one audit at its step.

        Args:
            record: the audit.
            history: the audits of the run, for the pictures over steps; ``record`` may be among them or not, and those
                of other probe sets are left out.
        """
        step, name = record.step, record.provenance.probe_name
        root = root_of(name)
        try:
            if not self._layout_written:
                self._writer.add_custom_scalars(custom_scalars_layout(self._probe_names, record.sites))
                self._layout_written = True
            for tag, value in scalars(record).items():
                self._writer.add_scalar(tag, value, step)
            self._writer.add_text(f"{root}/controls", controls_table(record), step)
            if record.alerts:
                self._writer.add_text(f"{root}/alerts", "\n\n".join(map(alert_text, record.alerts)), step)
            unknown = not_known(record)
            if unknown:
                self._writer.add_text(f"{root}/not_known", not_known_table(record), step)
            if self._images:
                others = [other for other in history if other.key != record.key and other.provenance.probe_name == name]
                self._write_images(record, [*others, record])
        finally:
            self._writer.flush()

    def _write_images(self, record: AuditRecord, records: Sequence[AuditRecord]) -> None:
        from align_audit.writers.plots import gallery as plots
        from align_audit.writers.plots.canvas import pixels
        from align_audit.writers.plots.sites import site_figures

        # Later audits may be in the log when an earlier step is written again; a picture at a step shows none of them.
        records = [other for other in one_per_step(records) if other.step <= record.step]
        figures: dict[str, tuple[bool, Callable[[], Figure]]] = {
            "margins/margins_over_steps": (True, lambda: plots.margins_over_steps(records)),
            "patching/recovery_by_layer_and_step": (
                record.patching is not None,
                lambda: plots.recovery_by_layer_and_step(records),
            ),
            "patching/layer_gain_by_layer_and_step": (
                record.patching is not None,
                lambda: plots.layer_gain_by_layer_and_step(records),
            ),
            "patching/block_transplants": (record.patching is not None, lambda: plots.block_transplants(records)),
            "low_rank/low_rank_curve": (bool(record.low_rank), lambda: plots.low_rank_curve(record)),
            "spinal/depth_trace": (record.spinal is not None, lambda: plots.depth_trace(record)),
        }
        figures |= {f"sites/{name}": (True, draw) for name, draw in site_figures(record).items()}
        for tag, (measured, draw) in figures.items():
            if measured:
                # add_figure would go through pyplot, and its global state.
                self._writer.add_image(
                    f"{root_of(record.provenance.probe_name)}/{tag}", pixels(draw()), record.step, dataformats="HWC"
                )


# --- texts ------------------------------------------------------------------------------------------------------------


def alert_text(alert: Alert) -> str:
    """An alert in Markdown."""
    where = f", layers {span(alert.layers)}" if alert.layers else ""
    numbers = {"value": alert.value, "baseline": alert.baseline, "threshold": alert.threshold}
    known = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if not is_unknown(value))
    return (
        f"**{alert.level.upper()}: {alert.rule}** (step {alert.step}{where})\n\n"
        f"{alert.message}\n\n*What to do:* {alert.suggestion}" + (f"\n\n*Numbers:* {known}" if known else "")
    )


def controls_table(record: AuditRecord) -> str:
    """What was found, in words; then verdict and reason of every control and of the check of the reference, in Markdown."""
    rows = [(name.replace("_", " "), control.verdict, control.reason) for name, control in control_items(record)]
    said = f"**Finding:** {record.finding.words}\n\n" if record.finding is not None else ""
    check = record.reference_check
    rows.append((f"reference ({check.source})", check.verdict, check.reason))
    return said + _table(
        ("control", "verdict", "why"),
        [
            (name, f"**{verdict.upper()}**" if verdict == "failed" else verdict.replace("_", " "), why)
            for name, verdict, why in rows
        ],
    )


def not_known_table(record: AuditRecord) -> str:
    """Everything that is not known, where, and why, as a Markdown table."""
    rows = []
    for (path, reason), places in not_known(record).items():
        ranks = any(part in path for part in ("effect_fraction", "random_subspace", "explained"))
        unit = "units" if path.startswith("sites.") else "ranks" if ranks else "layers"

        rows.append((f"`{path}`", f"{unit} {span(places)}" if places else "", reason))
    return _table(("not known", "where", "why"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])


# --- layout -----------------------------------------------------------------------------------------------------------


def custom_scalars_layout(
    probe_names: Sequence[str | None] = (None,), sites: Sequence[SiteCurve] = ()
) -> dict[str, dict[str, list[Any]]]:
    """Charts for TensorBoard's custom-scalars page: intervals as bands, all layers of a quantity in one chart.

    Args:
        probe_names: each probe set has groups of its own, and the tags in a group are those of its set alone.
        sites: the curves of finer sites that will be written, each a chart of its own.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for name in probe_names:
        layout |= _layout_of(root_of(name), sites)
    return layout


def _layout_of(root: str, sites: Sequence[SiteCurve]) -> dict[str, dict[str, list[Any]]]:
    def band(path: str) -> list[Any]:
        return ["Margin", [f"{root}/{path}{suffix}" for suffix in ("", "_low", "_high")]]

    def lines(*patterns: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(root)}/{pattern}$" for pattern in patterns]]

    each = r"layer_\d+"
    finer = {
        f"{name.replace('_', ' ')} (nats)": lines(
            f"sites/{name}/{each}" + (r"_head_\d+" if curve.site == "head" else "")
        )
        for name, curve in zip(site_names(sites), sites, strict=True)
    }
    return {
        f"{root}: margins": {
            "margin shift (nats)": band("margins/shift"),
            "chosen log-prob. change (nats per token)": band("margins/chosen_logp_change_per_token"),
            "rejected log-prob. change (nats per token)": band("margins/rejected_logp_change_per_token"),
            "KL to the reference (nats per token)": band("margins/kl"),
            "accuracy": band("margins/accuracy"),
            "entropy, policy and reference": lines("margins/entropy", "margins/reference_entropy"),
            "next-token accuracy, policy and reference": lines(
                "margins/token_accuracy", "margins/reference_token_accuracy"
            ),
        },
        f"{root}: layers": {
            "block transplant by layer (nats)": lines(f"patching/block_transplant/{each}"),
            "layer gain": lines(f"patching/layer_gain/{each}"),
            "recovery by layer": lines(f"patching/recovery/{each}"),
            "noise control by layer (nats)": lines(f"controls/noise/effect/{each}"),
            "additivity": band("patching/additivity"),
            "peak layer": lines("patching/peak_layer"),
            "selection frequency by layer": lines(f"localization/selection_frequency/{each}"),
        },
        f"{root}: low rank": {
            "rank 95, shift basis": lines(f"low_rank/shift/{each}/rank_95"),
            "rank 95, activation basis": lines(f"low_rank/activation/{each}/rank_95"),
            "share of the effect by rank, shift basis": lines(rf"low_rank/shift/{each}/effect_fraction/rank_\d+"),
        },
        **({f"{root}: finer sites": finer} if finer else {}),
        f"{root}: SPINAL": {
            "delta_align": lines("spinal/delta_align"),
            "coherence, policy and reference": lines("spinal/coherence", "spinal/reference_coherence"),
            "gradient concentration": band("spinal/gradient_concentration"),
            "contraction of the policy by layer": lines(f"spinal/policy/contraction/{each}"),
            "transport of the policy by layer": lines(f"spinal/policy/transport/{each}"),
        },
        f"{root}: alerts and controls": {
            "alerts": lines("alerts/warning", "alerts/error"),
            "controls passed": lines(r"controls/\w+/passed"),
        },
    }
