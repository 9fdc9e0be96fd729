"""Every picture of a run by its name, from the records alone.

Each function that draws returns a :class:`matplotlib.figure.Figure` that belongs to no window and no global state; save it,
or show it in a notebook. Every picture says what it shows and how to read it. What could not be known is hatched, with
the reason below; what a failed control takes the ground from is said in red above. Colours are those of Okabe and Ito
and a diverging map centred on 0, which the common forms of colour blindness tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Picture:
    """One picture of the audits of a run."""

    part: str
    """The part of a record that it shows; TensorBoard groups it by that."""
    draw: Callable[[Sequence[AuditRecord]], Figure]
    """From the audits so far, one a step, by step."""

    def measured(self, record: AuditRecord) -> bool:
        """Whether an audit has that part; without it, the picture says why there is nothing."""
        return bool(getattr(record, self.part))


def _of_one(part: str, draw: Callable[[AuditRecord], Figure]) -> Picture:
    """A picture of one audit: of the latest that has the part."""
    return Picture(part, lambda records: draw(_latest(records, part)))


def _latest(records: Sequence[AuditRecord], part: str) -> AuditRecord:
    return next((record for record in reversed(records) if getattr(record, part)), records[-1])


PICTURES = {
    "margins_over_steps": Picture("margins", margins_over_steps),
    "recovery_by_layer_and_step": Picture("patching", recovery_by_layer_and_step),
    "layer_gain_by_layer_and_step": Picture("patching", layer_gain_by_layer_and_step),
    "block_transplants": Picture("patching", block_transplants),
    "low_rank_curve": _of_one("low_rank", low_rank_curve),
    "depth_trace": _of_one("spinal", depth_trace),
}
"""Name → picture, but for those of finer sites: see :func:`pictures_of`."""


def pictures_of(records: Sequence[AuditRecord]) -> dict[str, Picture]:
    """Name → picture, with those of the finer sites that these audits have: which ones differs from run to run."""
    sites = site_figures(_latest(records, "sites"))
    return PICTURES | {name: _of_one("sites", draw) for name, draw in sites.items()}


def draw_all(records: Sequence[AuditRecord]) -> dict[str, Figure]:
    """Every picture of a run, by name."""
    records = to_draw(records)
    return {name: picture.draw(records) for name, picture in pictures_of(records).items()}


def save_all(records: Sequence[AuditRecord], directory: str | Path) -> dict[str, Path]:
    """Draw every picture as PNG into a folder (made when absent): name → file. No records: no pictures.

    Depth trace and low-rank curve are those of the latest record that has them. The pictures of a named probe set lie in
    a folder of that name inside, and are called ``<probe name>/<name>``.
    """
    paths = {}
    for probe_name, of_set in by_probe_set(records).items():
        folder = Path(directory) if probe_name is None else Path(directory) / probe_name
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in draw_all(of_set).items():
            key = name if probe_name is None else f"{probe_name}/{name}"
            paths[key] = folder / f"{name}.png"
            figure.savefig(paths[key], dpi=130)
    return paths
