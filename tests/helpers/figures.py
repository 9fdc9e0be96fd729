"""Figures looked into: what is written, drawn and barred in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from align_audit.record.audit_record import AuditRecord, Control

FAILED = Control(verdict="failed", reason="noise does the same")


def texts(figure: Figure) -> str:
    """All that is written in a figure, lines joined as they were before wrapping."""
    return " ".join(artist.get_text() for artist in figure.findobj(Text) if artist.get_text())


def main_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def heat(figure: Figure) -> np.ma.MaskedArray[Any, Any]:
    return np.ma.asarray(main_axes(figure).images[0].get_array())


def error_bars(axes: Axes) -> dict[str, list[tuple[float, float, float, float]]]:
    """Label → (x, mean, low, high) of each point with a bar."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line, _, (bars,) = container.lines
        points = zip(*line.get_data(), bars.get_segments(), strict=True)
        found.setdefault(container.get_label(), []).extend(
            (float(x), float(y), float(segment[0, 1]), float(segment[1, 1])) for x, y, segment in points
        )
    return found


def broken(record: AuditRecord, **controls: Control) -> AuditRecord:
    return record.model_copy(update={"controls": record.controls.model_copy(update=controls)})
