"""Pictures of a run, from its records alone.

Each function returns a :class:`matplotlib.figure.Figure` that belongs to no window and no global state; save it, or
show it in a notebook. Every picture says what it shows and how to read it. What could not be known is hatched, with
the reason below; what a failed control takes the ground from is said in red above. Colours are those of Okabe and Ito
and a diverging map centred on 0, which the common forms of colour blindness tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.record.audit_record import AuditRecord
from align_audit.record.run import by_probe_set
from align_audit.writers.plots.depth import depth_trace
from align_audit.writers.plots.layers import (
    block_transplants,
    layer_gain_by_layer_and_step,
    recovery_by_layer_and_step,
)
from align_audit.writers.plots.low_rank import low_rank_curve
from align_audit.writers.plots.margins import margins_over_steps
from align_audit.writers.plots.sites import site_figures
from align_audit.writers.words import to_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "block_transplants",
    "depth_trace",
    "draw_all",
    "layer_gain_by_layer_and_step",
    "low_rank_curve",
    "margins_over_steps",
    "recovery_by_layer_and_step",
    "save_all",
]


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
    records = to_draw(records)
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
