"""What the pictures share: colours, the frame with its title, warnings and footnotes, and marks for what is unknown."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from align_audit.errors import counted, plural
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import span

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE, UNKNOWN = "#222222", "#6f6f6f", "#e9e9e9", "#dcdcdc"
LEVEL_MARKS = {"info": ("o", BLUE), "warning": ("^", ORANGE), "error": ("X", RED)}
VERDICT_COLOURS = {"passed": "#7cc7ae", "failed": RED, "not_run": PALE}
DIVERGING = "RdBu_r"

STYLE: dict[str, Any] = {
    # A user's own style (dark notebooks, other fonts) would break the colours chosen here.
    "axes.edgecolor": GREY,
    "axes.facecolor": "white",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}

_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """Draws in our style, whatever the user's own is, and leaves that as it was."""

    @functools.wraps(draw)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def frame(
    width: float,
    height: float,
    title: str,
    read: str,
    warnings: Sequence[str] = (),
    footers: Sequence[str] = (),
) -> tuple[SubFigure, Figure]:
    """A figure of a header (title, how to read it, warnings), a body of the given size in inches, and footnotes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = textwrap.wrap(title, int(width * 10.8))
    reads = textwrap.wrap(read, int(width * 14.5))
    warned = [line for warning in warnings for line in textwrap.wrap(warning, int(width * 13.3))]
    head = 0.12 + 0.21 * len(titles) + 0.165 * len(reads) + 0.185 * len(warned)
    notes = [line for text in footers for line in textwrap.wrap(text, int(width * 15))]
    foot = 0.08 + 0.15 * len(notes)

    figure = Figure(figsize=(width, head + height + foot), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(3, 1, height_ratios=[head, height, foot])
    header, body, footer = parts
    y = 1 - 0.08 / head
    for lines, step, style in (
        (titles, 0.21, {"fontsize": 11, "fontweight": "bold"}),
        (reads, 0.165, {"fontsize": 8.5, "color": GREY}),
        (warned, 0.185, {"fontsize": 9, "color": RED, "fontweight": "bold"}),
    ):
        for line in lines:
            header.text(0.1 / width, y, line, va="top", ha="left", **style)
            y -= step / head
    for index, line in enumerate(notes):
        footer.text(0.1 / width, 1 - 0.15 * index / foot, line, va="top", ha="left", fontsize=8, color=GREY)
    return body, figure


def nothing(title: str, why: str) -> Figure:
    """In place of a picture: that there is none, and why."""
    body, figure = frame(9.0, 1.6, title, "")
    axes = body.subplots()
    fill_unknown(axes, wrap(f"not measured: {why}", 90))
    return figure


def pixels(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as an RGB image, ``uint8`` of shape (height, width, 3)."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context(STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@dataclass
class Notes:
    """Collects what is unknown and why, to be said once."""

    places: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(What, why) → where."""

    def unknown(self, what: str, where: int | None, reason: str) -> None:
        """Note that ``what`` is not known at a layer or step (None: throughout)."""
        places = self.places.setdefault((what, reason), [])
        if where is not None:
            places.append(where)

    def lines(self, unit: str) -> list[str]:
        """A sentence for each, places contracted; ``unit`` is what they are, as "layer"."""
        said = []
        for (what, reason), places in self.places.items():
            where = f"{plural(unit, len(set(places)))} {span(places)}" if places else ""
            subject = ", ".join(part for part in (what, where) if part)
            said.append(f"Hatched is not known{f' ({subject})' if subject else ''}: {reason}.")
        if len(said) > 4:
            said = [*said[:3], f"… and {counted(len(said) - 3, 'more reason')}, in the record."]
        return said


def number(value: float) -> str:
    """Three digits, or that it is not known."""
    return "not known" if math.isnan(value) else f"{value:.3g}"


def wrap(text: str, width: int) -> str:
    """In lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width))


def fill_unknown(axes: Axes, text: str) -> None:
    """Hatch all of the axes and say why."""
    axes.set_facecolor(UNKNOWN)
    axes.patch.set(hatch="////", edgecolor="#c4c4c4")
    axes.set_yticks([])
    axes.set_xticks([])
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        ha="center",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 6},
    )


def hatch(axes: Axes, positions: Sequence[float], unknown: Sequence[int], log: bool = False) -> None:
    """Hatch the places (indices into ascending positions) whose value is not known, half-way to their neighbours."""

    def between(a: float, b: float) -> float:
        return math.sqrt(a * b) if log else (a + b) / 2

    for index in unknown:
        here = positions[index]
        alone = len(positions) == 1
        below = positions[index - 1] if index else (here / 2 if log else here - 1)
        above = positions[index + 1] if index + 1 < len(positions) else (here * 2 if log else here + 1)
        if not alone and not log:
            # At the ends as wide as on the inner side.
            below = below if index else here - (above - here)
            above = above if index + 1 < len(positions) else here + (here - below)
        axes.axvspan(
            between(below, here),
            between(here, above),
            facecolor=UNKNOWN,
            edgecolor="#a8a8a8",
            hatch="////",
            linewidth=0,
            zorder=0.5,
        )


def heat_cells(axes: Axes, values: np.ndarray, limit: float, origin: Literal["lower", "upper"] = "lower") -> AxesImage:
    """Cells [rows, columns] in red above 0 and blue below, full at ±``limit``; hatched where a value is not known."""
    import numpy as np
    from matplotlib.colors import Normalize

    axes.set_facecolor(UNKNOWN)
    axes.patch.set(hatch="////", edgecolor="#a8a8a8")
    return axes.imshow(
        np.ma.masked_invalid(values),
        origin=origin,
        aspect="auto",
        interpolation="nearest",
        cmap=DIVERGING,
        norm=Normalize(-limit, limit),
    )


def colour_bar(
    body: SubFigure, image: AxesImage, axes: Any, label: str, clipped: bool = False, aspect: int = 30
) -> None:
    """The scale of :func:`heat_cells`, with open ends where values lie ``clipped`` beyond it."""
    bar = body.colorbar(image, ax=axes, extend="both" if clipped else "neither", pad=0.01, aspect=aspect)
    bar.set_label(label)
    bar.outline.set_visible(False)


def bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of error bars below and above each mean, as ``errorbar`` takes them."""
    # A percentile interval may leave out its own mean by a rounding error; bars must not be negative.
    return [[max(e.mean - e.low, 0.0) for e in estimates], [max(e.high - e.mean, 0.0) for e in estimates]]


def layer_axis(axes: Axes, count: int, which: str, embedding: bool = False, head: bool = False) -> None:
    """Ticks of ``count`` layers on the "x" or "y" axis, some left out where they would touch, and names at the ends."""
    every = max(1, math.ceil(count / 20))
    ticks: list[tuple[int, str]] = [(layer, str(layer)) for layer in range(0, count, every)]
    if embedding:
        ticks.insert(0, (-1, "emb."))
    if head:
        if ticks[-1][0] > count - 1 - every / 2 and every > 1 and len(ticks) > 1:
            ticks.pop()
        ticks.append((count, "head"))
    (axes.set_xticks if which == "x" else axes.set_yticks)([p for p, _ in ticks], [label for _, label in ticks])


def draw_band(
    axes: Axes, steps: Sequence[int], estimates: Sequence[Estimate], colour: str, label: str, line: str, mark: str
) -> None:
    """Means over steps; with a ``mark`` (the policy's, not a reference line) also their intervals as a band."""
    means = [estimate.mean for estimate in estimates]
    size = 4.0 if len(steps) <= 40 else 0.0
    axes.plot(
        steps, means, line, color=colour, marker=mark or None, markersize=size, linewidth=1.5, label=label, zorder=3
    )
    if mark:
        lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0, zorder=2)
