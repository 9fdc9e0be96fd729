"""The two pictures that TensorBoard shows by default: 640 × 420 pixels, few words, large ones, limits drawn.

The title of each states what it shows, with its numbers: whoever sees nothing else has read the finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align_audit.record.audit_record import AuditRecord
from align_audit.record.numbers import is_unknown
from align_audit.record.stored_records import Head
from align_audit.writers.plots.canvas import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, bars, styled, wrap
from align_audit.writers.standing import Standing, figure, limit_of, where_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 640, 420
"""Pixels, at 100 dots an inch."""

_TITLE, _LABEL, _TICK = 17, 16, 13
"""Sizes of letters, in points."""
_COLUMNS = 43
"""Letters of a title that fit in a line."""
_COLOURS = {"HEALTHY": GREEN, "WATCH": ORANGE, "ERROR": RED, "BLIND": PURPLE}


@styled
def health_at_a_glance(heads: Sequence[Head], standing: Standing) -> Figure:
    """KL to the reference and the fall of the chosen completions over steps, with the limits of warnings and errors.

    Args:
        heads: of the records of one probe set, one a step, by step; the last is of ``standing``.
    """
    drawing, title = _canvas()
    top, bottom = drawing.subplots(2, 1, sharex=True)
    steps = [head.step for head in heads]
    for axes, name, field, sign, option in (
        (top, "KL", "kl", 1.0, "kl"),
        (bottom, "chosen", "chosen_logp_change_per_token", -1.0, "chosen_drop"),
    ):
        values = [getattr(head, field).mean for head in heads]
        axes.plot(steps, values, "-o", color=BLUE, linewidth=2.5, markersize=6 if len(steps) < 40 else 0)
        axes.axhline(0.0, color=GREY, linewidth=1, linestyle=":")
        limits = [limit_of(standing.record, f"{option}_{level}") for level in ("warning", "error")]
        for limit, colour in zip(limits, (ORANGE, RED), strict=True):
            if limit is not None:
                axes.axhline(sign * limit, color=colour, linewidth=2, linestyle="--")
        _reach(axes, [*values, *(sign * limit * 1.15 for limit in limits[:1] if limit is not None)])
        _dress(axes, name)
    bottom.set_xlabel("step", fontsize=_LABEL)
    drawing.align_ylabels([top, bottom])
    margins = standing.record.margins
    said = f"{standing.status.word}: KL {figure(margins.kl.mean)}"
    limit = standing.limit("kl")
    said += "" if limit is None else f" (limit {limit:.3g})"
    said += f", chosen {figure(margins.chosen_logp_change_per_token.mean, signed=True)}"
    title(said, _COLOURS[standing.status.word] if standing.status.word != "HEALTHY" else INK)
    return drawing


@styled
def where_at_a_glance(record: AuditRecord) -> Figure:
    """What each layer adds to the margin shift, in per cent of it, with intervals; those of a claim, or the peak, in colour.

    Args:
        record: with patching.
    """
    drawing, title = _canvas()
    axes = drawing.subplots()
    patching = record.patching
    assert patching is not None
    gains = patching.layer_gain
    marked = record.finding.layers if record.finding is not None and record.finding.localized else [patching.peak_layer]
    measured = [layer for layer, gain in enumerate(gains) if not is_unknown(gain)]
    means = [gains[layer].mean * 100 for layer in measured]
    colours = [BLUE if layer in marked else GREY for layer in measured]
    axes.bar(measured, means, color=colours, width=0.8)
    lengths = [[100 * end for end in side] for side in bars([gains[layer] for layer in measured])]
    axes.errorbar(measured, means, yerr=lengths, fmt="none", ecolor=INK, elinewidth=1.5)
    axes.axhline(0.0, color=GREY, linewidth=1)
    every = max(1, math.ceil(len(gains) / 9))
    axes.set_xticks(range(0, len(gains), every))
    axes.set_xlim(-0.7, len(gains) - 0.3)
    _dress(axes, "% of shift")
    axes.set_xlabel("layer", fontsize=_LABEL)
    words = where_in_words(record, record.step)
    title(words[0].upper() + words[1:], INK)
    return drawing


def drawable(record: AuditRecord) -> bool:
    """Is anything known of its layers?"""
    return record.patching is not None and any(not is_unknown(gain) for gain in record.patching.layer_gain)


def _canvas() -> tuple[Figure, Any]:
    """An empty figure, and a function that titles it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(drawing)

    def title(words: str, colour: str) -> None:
        drawing.suptitle(wrap(words, _COLUMNS), fontsize=_TITLE, fontweight="bold", color=colour, x=0.02, ha="left")

    return drawing, title


def _dress(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=_LABEL)
    axes.tick_params(labelsize=_TICK)
    axes.locator_params(axis="y", nbins=4)


def _reach(axes: Axes, values: Sequence[float]) -> None:
    """An axis that holds these and zero, with some room."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    room = 0.08 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
