"""Pictures of finer sites: a map of single heads, and curves of attention, MLP and windows of layers, of one audit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord
from align_audit.record.numbers import is_unknown, why_unknown
from align_audit.record.site_curve import SiteCurve
from align_audit.record.site_names import site_name, site_names
from align_audit.writers.plots.canvas import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Notes,
    bars,
    colour_bar,
    frame,
    hatch,
    heat_cells,
    layer_axis,
    nothing,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIGNIFICANT = 0.05
"""Adjusted p-value below which a unit counts as more than chance."""


def site_figures(record: AuditRecord) -> dict[str, Callable[[AuditRecord], Figure]]:
    """By name, how to draw each picture that the record has curves for."""
    figures: dict[str, Callable[[AuditRecord], Figure]] = {
        f"{name}_map": partial(head_map, number=number)
        for number, (name, curve) in enumerate(zip(site_names(record.sites), record.sites, strict=True))
        if curve.site == "head"
    }
    if any(curve.site != "head" for curve in record.sites):
        figures["site_curves"] = site_curves
    return figures


@styled
def head_map(record: AuditRecord, number: int) -> Figure:
    """Sufficiency of every head, layers by heads, of the curve at that place among the record's sites.

    Raises:
        ValueError: that curve is not one of heads.
    """
    import numpy as np

    curve = record.sites[number]
    if curve.site != "head":
        raise ValueError(f"expected a curve of heads at place {number}; found one of {curve.site}")
    layers = sorted({unit.layer for unit in curve.units})
    heads = sorted({unit.head for unit in curve.units if unit.head is not None})
    values = np.full((len(layers), len(heads)), np.nan)
    told: list[tuple[int, int]] = []
    notes = Notes()
    for place, unit in enumerate(curve.units):
        assert unit.head is not None
        row, column = layers.index(unit.layer), heads.index(unit.head)
        estimate, p = curve.sufficiency[place], curve.sufficiency_p_adjusted[place]
        values[row, column] = estimate.mean
        if is_unknown(estimate):
            path = f"sites.{number}.sufficiency.{place}"
            notes.unknown(f"layer {unit.layer}", None, why_unknown(record, path, estimate))
        elif p < _SIGNIFICANT:
            told.append((row, column))
    reason = record.reasons.get(f"sites.{number}.units")
    body, figure = frame(
        9.0,
        min(max(1.6 + 0.27 * len(layers), 3.0), 10.0),
        f"Single heads at step {record.step}: margin moved by one policy head alone inside the reference",
        "Red heads raise the margin of chosen over rejected, blue ones lower it; a dot: told from 0 (p < "
        f"{_SIGNIFICANT:g}, adjusted over heads). A head carries on what reached it in the policy's own run, so a change "
        f"shows in heads above it too: read the lowest strong layer first. {_how(curve)}",
        footers=[*notes.lines("layer"), *([f"Left out: {reason}."] if reason else [])],
    )
    axes = body.subplots()
    finite = np.abs(values[np.isfinite(values)])
    limit = max(float(finite.max()) if finite.size else 0.0, 1e-6)
    colour_bar(body, heat_cells(axes, values, limit), axes, "sufficiency (nats)")
    if told and values.size <= 2048:
        rows, columns = zip(*told, strict=True)
        axes.scatter(columns, rows, s=16, color=INK, edgecolors="white", linewidths=0.6, zorder=3)
    if curve.peak is not None:
        unit = curve.units[curve.peak]
        assert unit.head is not None
        _circle(axes, heads.index(unit.head), layers.index(unit.layer))
    for which, names in (("x", heads), ("y", layers)):
        every = max(1, math.ceil(len(names) / 16))
        ticks = list(range(0, len(names), every))
        (axes.set_xticks if which == "x" else axes.set_yticks)(ticks, [str(names[tick]) for tick in ticks])
    axes.set_xlabel("head (the peak is circled)")
    axes.set_ylabel("layer")
    return figure


def _circle(axes: Axes, column: int, row: int) -> None:
    # White below black: seen on the darkest cells too.
    for colour, width in (("white", 3.2), (INK, 1.4)):
        axes.scatter([column], [row], s=110, facecolors="none", edgecolors=colour, linewidths=width, zorder=4)


@styled
def site_curves(record: AuditRecord) -> Figure:
    """Sufficiency and necessity by layer of attention, MLP and windows of layers, one row each."""
    title = f"Finer sites at step {record.step}: what attention, MLP and blocks move on their own"
    shown = [(number, curve) for number, curve in enumerate(record.sites) if curve.site != "head"]
    if not shown:
        return nothing(title, "the audit patched no attention output, MLP output or block (sites)")
    notes = Notes()
    footers = [
        f"{site_name(curve)}: {reason}."
        for number, curve in shown
        if (reason := record.reasons.get(f"sites.{number}.units"))
    ]
    for number, curve in shown:
        for direction, _, _ in _DIRECTIONS:
            for place, estimate in enumerate(getattr(curve, direction)):
                if is_unknown(estimate):
                    path = f"sites.{number}.{direction}.{place}"
                    reason = why_unknown(record, path, estimate)
                    notes.unknown(f"{site_name(curve)}, {direction}", curve.units[place].layer, reason)
    body, figure = frame(
        9.0,
        max(3.0, 1.9 * len(shown)),
        title,
        "Blue: the policy's site in the reference; orange: the reference's in the policy. A change that matters raises the "
        "margin one way and lowers it the other; bars are intervals over pairs. Attention and MLP carry on what reached "
        "them in their own model's run; a block is its own weights alone.",
        footers=[*footers, *notes.lines("layer")],
    )
    grid = body.subplots(len(shown), 1, sharex=True, squeeze=False)
    for (_, curve), axes in zip(shown, grid[:, 0], strict=True):
        _curve(axes, curve, record.provenance.num_layers)
    grid[0, 0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    grid[-1, 0].set_xlabel("layer (of a window: its first)")
    return figure


_DIRECTIONS: Sequence[tuple[str, str, str]] = (("sufficiency", BLUE, "o"), ("necessity", ORANGE, "s"))


def _curve(axes: Axes, curve: SiteCurve, count: int) -> None:
    layers = [unit.layer for unit in curve.units]
    axes.axhline(0.0, color=GREY, linewidth=0.8, zorder=1)
    for (direction, colour, mark), shift in zip(_DIRECTIONS, (-0.06, 0.06), strict=True):
        estimates = getattr(curve, direction)
        axes.errorbar(
            [layer + shift for layer in layers],
            [estimate.mean for estimate in estimates],
            yerr=bars(estimates),
            color=colour,
            marker=mark,
            markersize=4.5 if count <= 40 else 2.5,
            linewidth=1.2,
            elinewidth=1.0,
            label=direction,
            zorder=3,
        )
    unknown = {
        place for place, e in enumerate(curve.sufficiency) if is_unknown(e) or is_unknown(curve.necessity[place])
    }
    hatch(axes, [float(layer) for layer in layers], sorted(unknown))
    axes.set_title(f"{site_name(curve)}. {_how(curve)}", loc="left", fontsize=8.5)
    axes.set_ylabel("nats")
    axes.set_xlim(-0.5, count - 0.5)
    layer_axis(axes, count, "x")


def _how(curve: SiteCurve) -> str:
    if curve.estimator == "exact":
        return f"Exact, on {curve.exact_pairs} pairs."
    correlations = [value for value in curve.correlation or [] if not math.isnan(value)]
    agreement = f"; correlation to exact effects from {min(correlations):.2f}" if correlations else ""
    words = "By attribution" if curve.estimator == "attribution" else "Exact effects corrected by attribution"
    return f"{words}, {curve.exact_pairs} of {curve.pairs} pairs patched{agreement}."
