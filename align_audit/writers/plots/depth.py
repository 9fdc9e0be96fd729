"""The depth trace: contraction and transport of both models by layer.

See :mod:`align_audit.writers.plots.gallery` for what all pictures have in common.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord, DepthTrace, Spinal
from align_audit.record.numbers import why_unknown
from align_audit.writers.plots.canvas import (
    BLUE,
    GREY,
    ORANGE,
    Notes,
    frame,
    hatch,
    layer_axis,
    nothing,
    number,
    styled,
)
from align_audit.writers.words import titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def depth_trace(record: AuditRecord) -> Figure:
    """Contraction and transport by layer and against each other, policy and reference, terminal block shaded."""
    title = titled(
        f"SPINAL depth trace at step {record.step}: how the streams of policy and reference change with depth", record
    )
    spinal = record.spinal
    if spinal is None:
        return nothing(title, why_unknown(record, "spinal"))
    read = (
        "Steeper spectra (higher contraction) and shorter steps (lower transport) in the shaded terminal block, "
        "against the reference, are the signature of alignment; a policy that zigzags where the reference is smooth "
        "is not."
    )
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
    body, figure = frame(10.0, 5.2, title, read, footers=[f"{summary}; {rows}.", *_unknown(record, spinal)])
    grid = body.add_gridspec(2, 2, width_ratios=[1.15, 1.0])
    upper, lower, plane = (
        body.add_subplot(grid[0, 0]),
        body.add_subplot(grid[1, 0]),
        body.add_subplot(grid[:, 1]),
    )
    for axes, name in ((upper, "contraction"), (lower, "transport")):
        _draw_by_layer(axes, spinal, name, record.provenance.num_layers)
    upper.set_ylabel("contraction α\n(slope of log σ)")
    lower.set_ylabel("transport\n(radians)")
    lower.set_xlabel("layer")
    upper.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    upper.set_title("terminal block shaded", loc="right", color=GREY, fontsize=8)
    _draw_path(plane, spinal)
    return figure


def _models(spinal: Spinal) -> tuple[tuple[str, DepthTrace, str, str], ...]:
    """Name, trace, colour and mark; the policy lies on top."""
    return ("reference", spinal.reference, ORANGE, "s"), ("policy", spinal.policy, BLUE, "o")


def _unknown(record: AuditRecord, spinal: Spinal) -> list[str]:
    """What is NaN, and why."""
    notes = Notes()
    for model, trace in (("policy", spinal.policy), ("reference", spinal.reference)):
        for name, values in (("contraction", trace.contraction), ("transport", trace.transport)):
            for layer, value in enumerate(values):
                if math.isnan(value):
                    notes.unknown(name, layer, why_unknown(record, f"spinal.{model}.{name}.{layer}"))
    return notes.lines("layer")


def _draw_by_layer(axes: Axes, spinal: Spinal, name: str, count: int) -> None:
    """Contraction or transport with its standard error, of both models over ``count`` layers."""
    import numpy as np

    terminal, models = spinal.terminal_layers, _models(spinal)
    size = 4.5 if count <= 16 else 3.0
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
        error = 1.96 * np.array(getattr(trace, f"{name}_stderr"))
        if len(error):  # older records do not have that of transport
            axes.fill_between(
                range(len(curve)), curve - error, curve + error, color=colour, alpha=0.2, linewidth=0, zorder=2
            )
    unknown = [
        layer
        for layer in range(len(getattr(spinal.policy, name)))
        if any(math.isnan(getattr(trace, name)[layer]) for _, trace, _, _ in models)
    ]
    hatch(axes, list(range(count)), unknown)
    layer_axis(axes, count, "x")
    axes.set_xlim(-0.5, count - 0.5)


def _draw_path(plane: Axes, spinal: Spinal) -> None:
    """Transport against contraction, layer by layer; the terminal block in bold."""
    import numpy as np

    inner = [layer for layer in spinal.terminal_layers if layer < len(spinal.policy.transport)]
    for label, trace, colour, mark in _models(spinal):
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
