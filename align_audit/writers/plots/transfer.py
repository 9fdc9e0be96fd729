"""Pictures of a transfer record: a heat map for each basis and layer. The style is that of the other pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.record.audit_record import Estimate
from align_audit.record.numbers import is_unknown
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.plots.canvas import GREY, INK, colour_bar, frame, heat_cells, styled
from align_audit.writers.words import overlap_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_transfer(record: TransferRecord, directory: str | Path) -> dict[str, Path]:
    """Draw each matrix as PNG into a folder (made when absent): name → file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for basis, by_layer in record.cells.items():
        for layer in by_layer:
            name = f"transfer_{basis}_layer_{layer:02d}"
            paths[name] = directory / f"{name}.png"
            transfer_matrix(record, basis, layer).savefig(paths[name], dpi=130)
    return paths


@styled
def transfer_matrix(record: TransferRecord, basis: str, layer: int) -> Figure:
    """Share of each set's effect that each set's subspace carries, one panel a rank, random subspaces in the last row.

    Raises:
        KeyError: the record has no such basis or layer.
    """
    import numpy as np

    names, ranks = record.probe_names, record.ranks
    matrix = record.cells[basis][layer]
    random = record.random.get(basis, {}).get(layer, {})
    rows = [*names, *(["random"] if random else [])]
    values = np.full((len(ranks), len(rows), len(names)), math.nan)
    words: dict[tuple[int, int, int], tuple[Estimate, bool | None]] = {}
    reasons: list[str] = []
    for place in range(len(ranks)):
        for row, fitted in enumerate(rows):
            for column, patched in enumerate(names):
                beats = None
                if row < len(names):
                    share = matrix[fitted][patched].effect_fraction[place]
                    beats = matrix[fitted][patched].beats_random[place]
                elif patched in random:
                    share = random[patched].effect_fraction[place]
                else:
                    share = Estimate.unknown("no random subspaces were patched on this set")
                values[place, row, column] = share.mean
                words[place, row, column] = share, beats
                if is_unknown(share) and share.reason:
                    what = "column" if row < len(names) else "random subspaces on"
                    reasons.append(f"{what} {patched}: {share.reason}")
    cell = (0.95, 0.56)
    most = max(1, int(12.5 / (cell[0] * len(names) + 0.3)))
    down = math.ceil(len(ranks) / most)
    across = math.ceil(len(ranks) / down)  # rows of panels of about the same length
    longest = max(len(name) for name in rows)
    width = max(7.5, across * (cell[0] * len(names) + 0.3) + 0.085 * longest + 1.3)
    height = down * (cell[1] * len(rows) + 0.62) + 0.15
    notes = [f"{note}." for note in overlap_notes(record)]
    if reasons:
        notes.append(f"Hatched is not known: {'; '.join(dict.fromkeys(reasons))}.")
    body, figure = frame(
        width,
        height,
        f"Transfer at layer {layer}, {basis} basis, step {record.step}: does one set's subspace carry another's effect?",
        "Each cell: share of the full patch's effect on the column's pairs that the row's subspace carries, and its "
        "interval. Off the diagonal dark red is transfer and white is none. Italics: random subspaces of that rank do "
        "as well, so it shows nothing.",
        footers=notes,
    )
    panels = body.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    known = values[np.isfinite(values)]
    limit = float(min(max(1.0, np.abs(known).max() if known.size else 1.0), 2.0))
    image = None
    for place, axes in enumerate(panels.flat):
        if place >= len(ranks):
            axes.set_visible(False)
            continue
        image = heat_cells(axes, values[place], limit, origin="upper")
        _annotate(axes, place, rows, names, words, limit)
        axes.set_title(f"rank {ranks[place]}", loc="left", fontweight="bold")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(rows)), [name if row < len(names) else "random" for row, name in enumerate(rows)])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if random:
            axes.axhline(len(names) - 0.5, color=INK, linewidth=1.0)
        if place % across == 0:
            axes.set_ylabel("subspace fitted on")
        if place // across == down - 1 or place + across >= len(ranks):
            axes.set_xlabel("patched on")
            axes.tick_params(labelbottom=True)
    assert image is not None
    beyond = bool(known.size and np.abs(known).max() > limit)
    colour_bar(body, image, panels, "share of the effect", beyond, aspect=18)
    return figure


def _annotate(
    axes: Axes,
    place: int,
    rows: list[str],
    names: list[str],
    words: dict[tuple[int, int, int], tuple[Estimate, bool | None]],
    limit: float,
) -> None:
    from matplotlib.patches import Rectangle

    for row in range(len(rows)):
        for column in range(len(names)):
            share, beats = words[place, row, column]
            if is_unknown(share):
                continue
            dark = abs(share.mean) > 0.6 * limit
            quiet = beats is False
            pale = abs(share.mean) < 0.2 * limit  # on a stronger colour grey could not be read
            colour = "white" if dark else GREY if quiet and pale else INK
            style = "italic" if quiet else "normal"
            axes.text(
                column, row - 0.12, f"{share.mean:.2f}", ha="center", va="center", fontsize=9.5, color=colour,
                fontstyle=style, fontweight="normal" if quiet or row >= len(names) else "bold",
            )  # fmt: skip
            if not math.isnan(share.low):
                axes.text(
                    column, row + 0.24, f"[{share.low:.2f}, {share.high:.2f}]", ha="center", va="center", fontsize=6.5,
                    color=colour, fontstyle=style,
                )  # fmt: skip
            if row == column:
                axes.add_patch(
                    Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=0.9)
                )
