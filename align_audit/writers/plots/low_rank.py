"""The low-rank curve: the share of a layer's effect by the rank of what is patched.

See :mod:`align_audit.writers.plots.gallery` for what all pictures have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord, LowRankCurve
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import is_unknown, why_unknown
from align_audit.writers.plots.canvas import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    UNKNOWN,
    Notes,
    bars,
    fill_unknown,
    frame,
    hatch,
    nothing,
    number,
    styled,
)
from align_audit.writers.words import failed_controls, overshoot, titled

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@styled
def low_rank_curve(record: AuditRecord) -> Figure:
    """Share of a layer's effect that its best k directions carry, by rank, for each basis and measured layer."""
    title = titled(f"Low-rank reconstruction at step {record.step}: how few directions carry a layer's effect", record)
    curves = {basis: by_layer for basis, by_layer in record.low_rank.items() if by_layer}
    if not curves:
        return nothing(title, why_unknown(record, "low_rank"))
    layers = sorted({layer for by_layer in curves.values() for layer in by_layer})
    control = record.controls.random_subspace
    warnings = failed_controls([record], ("noise", "random_subspace"))
    if len(layers) > 4:
        return _low_rank_map(record, curves, layers, title, warnings)
    read = (
        "A blue curve that reaches 0.95 at a small rank, above random subspaces of the same rank, is a low-rank "
        "change. Explained variance (dashed) may be high where the effect is not."
    )
    body, figure = frame(
        4.6 * len(curves) + 0.6,
        2.5 * len(layers) + 0.3,
        title,
        read,
        warnings,
        [
            f"Random subspaces: {control.verdict.replace('_', ' ')}, {control.reason}.",
            *_overshoot_notes(curves),
            *_low_rank_notes(record, curves),
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
            axes.set_title(f"{name}: {_rank_95_words(by_layer[layer])}", loc="left", fontweight="bold")
            _draw_low_rank(axes, by_layer[layer])
            if random is not None and random[:2] == (basis, layer):
                _draw_random(axes, random[2], random[3], failed=control.verdict == "failed")
    # Fractions of a small effect can run away; the band around 0..1 is what is read.
    shown = [e.mean for by_layer in curves.values() for c in by_layer.values() for e in c.effect_fraction]
    finite = [value for value in shown if not math.isnan(value)] or [0.0]
    panels[0][0].set_ylim(max(min(-0.08, min(finite) - 0.1), -1.0), min(max(1.15, max(finite) + 0.1), 2.0))
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    body.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
    return figure


def _low_rank_notes(record: AuditRecord, curves: Mapping[str, Mapping[int, LowRankCurve]]) -> list[str]:
    """What is not known, and why."""
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
    return [*list(unreached)[:4], *notes.lines("rank")]


def _overshoot_notes(curves: Mapping[str, Mapping[int, LowRankCurve]]) -> list[str]:
    """What to make of curves that go far above 1."""
    notes = []
    for basis, by_layer in curves.items():
        most = {layer: share for layer, curve in by_layer.items() if (share := overshoot(curve)) is not None}
        if most:
            where = f"layer {min(most)}" if len(most) == 1 else f"{len(most)} layers"
            notes.append(
                f"In the {basis} basis the share reaches {number(max(most.values()))} ({where}): what is left out of the "
                "stream moves the margin more than what is patched. Its rank 95 is no evidence of a low-rank change."
            )
    return notes


def _rank_95_words(curve: LowRankCurve) -> str:
    if is_unknown(curve.rank_95):
        return "rank 95 not known"
    return f"rank 95 is {curve.rank_95:.0f}" + ("" if overshoot(curve) is None else ", overshoots")


def _draw_random(axes: Axes, ranks: Sequence[int], estimates: Sequence[Estimate], *, failed: bool) -> None:
    axes.errorbar(
        ranks,
        [estimate.mean for estimate in estimates],
        yerr=bars(estimates),
        color=GREY,
        marker="x",
        markersize=5,
        linewidth=1,
        capsize=2,
        label="random subspaces" + (" (control failed)" if failed else ""),
    )


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
    if not is_unknown(curve.rank_95):
        axes.axvline(curve.rank_95, color=GREEN, linewidth=1.4, zorder=1, label="rank 95")
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

    read = (
        "Dark red is the whole effect. The ring marks rank 95: from there on each rank keeps 95 % of it, none far more."
    )
    control = record.controls.random_subspace
    footers = [f"Random subspaces: {control.verdict.replace('_', ' ')}, {control.reason}."]
    grids, reasons = {}, []
    for basis, by_layer in curves.items():
        ranks = sorted({k for curve in by_layer.values() for k in curve.ranks})
        grid = np.full((len(layers), len(ranks)), math.nan)
        for layer, curve in by_layer.items():
            for k, estimate in zip(curve.ranks, curve.effect_fraction, strict=True):
                grid[layers.index(layer), ranks.index(k)] = estimate.mean
                if is_unknown(estimate):
                    reasons.append(why_unknown(record, f"low_rank.{basis}.{layer}.effect_fraction", estimate))
        grids[basis] = ranks, grid
    footers += _overshoot_notes(curves)
    if any(np.isnan(grid).any() for _, grid in grids.values()):
        reasons.append("not measured")
    if reasons:
        footers.insert(0, f"Hatched is not known: {'; '.join(dict.fromkeys(reasons))}.")
    height = min(max(1.6 + 0.19 * len(layers), 3.2), 9.0)
    body, figure = frame(4.2 * len(curves) + 1.0, height, title, read, warnings, footers)
    panels = body.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (basis, (ranks, grid)) in zip(panels, grids.items(), strict=True):
        image = _draw_low_rank_map(axes, curves[basis], layers, ranks, grid)
        axes.set_title(f"{basis} basis", loc="left", fontweight="bold")
    every = max(1, math.ceil(len(layers) / 16))
    ticks = list(range(0, len(layers), every))
    panels[0].set_yticks(ticks, [str(layers[index]) for index in ticks])
    panels[0].set_ylabel("layer")
    bar = body.colorbar(image, ax=list(panels), extend="both", pad=0.01, aspect=30)
    bar.set_label("share of the layer's effect")
    bar.outline.set_visible(False)
    return figure


def _draw_low_rank_map(
    axes: Axes, curves: Mapping[int, LowRankCurve], layers: Sequence[int], ranks: Sequence[int], grid: np.ndarray
) -> AxesImage:
    """The shares [layers, ranks] of one basis, with a ring at each layer's rank 95."""
    import numpy as np

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
        for layer, curve in curves.items()
        if not is_unknown(curve.rank_95) and overshoot(curve) is None
    ]
    if rings:
        columns, rows = zip(*rings, strict=True)
        axes.scatter(columns, rows, s=26, facecolors="none", edgecolors="white", linewidths=1.3)
    axes.set_xticks(range(len(ranks)), [str(k) for k in ranks])
    axes.set_xlabel("rank k")
    return image
