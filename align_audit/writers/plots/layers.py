"""Pictures of per-layer patching effects over the audits of a run, or of one audit with its intervals.

See :mod:`align_audit.writers.plots.gallery` for what all pictures have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord, control_items
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import is_unknown, why_unknown
from align_audit.writers.plots.canvas import (
    BLUE,
    GREY,
    INK,
    RED,
    VERDICT_COLOURS,
    Notes,
    bars,
    colour_bar,
    fill_unknown,
    frame,
    hatch,
    heat_cells,
    layer_axis,
    nothing,
    styled,
)
from align_audit.writers.words import failed_controls, titled, to_draw

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
            read_once="The curve climbs to 1 by construction. Read where it climbs, not how high it stands: that is the "
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
            read_once="The values sum to 1. One high point is a localized change, an even curve a spread one.",
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
            read_once="Blocks above 0 raise the margin of chosen over rejected, those below lower it; the peak layer is "
            "ringed.",
            unit="block transplant (nats)",
            controls=("noise", "reverse", "identity", "split_half"),
            below="embedding_transplant",
            above="head_transplant",
            least_limit=0.1,
            peak=True,
        ),
    )


@dataclass(frozen=True)
class _Quantity:
    """One per-layer estimate of ``Patching`` and how it is shown."""

    field: str
    title: str
    read: str
    """How to read the map over audits."""
    read_once: str
    """How to read the curve of one audit."""
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
            nothing = Estimate.unknown(why_unknown(record, "patching"))
            return [(f"patching.{name}", nothing) for name in names]
        rows = [(f"{self.field}.{layer}", estimate) for layer, estimate in enumerate(getattr(patching, self.field))]
        below = [(self.below, getattr(patching, self.below))] if self.below else []
        above = [(self.above, getattr(patching, self.above))] if self.above else []
        return [(f"patching.{name}", estimate) for name, estimate in [*below, *rows, *above]]


def _by_layer_and_step(records: Sequence[AuditRecord], quantity: _Quantity) -> Figure:
    records = to_draw(records)
    # A folder that was used for another model before holds columns of another height.
    records = [record for record in records if record.provenance.num_layers == records[-1].provenance.num_layers]
    if all(record.patching is None for record in records):
        return nothing(titled(quantity.title, records[-1]), why_unknown(records[-1], "patching"))
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
        titled(quantity.title, records[-1]),
        quantity.read,
        failed_controls(records, quantity.controls),
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
        _write_cells(axes, values, limit)
    if quantity.peak:
        _mark_peaks(axes, records, offset=1 if quantity.below else 0)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    _verdict_strip(strip, records)
    return figure


def _write_cells(axes: Axes, values: np.ndarray, limit: float) -> None:
    """The numbers of a map [rows, columns] in its cells, white where the cell is dark."""
    import numpy as np

    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.2f}" if limit < 10 else f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if abs(value) > 0.6 * limit else INK,
            )


def _mark_peaks(axes: Axes, records: Sequence[AuditRecord], offset: int) -> None:
    """A dot at each audit's peak layer, which stands ``offset`` rows above its number."""
    peaks = [
        (index, record.patching.peak_layer + offset)
        for index, record in enumerate(records)
        if record.patching is not None and record.patching.peak_layer is not None
    ]
    if not peaks:
        return
    small = len(records) > 60
    # In annotated cells the dot moves aside to leave the number readable.
    aside = 0.36 if len(records) <= 8 else 0.0
    axes.scatter(
        [x - aside for x, _ in peaks],
        [y for _, y in peaks],
        s=6 if small else 22,
        color=INK,
        edgecolors="white",
        linewidths=0.3 if small else 0.8,
        zorder=4,
    )


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
        titled(f"Step {record.step}. {quantity.title}", record),
        quantity.read_once,
        failed_controls([record], quantity.controls),
        [*notes.lines("step"), f"Controls: {verdicts}."],
    )
    axes = body.subplots()
    first = -1 if quantity.below else 0
    positions = list(range(first, first + len(cells)))
    axes.axhline(0, color=GREY, linewidth=0.8)
    if all(is_unknown(estimate) for _, estimate in cells):
        fill_unknown(axes, "not known (reason below)")
    else:
        _draw_profile(axes, record, quantity, positions, [estimate for _, estimate in cells])
    count = record.provenance.num_layers
    layer_axis(axes, count, "x", embedding=bool(quantity.below), head=bool(quantity.above))
    axes.set_xlim(positions[0] - 0.5, positions[-1] + 0.5)
    axes.set_xlabel("layer")
    axes.set_ylabel(quantity.unit.replace(" (", "\n("))
    return figure


def _draw_profile(
    axes: Axes, record: AuditRecord, quantity: _Quantity, positions: Sequence[int], estimates: Sequence[Estimate]
) -> None:
    """A line through the layers, embedding and head apart from it, and what the quantity is to be compared with."""
    inside = slice(1 if quantity.below else 0, len(estimates) - (1 if quantity.above else 0))
    for part, mark in ((inside, "o"), (slice(0, inside.start), "D"), (slice(inside.stop, None), "D")):
        if estimates[part]:
            axes.errorbar(
                positions[part],
                [e.mean for e in estimates[part]],
                yerr=bars(estimates[part]),
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
