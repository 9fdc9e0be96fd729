"""A transfer matrix on the terminal: a table for each basis and layer. Plain text where the output is no terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align_audit.errors import counted
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import is_unknown
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.words import overlap_notes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_WIDEST = len("(-10.00 [-10.00, -10.00])")


@dataclass(frozen=True)
class _Cell:
    text: str
    style: str = ""


def print_transfer(record: TransferRecord, console: Console | None = None) -> None:
    """Print the matrices, then what is not known, and why.

    Args:
        console: where to; None: standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    names = record.probe_names
    counts = {name: record.provenance[name].pairs for name in names}
    sizes = ", ".join(f"{name} {counted(count, 'pair')}" for name, count in counts.items())
    console.print(Text(f"align_audit transfer, step {record.step}: {sizes}", style="bold"))
    console.print(
        Text(
            "Share of the full patch's effect on the pairs of a column that the subspace of a row carries, with its "
            "interval. In round brackets: random subspaces of that rank do as well, so it shows nothing.",
            style="dim",
        )
    )
    for note in overlap_notes(record):
        console.print(Text(note))
    # The shift basis is the one to read first: the activation basis is dominated by what both models share.
    for basis in sorted(record.cells, reverse=True):
        for layer in record.cells[basis]:
            console.print(matrix_table(record, basis, layer, console.width))
            for line in angle_notes(record, basis, layer):
                console.print(Text(line, style="dim"))
    for name in names:
        shift = record.shift[name]
        if is_unknown(shift) or shift.low <= 0.0 <= shift.high:
            console.print(
                Text(f"{name}: the margin shift is not beyond its interval, {shift:.3g} nats", style="yellow")
            )
    for line in unknown_notes(record):
        console.print(Text(line, style="dim"))


def matrix_table(record: TransferRecord, basis: str, layer: int, width: int = 120) -> Table:
    """A rich table: one row per fitted set and rank, one column per patched set, random subspaces last.

    Where ``width`` characters are too few, intervals stand below their values.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"layer {layer}, {basis} basis",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("fitted on", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    for name in record.probe_names:
        table.add_column(f"on {name}", no_wrap=True)
    wide = max(len(name) for name in ("fitted on", *record.probe_names)) + 9
    for name in record.probe_names:
        wide += max(_WIDEST, len(name) + 3) + 3
    between = " " if wide <= width else "\n"
    for label, place, cells in _rows(record, basis, layer, between):
        last = place == len(record.ranks) - 1
        table.add_row(
            label if place == 0 else "",
            str(record.ranks[place]),
            *(Text(cell.text, style=cell.style) for cell in cells),
            end_section=last,
        )
    return table


def _rows(record: TransferRecord, basis: str, layer: int, between: str) -> Iterator[tuple[str, int, list[_Cell]]]:
    matrix = record.cells[basis][layer]
    for fitted in record.probe_names:
        for place in range(len(record.ranks)):
            cells = []
            for patched in record.probe_names:
                cell = matrix[fitted][patched]
                text = _estimate(cell.effect_fraction[place], between)
                beaten = cell.beats_random[place] is False
                cells.append(
                    _Cell(f"({text})" if beaten else text, "dim" if beaten else "" if fitted == patched else "bold")
                )
            yield fitted, place, cells
    random = record.random.get(basis, {}).get(layer, {})
    for place in range(len(record.ranks)) if random else ():
        yield (
            "random",
            place,
            [
                _Cell(_estimate(random[name].effect_fraction[place], between) if name in random else "-", "dim")
                for name in record.probe_names
            ],
        )


def angle_notes(record: TransferRecord, basis: str, layer: int) -> list[str]:
    """For each two sets the largest principal angle between their subspaces, in degrees, by rank."""
    lines = []
    for pair in record.angles.get(basis, {}).get(layer, []):
        largest = [
            f"{math.degrees(angles[-1]):.0f}° (rank {rank})"
            for rank, angles in zip(record.ranks, pair.angles, strict=True)
            if not math.isnan(angles[-1])
        ]
        if largest:
            lines.append(f"largest angle between {pair.between[0]} and {pair.between[1]}: {', '.join(largest)}")
    return lines


def unknown_notes(record: TransferRecord) -> list[str]:
    """Each reason why shares are not known once, with where it holds."""
    by_reason: dict[str, list[str]] = {}
    for basis, layer, fitted, patched, cell in record.each():
        for share in cell.effect_fraction:
            if share.reason and math.isnan(share.mean):
                where = f"{fitted} on {patched} (layer {layer}, {basis})"
                places = by_reason.setdefault(share.reason, [])
                if where not in places:
                    places.append(where)
    return [
        f"not known: {', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}: {reason}"
        for reason, places in by_reason.items()
    ]


def _estimate(value: Estimate, between: str) -> str:
    if is_unknown(value):
        return "not known"
    return f"{value.mean:.2f}{between}[{value.low:.2f}, {value.high:.2f}]"
