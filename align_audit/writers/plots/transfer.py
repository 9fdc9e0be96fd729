"""Pictures of a transfer record: a heat map for each basis and layer. The style is that of the other pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.record.estimate import Estimate
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


@dataclass(frozen=True)
class _Cells:
    """What one matrix shows: fitted sets, then random subspaces, by patched sets, at each rank."""

    rows: list[str]
    columns: list[str]
    shares: list[list[list[Estimate]]]
    """[rank][row][column]"""
    beats_random: list[list[list[bool | None]]]

    @classmethod
    def of(cls, record: TransferRecord, basis: str, layer: int) -> _Cells:
        names, matrix = record.probe_names, record.cells[basis][layer]
        random = record.random.get(basis, {}).get(layer, {})
        none = Estimate.unknown("no random subspaces were patched on this set")
        shares: list[list[list[Estimate]]] = []
        beats: list[list[list[bool | None]]] = []
        for place in range(len(record.ranks)):
            shares.append([[matrix[row][column].effect_fraction[place] for column in names] for row in names])
            beats.append([[matrix[row][column].beats_random[place] for column in names] for row in names])
            if random:
                shares[-1].append([random[name].effect_fraction[place] if name in random else none for name in names])
                beats[-1].append([None] * len(names))
        return cls([*names, *(["random"] if random else [])], names, shares, beats)

    @property
    def has_random(self) -> bool:
        return len(self.rows) > len(self.columns)

    def reasons(self) -> list[str]:
        """Why cells are not known, each once."""
        said = [
            f"{'column' if row < len(self.columns) else 'random subspaces on'} {self.columns[column]}: {share.reason}"
            for matrix in self.shares
            for row, cells in enumerate(matrix)
            for column, share in enumerate(cells)
            if is_unknown(share) and share.reason
        ]
        return list(dict.fromkeys(said))


@styled
def transfer_matrix(record: TransferRecord, basis: str, layer: int) -> Figure:
    """Share of each set's effect that each set's subspace carries, one panel a rank, random subspaces in the last row.

    Raises:
        KeyError: the record has no such basis or layer.
    """
    import numpy as np

    cells, ranks = _Cells.of(record, basis, layer), record.ranks
    values = np.array([[[share.mean for share in row] for row in matrix] for matrix in cells.shares])
    notes = [f"{note}." for note in overlap_notes(record)]
    if reasons := cells.reasons():
        notes.append(f"Hatched is not known: {'; '.join(reasons)}.")
    panel = (0.95 * len(cells.columns) + 0.3, 0.56 * len(cells.rows) + 0.62)
    down = math.ceil(len(ranks) / max(1, int(12.5 / panel[0])))
    across = math.ceil(len(ranks) / down)  # rows of panels of about the same length
    longest = max(len(name) for name in cells.rows)
    body, figure = frame(
        max(7.5, across * panel[0] + 0.085 * longest + 1.3),
        down * panel[1] + 0.15,
        f"Transfer at layer {layer}, {basis} basis, step {record.step}: does one set's subspace carry another's effect?",
        "Each cell: share of the full patch's effect on the column's pairs that the row's subspace carries, and its "
        "interval. Off the diagonal dark red is transfer and white is none. Italics: random subspaces of that rank do "
        "as well, so it shows nothing.",
        footers=notes,
    )
    panels = body.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    finite = np.abs(values[np.isfinite(values)])
    limit = float(min(max(1.0, finite.max() if finite.size else 1.0), 2.0))
    for place, axes in enumerate(panels.flat):
        if place >= len(ranks):
            axes.set_visible(False)
            continue
        image = heat_cells(axes, values[place], limit, origin="upper")
        axes.set_title(f"rank {ranks[place]}", loc="left", fontweight="bold")
        _annotate(axes, cells, place, limit)
        _label(axes, cells)
        if place % across == 0:
            axes.set_ylabel("subspace fitted on")
        if place // across == down - 1 or place + across >= len(ranks):
            axes.set_xlabel("patched on")
            axes.tick_params(labelbottom=True)
    beyond = bool(finite.size and finite.max() > limit)
    colour_bar(body, image, panels, "share of the effect", beyond, aspect=18)
    return figure


def _label(axes: Axes, cells: _Cells) -> None:
    """The names of the sets along both sides, and a line above the random subspaces."""
    axes.set_xticks(range(len(cells.columns)), cells.columns)
    axes.set_yticks(range(len(cells.rows)), cells.rows)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if cells.has_random:
        axes.axhline(len(cells.columns) - 0.5, color=INK, linewidth=1.0)


def _annotate(axes: Axes, cells: _Cells, place: int, limit: float) -> None:
    """Each known cell's share and interval, quiet where random subspaces do as well; the diagonal framed."""
    from matplotlib.patches import Rectangle

    for row, shares in enumerate(cells.shares[place]):
        for column, share in enumerate(shares):
            if is_unknown(share):
                continue
            quiet = cells.beats_random[place][row][column] is False
            pale = abs(share.mean) < 0.2 * limit  # on a stronger colour grey could not be read
            colour = "white" if abs(share.mean) > 0.6 * limit else GREY if quiet and pale else INK
            style = "italic" if quiet else "normal"
            axes.text(
                column, row - 0.12, f"{share.mean:.2f}", ha="center", va="center", fontsize=9.5, color=colour,
                fontstyle=style, fontweight="normal" if quiet or row >= len(cells.columns) else "bold",
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
