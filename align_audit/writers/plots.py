"""Pictures of a run, from its records alone.

Each function returns a :class:`matplotlib.figure.Figure` that belongs to no window and no global state; save it, or
show it in a notebook. Every picture says what it shows and how to read it. What could not be known is hatched, with
the reason below; what a failed control takes the ground from is said in red above. Colours are those of Okabe and Ito
and a diverging map centred on 0, which the common forms of colour blindness tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.record import Alert, AuditRecord, DepthTrace, Estimate, LowRankCurve
from align_audit.writers import by_probe_set, control_items, is_unknown, one_per_step, why_unknown
from align_audit.writers.canvas import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    INK,
    LEVEL_MARKS,
    ORANGE,
    PALE,
    RED,
    UNKNOWN,
    VERDICT_COLOURS,
    Notes,
    bars,
    colour_bar,
    draw_band,
    fill_unknown,
    frame,
    hatch,
    heat_cells,
    layer_axis,
    nothing,
    number,
    styled,
)
from align_audit.writers.site_plots import site_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- the pictures -----------------------------------------------------------------------------------------------------


@styled
def recovery_by_layer_and_step(records: Sequence[AuditRecord]) -> Figure:
    """Recovery of the margin shift by patched layer, over the audits of a run; one audit: its curve with intervals.

    Raises:
        ValueError: there are no records.
    """
    return _by_layer_and_step(
        records,
        _Quantity(
            field="recovery",
            title="Recovery: share of the margin shift carried by the policy's stream after each layer",
            read="The curve climbs to 1 by construction. Read where it climbs, not how high it stands: that is the "
            "layer gain, and which block acts on its own is the transplant.",
            unit="recovery (share of the margin shift)",
            controls=("noise", "reverse", "identity"),
            least_limit=1.0,
        ),
    )


@styled
def layer_gain_by_layer_and_step(records: Sequence[AuditRecord]) -> Figure:
    """Gain in recovery by layer (with embedding and head: they sum to 1), over audits; one audit: with intervals.

    Raises:
        ValueError: there are no records.
    """
    return _by_layer_and_step(
        records,
        _Quantity(
            field="layer_gain",
            title="Layer gain: share of the margin shift that each layer adds to those below it",
            read="The column of an audit sums to 1. Red adds, blue takes away; one strong row is a localized change, "
            "even rows a spread one.",
            unit="layer gain (share of the margin shift)",
            controls=("noise", "reverse", "identity"),
            below="embedding_gain",
            above="head_gain",
            least_limit=0.05,
        ),
    )


@styled
def block_transplants(records: Sequence[AuditRecord]) -> Figure:
    """Effect of each block's learned update on its own, in nats, over audits; one audit: with intervals.

    Raises:
        ValueError: there are no records.
    """
    return _by_layer_and_step(
        records,
        _Quantity(
            field="block_transplant",
            title="Block transplants: margin moved by one policy block alone inside the reference",
            read="Red blocks raise the margin of chosen over rejected, blue ones lower it; the dot is the peak layer. "
            "Blue rows that appear late are blocks that work against the others.",
            unit="block transplant (nats)",
            controls=("noise", "reverse", "identity", "split_half"),
            below="embedding_transplant",
            above="head_transplant",
            least_limit=0.1,
            peak=True,
        ),
    )


@styled
def depth_trace(record: AuditRecord) -> Figure:
    """Contraction and transport by layer and against each other, policy and reference, terminal block shaded."""
    import numpy as np

    title = _titled(
        f"SPINAL depth trace at step {record.step}: how the streams of policy and reference change with depth", record
    )
    spinal = record.spinal
    if spinal is None:
        return nothing(title, _not_measured(record, "spinal"))
    read = (
        "Steeper spectra (higher contraction) and shorter steps (lower transport) in the shaded terminal block, "
        "against the reference, are the signature of alignment; a policy that zigzags where the reference is smooth "
        "is not."
    )
    notes = Notes()
    for model, trace in (("policy", spinal.policy), ("reference", spinal.reference)):
        for name, values in (("contraction", trace.contraction), ("transport", trace.transport)):
            for layer, value in enumerate(values):
                if math.isnan(value):
                    notes.unknown(name, layer, why_unknown(record, f"spinal.{model}.{name}.{layer}"))
    scores = {
        "delta_align": spinal.delta_align,
        "coherence": spinal.coherence,
        "reference coherence": spinal.reference_coherence,
        "gradient concentration": spinal.gradient_concentration.mean,
    }
    summary = ", ".join(f"{name} {number(value)}" for name, value in scores.items())
    rows = (
        f"{spinal.rows} of {spinal.rows_available} token rows"
        if spinal.rows < spinal.rows_available
        else (f"all {spinal.rows} token rows")
    )
    body, figure = frame(10.0, 5.2, title, read, footers=[f"{summary}; {rows}.", *notes.lines("layer")])
    grid = body.add_gridspec(2, 2, width_ratios=[1.15, 1.0])
    upper, lower, plane = (
        body.add_subplot(grid[0, 0]),
        body.add_subplot(grid[1, 0]),
        body.add_subplot(grid[:, 1]),
    )
    models: tuple[tuple[str, DepthTrace, str, str], ...] = (
        ("reference", spinal.reference, ORANGE, "s"),
        ("policy", spinal.policy, BLUE, "o"),
    )
    count = record.provenance.num_layers
    terminal = spinal.terminal_layers
    size = 4.5 if count <= 16 else 3.0
    for axes, name in ((upper, "contraction"), (lower, "transport")):
        if terminal:
            axes.axvspan(min(terminal) - 0.5, max(terminal) + 0.5, color="#eef3f8", zorder=0)
        for label, trace, colour, mark in models:
            curve = np.array(getattr(trace, name))
            # The reference is drawn wider, so that it shows under a policy that equals it.
            wider = 1.6 if label == "reference" else 1.0
            axes.plot(
                curve,
                color=colour,
                marker=mark,
                markersize=size * min(wider, 1.3),
                linewidth=1.4 * wider,
                label=label,
                zorder=3,
            )
            if name == "contraction":
                error = 1.96 * np.array(trace.contraction_stderr)
                axes.fill_between(
                    range(count), curve - error, curve + error, color=colour, alpha=0.2, linewidth=0, zorder=2
                )
        unknown = [
            layer
            for layer in range(len(getattr(spinal.policy, name)))
            if any(math.isnan(getattr(trace, name)[layer]) for _, trace, _, _ in models)
        ]
        hatch(axes, list(range(count)), unknown)
        layer_axis(axes, count, "x")
        axes.set_xlim(-0.5, count - 0.5)
    upper.set_ylabel("contraction α\n(slope of log σ)")
    lower.set_ylabel("transport\n(radians)")
    lower.set_xlabel("layer")
    upper.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    upper.set_title("terminal block shaded", loc="right", color=GREY, fontsize=8)

    inner = [layer for layer in terminal if layer < len(spinal.policy.transport)]
    for label, trace, colour, mark in models:
        alpha, transport = np.array(trace.contraction[: len(trace.transport)]), np.array(trace.transport)
        plane.plot(alpha, transport, color=colour, alpha=0.35, linewidth=0.9, zorder=2)
        plane.scatter(alpha, transport, s=9, color=colour, alpha=0.35, marker=mark, linewidths=0, zorder=2)
        wider = 1.8 if label == "reference" else 1.0
        plane.plot(alpha[inner], transport[inner], color=colour, linewidth=1.6 * wider, zorder=3)
        plane.scatter(
            alpha[inner],
            transport[inner],
            s=30 * wider,
            color=colour,
            marker=mark,
            zorder=4,
            edgecolors="white",
            linewidths=0.6,
        )
        for layer in {0, *inner[:1], *inner[-1:]} if len(alpha) else ():
            if not math.isnan(alpha[layer]):
                plane.annotate(
                    str(layer),
                    (alpha[layer], transport[layer]),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                    fontweight="bold",
                    zorder=5,
                )
    plane.set_xlabel("contraction α")
    plane.set_ylabel("transport (radians)")
    plane.set_title("path through depth (numbers are layers; terminal block in bold)", loc="left", fontsize=8.5)
    return figure


@styled
def low_rank_curve(record: AuditRecord) -> Figure:
    """Share of a layer's effect that its best k directions carry, by rank, for each basis and measured layer."""
    title = _titled(f"Low-rank reconstruction at step {record.step}: how few directions carry a layer's effect", record)
    curves = {basis: by_layer for basis, by_layer in record.low_rank.items() if by_layer}
    if not curves:
        return nothing(title, _not_measured(record, "low_rank"))
    layers = sorted({layer for by_layer in curves.values() for layer in by_layer})
    control = record.controls.random_subspace
    warnings = _failed([record], ("noise", "random_subspace"))
    if len(layers) > 4:
        return _low_rank_map(record, curves, layers, title, warnings)
    read = (
        "A blue curve that reaches 0.95 at a small rank, above random subspaces of the same rank, is a low-rank "
        "change. Explained variance (dashed) may be high where the effect is not."
    )
    notes = Notes()
    unreached: dict[str, None] = {}
    for basis, by_layer in curves.items():
        for layer, curve in by_layer.items():
            if is_unknown(curve.rank_95):
                why = why_unknown(record, f"low_rank.{basis}.{layer}.rank_95")
                unreached[f"Rank 95 is not known (layer {layer}, {basis} basis): {why}."] = None
            for k, fraction in zip(curve.ranks, curve.effect_fraction, strict=True):
                if is_unknown(fraction):
                    path = f"low_rank.{basis}.{layer}.effect_fraction"
                    notes.unknown(f"layer {layer}, {basis} basis", k, why_unknown(record, path, fraction))
    body, figure = frame(
        4.6 * len(curves) + 0.6,
        2.5 * len(layers) + 0.3,
        title,
        read,
        warnings,
        [
            f"Random subspaces: {control.verdict.replace('_', ' ')}, {control.reason}.",
            *list(unreached)[:4],
            *notes.lines("rank"),
        ],
    )
    panels = body.subplots(len(layers), len(curves), squeeze=False, sharey=True)
    random = _random_subspace(record)
    for column, (basis, by_layer) in enumerate(curves.items()):
        for row, layer in enumerate(layers):
            axes = panels[row][column]
            if row == len(layers) - 1:
                axes.set_xlabel("rank k")
            if column == 0:
                axes.set_ylabel("share")
            name = f"layer {layer}, {basis} basis"
            if layer not in by_layer:
                axes.set_title(name, loc="left", fontweight="bold")
                fill_unknown(axes, "not measured in this basis")
                continue
            curve = by_layer[layer]
            found = "not known" if is_unknown(curve.rank_95) else f"{curve.rank_95:.0f}"
            axes.set_title(
                f"{name}: rank 95 {'' if found == 'not known' else 'is '}{found}", loc="left", fontweight="bold"
            )
            _draw_low_rank(axes, curve)
            if random is not None and random[:2] == (basis, layer):
                ranks, estimates = random[2:]
                axes.errorbar(
                    ranks,
                    [estimate.mean for estimate in estimates],
                    yerr=bars(estimates),
                    color=GREY,
                    marker="x",
                    markersize=5,
                    linewidth=1,
                    capsize=2,
                    label="random subspaces" + (" (control failed)" if control.verdict == "failed" else ""),
                )
            if not is_unknown(curve.rank_95):
                axes.axvline(curve.rank_95, color=GREEN, linewidth=1.4, zorder=1, label="rank 95")
    # Fractions of a small effect can run away; the band around 0..1 is what is read.
    shown = [e.mean for by_layer in curves.values() for c in by_layer.values() for e in c.effect_fraction]
    known = [value for value in shown if not math.isnan(value)] or [0.0]
    panels[0][0].set_ylim(max(min(-0.08, min(known) - 0.1), -1.0), min(max(1.15, max(known) + 0.1), 2.0))
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    body.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
    return figure


@styled
def margins_over_steps(records: Sequence[AuditRecord]) -> Figure:
    """Margin shift, log-probability changes, KL and accuracy over a run, with its alerts.

    Raises:
        ValueError: there are no records.
    """
    records = _some(records)
    if len(records) == 1:
        return _margins_once(records[0])
    steps = [record.step for record in records]
    alerts = [alert for record in records for alert in record.alerts]
    first: dict[str, int] = {}
    for alert in alerts:
        first.setdefault(alert.rule, alert.step)
    rules = list(first)
    errors = {
        rule: min(alert.step for alert in alerts if alert.rule == rule and alert.level == "error")
        for rule in rules
        if any(alert.rule == rule and alert.level == "error" for alert in alerts)
    }
    read = "A margin that grows while the chosen log-probability falls and KL climbs is bought with damage. " + (
        "Bands are bootstrap intervals; a red line marks the first error of an alert rule."
        if errors
        else "Bands are bootstrap intervals."
    )
    notes = Notes()
    for _, series in _MARGIN_PANELS:
        for name, legend, *_ in series:
            for record in records:
                if is_unknown(getattr(record.margins, name)):
                    why = why_unknown(record, f"margins.{name}", getattr(record.margins, name))
                    notes.unknown(legend, record.step, why)
    strip = 0.25 + 0.2 * len(rules) if rules else 0.0
    title = _titled("Margins and behaviour on the probe pairs, against the reference", records[-1])
    body, figure = frame(9.0, 7.4 + strip, title, read, footers=notes.lines("step"))
    heights = [strip] * bool(rules) + [1.8, 1.8, 1.8, 1.8]
    column = list(body.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    if rules:
        _draw_alerts(column.pop(0), alerts, rules)
    for axes, (label, series) in zip(column, _MARGIN_PANELS, strict=True):
        axes.axhline(0.5 if label == "share" else 0.0, color=GREY, linewidth=0.8, zorder=1)
        unknown: set[int] = set()
        for name, legend, colour, line, mark in series:
            estimates = [getattr(record.margins, name) for record in records]
            draw_band(axes, steps, estimates, colour, legend, line, mark)
            unknown |= {index for index, estimate in enumerate(estimates) if is_unknown(estimate)}
        hatch(axes, steps, sorted(unknown))
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for step in set(errors.values()):
            axes.axvline(step, color=RED, linewidth=1.2, alpha=0.6, zorder=0)
    column[3].set_ylim(-0.03, 1.03)
    column[3].set_xlabel("training step")
    spread = max(steps) - min(steps)
    column[3].set_xlim(min(steps) - 0.03 * spread, max(steps) + 0.03 * spread)
    return figure


_MARGIN_PANELS: tuple[tuple[str, tuple[tuple[str, str, str, str, str], ...]], ...] = (
    ("margin shift\n(nats)", (("shift", "margin shift", BLUE, "-", "o"),)),
    (
        "log-prob. change\n(nats per token)",
        (
            ("chosen_logp_change_per_token", "chosen", BLUE, "-", "o"),
            ("rejected_logp_change_per_token", "rejected", ORANGE, "-", "s"),
        ),
    ),
    ("KL(policy ‖ reference)\n(nats per token)", (("kl", "KL", BLUE, "-", "o"),)),
    (
        "share",
        (
            ("accuracy", "pairs with a margin shift > 0", BLUE, "-", "o"),
            ("ranking_accuracy", "pairs with a margin > 0", ORANGE, "-", "s"),
            ("token_accuracy", "next tokens right", GREEN, "-", "^"),
            ("reference_token_accuracy", "next tokens right, reference", GREEN, ":", ""),
        ),
    ),
)
"""Label of the axis, then field, legend, colour, line and mark of each curve."""


def _margins_once(record: AuditRecord) -> Figure:
    """One audit: every estimate as a point with its interval, one panel for each unit."""
    panels: tuple[tuple[str, float, tuple[tuple[str, str, str], ...]], ...] = (
        (
            "nats",
            0.0,
            (
                ("shift", "margin shift", BLUE),
                ("policy", "margin, policy", BLUE),
                ("reference", "margin, reference", ORANGE),
            ),
        ),
        (
            "nats per token",
            0.0,
            (
                ("chosen_logp_change_per_token", "log-prob. change, chosen", BLUE),
                ("rejected_logp_change_per_token", "log-prob. change, rejected", BLUE),
                ("kl", "KL(policy ‖ reference)", BLUE),
                ("entropy", "entropy, policy", BLUE),
                ("reference_entropy", "entropy, reference", ORANGE),
            ),
        ),
        (
            "share",
            0.5,
            (
                ("accuracy", "pairs with a margin shift > 0", BLUE),
                ("ranking_accuracy", "pairs with a margin > 0", BLUE),
                ("token_accuracy", "next tokens right, policy", BLUE),
                ("reference_token_accuracy", "next tokens right, reference", ORANGE),
            ),
        ),
    )
    notes = Notes()
    for _, _, rows in panels:
        for name, label, _ in rows:
            if is_unknown(getattr(record.margins, name)):
                notes.unknown(label, None, why_unknown(record, f"margins.{name}", getattr(record.margins, name)))
    warnings = [
        f"Alert ({alert.level}) {alert.rule}: {alert.message}" for alert in record.alerts if alert.level != "info"
    ]
    body, figure = frame(
        9.0,
        0.6 * len(panels) + 0.24 * sum(len(rows) for _, _, rows in panels),
        _titled(f"Step {record.step}. Margins and behaviour on the probe pairs, against the reference", record),
        "A margin that grew while the chosen log-probability fell and KL climbed was bought with damage. Points are "
        "means over pairs with their bootstrap intervals, the reference's own in orange.",
        warnings,
        notes.lines("step"),
    )
    column = body.subplots(len(panels), 1, height_ratios=[1.2 + len(rows) for _, _, rows in panels])
    for axes, (unit, zero, rows) in zip(column, panels, strict=True):
        axes.axvline(zero, color=GREY, linewidth=0.8, zorder=1)
        for row, (name, _, colour) in enumerate(rows):
            estimate = getattr(record.margins, name)
            if is_unknown(estimate):
                axes.axhspan(row - 0.4, row + 0.4, facecolor=UNKNOWN, edgecolor="#a8a8a8", hatch="////", linewidth=0)
                continue
            axes.errorbar([estimate.mean], [row], xerr=bars([estimate]), color=colour, marker="o", capsize=3, zorder=3)
            axes.annotate(
                f"{estimate.mean:.3g}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)
        if unit == "share":
            axes.set_xlim(-0.02, 1.02)
    return figure


def save_all(records: Sequence[AuditRecord], directory: str | Path) -> dict[str, Path]:
    """Draw every picture as PNG into a folder (made when absent): name → file. No records: no pictures.

    Depth trace and low-rank curve are those of the latest record that has them. The pictures of a named probe set lie in
    a folder of that name inside, and are called ``<probe name>/<name>``.
    """
    paths = {}
    for probe_name, own in by_probe_set(records).items():
        folder = Path(directory) if probe_name is None else Path(directory) / probe_name
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in draw_all(own).items():
            key = name if probe_name is None else f"{probe_name}/{name}"
            paths[key] = folder / f"{name}.png"
            figure.savefig(paths[key], dpi=130)
    return paths


def draw_all(records: Sequence[AuditRecord]) -> dict[str, Figure]:
    """Every picture of a run, by name."""
    records = _some(records)
    return {
        "margins_over_steps": margins_over_steps(records),
        "recovery_by_layer_and_step": recovery_by_layer_and_step(records),
        "layer_gain_by_layer_and_step": layer_gain_by_layer_and_step(records),
        "block_transplants": block_transplants(records),
        "low_rank_curve": low_rank_curve(next((r for r in reversed(records) if r.low_rank), records[-1])),
        "depth_trace": depth_trace(next((r for r in reversed(records) if r.spinal is not None), records[-1])),
        **{
            name: draw()
            for name, draw in site_figures(next((r for r in reversed(records) if r.sites), records[-1])).items()
        },
    }


# --- layers over audits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quantity:
    """One per-layer estimate of ``Patching`` and how it is shown."""

    field: str
    title: str
    read: str
    unit: str
    controls: tuple[str, ...]
    below: str | None = None
    above: str | None = None
    least_limit: float = 1.0
    peak: bool = False

    def of(self, record: AuditRecord) -> list[tuple[str, Estimate]]:
        """Path and estimate of each row, from the bottom of the model to its top."""
        count = record.provenance.num_layers
        names = [self.below] * bool(self.below) + [self.field] * count + [self.above] * bool(self.above)
        patching = record.patching
        if patching is None:
            nothing = Estimate.unknown(_not_measured(record, "patching"))
            return [(f"patching.{name}", nothing) for name in names]
        values: list[tuple[str, Estimate]] = []
        if self.below:
            values.append((f"patching.{self.below}", getattr(patching, self.below)))
        for layer, estimate in enumerate(getattr(patching, self.field)):
            values.append((f"patching.{self.field}.{layer}", estimate))
        if self.above:
            values.append((f"patching.{self.above}", getattr(patching, self.above)))
        return values


def _by_layer_and_step(records: Sequence[AuditRecord], quantity: _Quantity) -> Figure:
    records = _some(records)
    # A folder that was used for another model before holds columns of another height.
    records = [record for record in records if record.provenance.num_layers == records[-1].provenance.num_layers]
    if all(record.patching is None for record in records):
        return nothing(_titled(quantity.title, records[-1]), _not_measured(records[-1], "patching"))
    return _profile(records[0], quantity) if len(records) == 1 else _heat_map(records, quantity)


def _heat_map(records: Sequence[AuditRecord], quantity: _Quantity) -> Figure:
    import numpy as np

    count = records[-1].provenance.num_layers
    columns = [quantity.of(record) for record in records]
    values = np.array([[estimate.mean for _, estimate in column] for column in columns]).T
    rows = len(values)
    notes = Notes()
    for record, column in zip(records, columns, strict=True):
        for reason in dict.fromkeys(why_unknown(record, path, e) for path, e in column if is_unknown(e)):
            notes.unknown("", record.step, reason)
    body, figure = frame(
        9.0,
        min(max(2.6 + 0.17 * rows, 3.6), 9.0),
        _titled(quantity.title, records[-1]),
        quantity.read,
        _failed(records, quantity.controls),
        notes.lines("step"),
    )
    # The strip keeps its height in inches whatever the number of layers.
    axes, strip = body.subplots(2, 1, sharex=True, height_ratios=[max(2.0 + 0.17 * rows, 3.0), 0.62])

    finite = np.abs(values[np.isfinite(values)])
    # With many cells a single runaway must not bleach the rest.
    top = float(np.quantile(finite, 0.99) if finite.size > 100 else finite.max()) if finite.size else 0.0
    limit = max(top, quantity.least_limit)
    image = heat_cells(axes, values, limit)
    colour_bar(body, image, axes, quantity.unit, clipped=bool(finite.size and finite.max() > limit * 1.0001))
    _row_labels(axes, count, quantity)
    if rows * len(records) <= 80 and len(records) <= 8:
        for (row, column_index), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = abs(value) > 0.6 * limit
                axes.text(
                    column_index,
                    row,
                    f"{value:.2f}" if limit < 10 else f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else INK,
                )
    if quantity.peak:
        offset = 1 if quantity.below else 0
        peaks = [
            (index, record.patching.peak_layer + offset)
            for index, record in enumerate(records)
            if record.patching is not None and record.patching.peak_layer is not None
        ]
        if peaks:
            small = len(records) > 60
            # In annotated cells the dot moves aside to leave the number readable.
            shift = 0.36 if len(records) <= 8 else 0.0
            axes.scatter(
                [x - shift for x, _ in peaks],
                [y for _, y in peaks],
                s=6 if small else 22,
                color=INK,
                edgecolors="white",
                linewidths=0.3 if small else 0.8,
                zorder=4,
            )
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    _verdict_strip(strip, records)
    return figure


def _row_labels(axes: Axes, count: int, quantity: _Quantity) -> None:
    offset = 1 if quantity.below else 0
    every = max(1, math.ceil(count / 16))
    ticks = [(layer + offset, str(layer)) for layer in range(0, count, every)]
    if quantity.below:
        ticks.insert(0, (0, "embedding"))
        axes.axhline(0.5, color=INK, linewidth=0.8)
    if quantity.above:
        ticks.append((count + offset, "head"))
        axes.axhline(count + offset - 0.5, color=INK, linewidth=0.8)
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.set_ylabel("layer")


def _verdict_strip(axes: Axes, records: Sequence[AuditRecord]) -> None:
    """The verdict of each control at each audit, under the columns they guard."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    shown = [name for name, _ in control_items(records[-1]) if name not in ("random_subspace", "permuted_targets")]
    order = list(VERDICT_COLOURS)
    cells = [[order.index(getattr(record.controls, name).verdict) for record in records] for name in shown]
    axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(list(VERDICT_COLOURS.values())),
        vmin=-0.5,
        vmax=len(order) - 0.5,
    )
    for edge in range(1, len(shown)):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    if len(records) <= 60:
        for row, verdicts in enumerate(cells):
            for column, verdict in enumerate(verdicts):
                if order[verdict] == "failed":
                    axes.text(column, row, "×", ha="center", va="center", color="white", fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    every = max(1, math.ceil(len(records) / 12))
    ticks = list(range(0, len(records), every))
    axes.set_xticks(ticks, [str(records[index].step) for index in ticks])
    axes.set_xlabel("training step (one column per audit)", loc="left")
    axes.legend(
        handles=[
            Patch(color=colour, label=f"control {verdict.replace('_', ' ')}")
            for verdict, colour in VERDICT_COLOURS.items()
        ],
        loc="upper right",
        bbox_to_anchor=(1.0, -0.5),
        ncols=3,
        handlelength=1.0,
        handleheight=0.9,
        borderaxespad=0.0,
        columnspacing=1.2,
    )


def _profile(record: AuditRecord, quantity: _Quantity) -> Figure:
    """One audit: values by layer with their intervals."""
    cells = quantity.of(record)
    count = record.provenance.num_layers
    first = -1 if quantity.below else 0
    notes = Notes()
    for path, estimate in cells:
        if is_unknown(estimate):
            notes.unknown("", None, why_unknown(record, path, estimate))
    verdicts = ", ".join(
        f"{name.replace('_', ' ')} {control.verdict.replace('_', ' ')}"
        for name, control in control_items(record)
        if name in quantity.controls
    )
    body, figure = frame(
        9.0,
        3.6,
        _titled(f"Step {record.step}. {quantity.title}", record),
        quantity.read.replace("The column of an audit sums", "The values sum")
        .replace(
            "Red adds, blue takes away; one strong row is a localized change, even rows a spread one.",
            "One high point is a localized change, an even curve a spread one.",
        )
        .replace(
            "Red blocks raise the margin of chosen over rejected, blue ones lower it; the dot is the peak layer. "
            "Blue rows that appear late are blocks that work against the others.",
            "Blocks above 0 raise the margin of chosen over rejected, those below lower it; the peak layer is ringed.",
        ),
        _failed([record], quantity.controls),
        [*notes.lines("step"), f"Controls: {verdicts}."],
    )
    axes = body.subplots()
    positions = list(range(first, first + len(cells)))
    estimates = [estimate for _, estimate in cells]
    axes.axhline(0, color=GREY, linewidth=0.8)
    if all(is_unknown(estimate) for estimate in estimates):
        fill_unknown(axes, "not known (reason below)")
    else:
        inside = slice(1 if quantity.below else 0, len(cells) - (1 if quantity.above else 0))
        for part, mark in ((inside, "o"), (slice(0, inside.start), "D"), (slice(inside.stop, None), "D")):
            chosen = estimates[part]
            if chosen:
                axes.errorbar(
                    positions[part],
                    [e.mean for e in chosen],
                    yerr=bars(chosen),
                    color=BLUE,
                    marker=mark,
                    markersize=5,
                    linewidth=1.4 if mark == "o" else 0,
                    elinewidth=1.1,
                    capsize=2.5,
                    zorder=3,
                    label=f"{quantity.field.replace('_', ' ')}, with interval" if part is inside else None,
                )
        hatch(axes, positions, [index for index, estimate in enumerate(estimates) if is_unknown(estimate)])
        if quantity.field == "recovery":
            axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
            _draw_noise(axes, record)
        if quantity.peak and record.patching is not None and record.patching.peak_layer is not None:
            peak = record.patching.peak_layer
            axes.scatter(
                [peak],
                [record.patching.block_transplant[peak].mean],
                s=130,
                facecolors="none",
                edgecolors=INK,
                linewidths=1.4,
                zorder=4,
                label=f"peak layer {peak}",
            )
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
    layer_axis(axes, count, "x", embedding=bool(quantity.below), head=bool(quantity.above))
    axes.set_xlim(positions[0] - 0.5, positions[-1] + 0.5)
    axes.set_xlabel("layer")
    axes.set_ylabel(quantity.unit.replace(" (", "\n("))
    return figure


def _draw_noise(axes: Axes, record: AuditRecord) -> None:
    """What noise as large as the policy's change recovers: the curve the real one must clear."""
    control, shift = record.controls.noise, record.margins.shift
    if control.effect is None or not abs(shift.mean) > 0:
        return
    shares = [
        Estimate(
            mean=e.mean / shift.mean,
            low=min(e.low / shift.mean, e.high / shift.mean),
            high=max(e.low / shift.mean, e.high / shift.mean),
        )
        for e in control.effect
    ]
    failed = control.verdict == "failed"
    axes.errorbar(
        range(len(shares)),
        [e.mean for e in shares],
        yerr=bars(shares),
        color=RED if failed else GREY,
        marker="x",
        markersize=5,
        linewidth=1.1,
        linestyle="--",
        elinewidth=0.9,
        capsize=2,
        zorder=2,
        label="noise of the same size" + (" (control failed)" if failed else ""),
    )


# --- low rank ---------------------------------------------------------------------------------------------------------


def _draw_low_rank(axes: Axes, curve: LowRankCurve) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.axhline(0.95, color=GREY, linewidth=0.8, linestyle=":")
    axes.errorbar(
        curve.ranks,
        [estimate.mean for estimate in curve.effect_fraction],
        yerr=bars(curve.effect_fraction),
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=1.6,
        capsize=2.5,
        label="share of the effect",
        zorder=3,
    )
    axes.plot(
        curve.ranks,
        curve.explained_variance_ratio,
        color=ORANGE,
        marker="s",
        markersize=4,
        linewidth=1.2,
        linestyle="--",
        label="explained variance",
        zorder=2,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve.ranks, [str(k) for k in curve.ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    unknown = [index for index, estimate in enumerate(curve.effect_fraction) if is_unknown(estimate)]
    hatch(axes, [float(k) for k in curve.ranks], unknown, log=True)


def _random_subspace(record: AuditRecord) -> tuple[str, int, list[int], list[Estimate]] | None:
    """Basis, layer, ranks and shares of the random-subspace control: its effects (nats) over that layer's full effect.

    The control belongs to the shift basis (else the first) at the peak layer (else the lowest measured one).
    """
    effect = record.controls.random_subspace.effect
    basis = "shift" if record.low_rank.get("shift") else next((b for b, c in record.low_rank.items() if c), None)
    if not effect or basis is None:
        return None
    by_layer = record.low_rank[basis]
    peak = record.patching.peak_layer if record.patching is not None else None
    layer = peak if peak is not None and peak in by_layer else min(by_layer)
    curve = by_layer[layer]
    full = curve.full_effect.mean
    if len(effect) != len(curve.ranks) or math.isnan(full) or full == 0:
        return None
    shares = []
    for estimate in effect:
        low, high = sorted((estimate.low / full, estimate.high / full))
        shares.append(Estimate(mean=estimate.mean / full, low=low, high=high))
    return basis, layer, curve.ranks, shares


def _low_rank_map(
    record: AuditRecord,
    curves: Mapping[str, Mapping[int, LowRankCurve]],
    layers: Sequence[int],
    title: str,
    warnings: Sequence[str],
) -> Figure:
    """Many layers: a map of layer by rank instead of a panel for each."""
    import numpy as np

    read = "Dark red is the whole effect. The ring marks rank 95: from there on every rank keeps 95 % of it."
    notes = []
    height = min(max(1.6 + 0.19 * len(layers), 3.2), 9.0)
    control = record.controls.random_subspace
    footers = [f"Random subspaces: {control.verdict.replace('_', ' ')}, {control.reason}."]
    grids = {}
    for basis, by_layer in curves.items():
        ranks = sorted({k for curve in by_layer.values() for k in curve.ranks})
        grid = np.full((len(layers), len(ranks)), math.nan)
        for layer, curve in by_layer.items():
            for k, estimate in zip(curve.ranks, curve.effect_fraction, strict=True):
                grid[layers.index(layer), ranks.index(k)] = estimate.mean
                if is_unknown(estimate):
                    notes.append(why_unknown(record, f"low_rank.{basis}.{layer}.effect_fraction", estimate))
        grids[basis] = ranks, grid
    if any(np.isnan(grid).any() for _, grid in grids.values()):
        notes.append("not measured")
    if notes:
        footers.insert(0, f"Hatched is not known: {'; '.join(dict.fromkeys(notes))}.")
    body, figure = frame(4.2 * len(curves) + 1.0, height, title, read, warnings, footers)
    panels = body.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (basis, (ranks, grid)) in zip(panels, grids.items(), strict=True):
        axes.set_facecolor(UNKNOWN)
        axes.patch.set(hatch="////", edgecolor="#a8a8a8")
        image = axes.imshow(
            np.ma.masked_invalid(grid),
            origin="lower",
            aspect="auto",
            cmap=DIVERGING,
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        rings = [
            (ranks.index(int(curve.rank_95)), layers.index(layer))
            for layer, curve in curves[basis].items()
            if not is_unknown(curve.rank_95)
        ]
        if rings:
            axes.scatter(*zip(*rings, strict=True), s=26, facecolors="none", edgecolors="white", linewidths=1.3)
        axes.set_title(f"{basis} basis", loc="left", fontweight="bold")
        axes.set_xticks(range(len(ranks)), [str(k) for k in ranks])
        axes.set_xlabel("rank k")
    every = max(1, math.ceil(len(layers) / 16))
    ticks = list(range(0, len(layers), every))
    panels[0].set_yticks(ticks, [str(layers[index]) for index in ticks])
    panels[0].set_ylabel("layer")
    bar = body.colorbar(image, ax=list(panels), extend="both", pad=0.01, aspect=30)
    bar.set_label("share of the layer's effect")
    bar.outline.set_visible(False)
    return figure


# --- pieces -----------------------------------------------------------------------------------------------------------


def _some(records: Sequence[AuditRecord]) -> list[AuditRecord]:
    found = one_per_step(records)
    if not found:
        raise ValueError("no records to draw; expected at least one audit")
    return found


def _titled(title: str, record: AuditRecord) -> str:
    """The title, with the name of the probe set where it has one."""
    name = record.provenance.probe_name
    return title if name is None else f"Probes {name!r}. {title}"


def _not_measured(record: AuditRecord, part: str) -> str:
    return why_unknown(record, part)


def _failed(records: Sequence[AuditRecord], names: Sequence[str]) -> list[str]:
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


def _draw_alerts(axes: Axes, alerts: Sequence[Alert], rules: Sequence[str]) -> None:
    for level, (mark, colour) in LEVEL_MARKS.items():
        found = [alert for alert in alerts if alert.level == level]
        if found:
            axes.scatter(
                [a.step for a in found],
                [rules.index(a.rule) for a in found],
                marker=mark,
                color=colour,
                s=32,
                linewidths=0,
                label=level,
                zorder=3,
            )
    for row in range(len(rules)):
        axes.axhline(row, color=PALE, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_ylim(len(rules) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", bottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("alerts", loc="left", fontsize=8.5, fontweight="bold", pad=3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
