"""Recall and lead against false alarms, of all sets of rules, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0b6e4f", "#5aa469", "#9ccc65", "#5b2a86", "#b23a48", "#e07a5f")
DASHES = ("-", "-", (0, (2, 2)))
GREY = "#b0b0b0"


def frontier(points: Sequence[dict[str, Any]], value: str) -> tuple[list[float], list[float]]:
    """Share of healthy runs disturbed, and the most of ``value`` that can be had with at most so many; steps of a stair."""
    best: dict[int, float] = {}
    for point in points:
        if point[value] is not None:
            disturbed = point["false_warnings"]
            best[disturbed] = max(best.get(disturbed, float("-inf")), point[value])
    x, y = [], []
    for disturbed in sorted(best):
        if not y or best[disturbed] > y[-1]:
            x.append(disturbed / max(points[0]["healthy"], 1))
            y.append(best[disturbed])
    return x, y


def draw(curves: Mapping[str, Sequence[dict[str, Any]]], told: Sequence[str], path: Path) -> None:
    """Save the picture.

    Args:
        curves: points of each rule set, as ``curves.curves`` makes them.
        told: the sets that get a colour and a name; the others are grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    recall, lead = figure.subplots(1, 2)
    ordered = [name for name in curves if name not in told] + [name for name in told if name in curves]
    for name in ordered:
        points = curves[name]
        style: dict[str, Any] = {"color": GREY}
        if name in told:
            place = told.index(name)
            # Dashes of unlike lengths, so that curves that lie on each other all show.
            style = {"color": COLOURS[place % len(COLOURS)], "label": name, "linestyle": DASHES[place % len(DASHES)]}
        width = 2.0 if name in told else 0.8
        harmed = max(points[0]["harmed"], 1)
        x, y = frontier(points, "in_time")
        recall.step([*x, 1.0], [value / harmed for value in [*y, y[-1]]], where="post", linewidth=width, **style)
        x, y = frontier(points, "median_lead_share")
        if y:
            lead.step([*x, 1.0], [*y, y[-1]], where="post", linewidth=width, **style)
    recall.set(
        xlabel="share of healthy runs with an alarm", ylabel="share of harmed runs caught in time", ylim=(-0.02, 1.02)
    )
    lead.set(xlabel="share of healthy runs with an alarm", ylabel="median lead, share of the run")
    for axes in (recall, lead):
        axes.set_xlim(-0.01, 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    recall.legend(fontsize=8, loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
