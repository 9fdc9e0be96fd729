"""A comparison of runs, for a terminal and as JSON: a sentence, two tables, and what could not be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from align_audit.errors import plain
from align_audit.record.compare import Comparison, Meeting, Reading, Row, Side
from align_audit.record.figures import Figure
from align_audit.record.run_sums import Between
from align_audit.writers.latest_healthy import latest_healthy
from align_audit.writers.standing import figure as number
from align_audit.writers.standing import percent, standing_at
from align_audit.writers.styled import STATUS_STYLES, overflow_of, text_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_TITLES = {
    "chosen_logp_change_per_token": "chosen (nats/token)",
    "kl": "KL (nats/token)",
    "next_token_accuracy": "next tokens right",
    "reward_accuracy": "reward accuracy",
    "entropy_ratio": "entropy ratio",
    "peak_layer": "peak layer",
    "peak_share": "share at the peak",
    "additivity": "additivity",
    "delta_align": "Δalign",
    "reward_margin": "reward margin",
    "margin_shift": "margin shift (nats)",
}
_STATUS = "status at this step"
_SIGNED = frozenset(["chosen_logp_change_per_token", "reward_margin", "margin_shift", "delta_align"])
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST_REASONS = 6
"""Reasons below a table; of more, the rest is counted."""


def letters(count: int) -> list[str]:
    """What so many runs are called where their own names have no room, or, being foreign text, no place.

    Example:
        >>> letters(2), letters(28)[-2:]
        (['A', 'B'], ['A2', 'B2'])
    """
    rounds = [divmod(place, len(_LETTERS)) for place in range(count)]
    return [_LETTERS[letter] + (str(turn + 1) if turn else "") for turn, letter in rounds]


def sentence(comparison: Comparison) -> str:
    """What there is to know first: who is not healthy since when, and what each has paid for the same margin.

    Example:
        ``B is in ERROR since step 20 (the policy is leaving its language), A is HEALTHY; at equal reward margin +1.20 A has
        moved KL 0.17, B 7.90.``
    """
    order = {"ERROR": 0, "BLIND": 1, "WATCH": 2, "HEALTHY": 3}
    numbered = sorted(range(len(comparison.sides)), key=lambda place: order[comparison.statuses[place].word])
    names = called(comparison)
    how = ", ".join(_stands(names[place], comparison.sides[place], comparison.statuses[place]) for place in numbered)
    return f"{how}; {_paid(comparison)}."


def called(comparison: Comparison, room: int = 60) -> list[str]:
    """What the sides are called, in so many characters each: of a long name its end, which tells runs of a sweep apart."""
    names = [plain(side.name) for side in comparison.sides]
    short = [name if len(name) <= room else f"…{name[1 - room :]}" for name in names]
    return [
        name if short.count(name) == 1 else f"{name} ({1 + short[:place].count(name)})"
        for place, name in enumerate(short)
    ]


def _stands(name: str, side: Side, status: Any) -> str:
    if status.word == "HEALTHY":
        return f"{name} is HEALTHY"
    since = "" if status.since is None else f" since step {status.since}"
    newest = standing_at(side.newest, side.run.records, side.run.training_log)
    worst = newest.worst
    why = plain(newest.headline(), 120).split(", since step")[0] if worst is not None and status.word != "BLIND" else ""
    word = {"ERROR": "in ERROR", "WATCH": "to be watched (WATCH)", "BLIND": "BLIND"}[status.word]
    return f"{name} is {word}{since}" + (f" ({why})" if why else "")


def _paid(comparison: Comparison) -> str:
    """KL at equal margin; where there is none, at the common step."""
    for meeting, words in (
        (
            comparison.at_margin,
            f"at equal {_name(comparison.margin)} {number(comparison.at_margin.value, signed=True)} ",
        ),
        (comparison.at_step, f"at step {comparison.at_step.value:.0f} "),
    ):
        row = meeting.row("kl")
        if row is not None:
            (first, start), *rest = zip(called(comparison), row.readings, strict=True)
            moved = f"{first} has moved KL {number(start.value)}"
            return words + ", ".join([moved, *(f"{name} {number(read.value)}" for name, read in rest)])
    return "they meet at no step and at no margin"


def _name(figure: Figure) -> str:
    return figure.name.replace("_", " ")


def closing_notes(comparison: Comparison) -> list[str]:
    """What stands below the tables: the latest healthy audit of each run, and what could not be compared."""
    sides = zip(called(comparison), comparison.sides, strict=True)
    healthy = "; ".join(f"{name} {latest_healthy(side.run)}" for name, side in sides)
    return [f"Latest healthy: {healthy}.", *map(plain, comparison.notes)]


# --- a terminal -------------------------------------------------------------------------------------------------------


class ComparisonTable:
    """Rich renderable: the sentence, a table for each place at which the runs meet, and notes.

    Args:
        title: of the probe set, where runs have several.
    """

    def __init__(self, comparison: Comparison, title: str = "") -> None:
        self._comparison, self._title = comparison, title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def text(words: str, style: str = "") -> Any:
            return text_of([(words, style)], options)

        if self._title:
            yield text(self._title, "bold")
        yield text(sentence(self._comparison), "bold")
        for table in meeting_tables(self._comparison):
            yield text("")
            yield text(table.heading, "bold")
            if table.rows:
                head = table.head if table.width <= options.max_width else table.lettered
                if head is not table.head:
                    for letter, name in zip(letters(len(table.names)), table.names, strict=True):
                        yield text(f"  {letter}: {name}")
                yield self._table(replace(table, head=head), text, options)
            for words in table.notes:
                yield text(f"  {words}", "dim")
        yield text("")
        for words in closing_notes(self._comparison):
            yield text(words)

    def _table(self, said: MeetingTable, text: Any, options: ConsoleOptions) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        first, *columns = said.head
        table.add_column(first, overflow=overflow_of(options))
        for name in columns:
            table.add_column(text(name), justify="right", overflow=overflow_of(options))
        for name, *cells in said.rows:
            styles = [STATUS_STYLES[cell] if name == _STATUS else "" for cell in cells]
            table.add_row(text(name), *map(text, cells, styles))
        return table


@dataclass(frozen=True)
class MeetingTable:
    """What is said of runs at one place, in words.

    Attributes:
        head: titles of the columns: of the figure's name, of each run, and of each difference.
        names: of the runs, as they stand in ``head``.
        rows: cells as many as columns, or fewer by the differences; none where the runs do not meet.
        notes: where full audits were read, and why figures or intervals are missing.
    """

    heading: str
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Characters that the widest cells take, with two between columns."""
        return sum(2 + max(map(len, cells)) for cells in zip_longest(self.head, *self.rows, fillvalue=""))

    @property
    def lettered(self) -> tuple[str, ...]:
        """The ``head`` with a letter for each name: names that end alike are cut where they differ."""
        first, *later = letters(len(self.names))
        count = len(self.names)
        return ("", first, *later, *(f"{letter} − {first} [95 %]" for letter in later[: len(self.head) - 1 - count]))


def meeting_tables(comparison: Comparison) -> list[MeetingTable]:
    """At the last common step, and at equal margin."""
    return [_meeting_table(comparison, meeting) for meeting in (comparison.at_step, comparison.at_margin)]


def _meeting_table(comparison: Comparison, meeting: Meeting) -> MeetingTable:
    heading = _heading(comparison, meeting)
    if not meeting.rows:
        return MeetingTable(heading)
    names = called(comparison, 40)
    differences = [f"{name} − {names[0]} [95 %]" for name in names[1:]]
    head = ("", *names, *(differences if any(row.differences for row in meeting.rows) else ()))
    rows = [tuple(_cells(row)) for row in meeting.rows]
    if meeting.kind == "step":
        rows.insert(0, (_STATUS, *(_status_at(side, int(meeting.value)) for side in comparison.sides)))
    notes = _reasons(comparison, meeting)
    if meeting.full != meeting.places:
        notes.insert(0, f"peak layer to Δalign: {_full_places(comparison, meeting)}")
    return MeetingTable(heading, head, tuple(rows), tuple(names), tuple(notes))


def _status_at(side: Side, step: int) -> str:
    return standing_at(side.latest[step], side.run.records, side.run.training_log).status.word


def _cells(row: Row) -> list[str]:
    return [
        _TITLES[row.figure.name],
        *(_value(row.figure, reading) for reading in row.readings),
        *(_change(row.figure, difference) for difference in row.differences),
    ]


def _value(figure: Figure, reading: Reading, signed: bool | None = None) -> str:
    if math.isnan(reading.value):
        return "–"
    if figure.unit == "share":
        return percent(reading.value)
    if figure.unit == "layer":
        return f"{reading.value:g}"
    return number(reading.value, signed=figure.name in _SIGNED if signed is None else signed)


def _change(figure: Figure, reading: Reading) -> str:
    """A difference with its interval: ``+7.73 [6.90, 8.51]``, of shares in points of per cent."""
    if math.isnan(reading.value):
        return "–"
    if figure.unit == "layer":
        return f"{reading.value:+g}".replace("-", "−")
    if figure.unit == "share":
        ends = "" if math.isnan(reading.low) else f" [{_points(reading.low)}, {_points(reading.high)}]"
        return f"{_points(reading.value, '+')} points{ends}"
    ends = "" if math.isnan(reading.low) else f" [{number(reading.low)}, {number(reading.high)}]"
    return number(reading.value, signed=True) + ends


def _points(share: float, sign: str = "") -> str:
    points = round(share * 100)
    return f"{points:{sign if points else ''}}".replace("-", "−")


def _heading(comparison: Comparison, meeting: Meeting) -> str:
    what = "the last common step" if meeting.kind == "step" else f"equal {_name(comparison.margin)}"
    if meeting.reason is not None:
        return f"Not at {what}: {plain(meeting.reason)}"
    if meeting.kind == "step":
        return f"At the last common step, {meeting.value:.0f}"
    sides = zip(called(comparison), meeting.places, strict=True)
    places = ", ".join(_read_at(name, place) for name, place in sides)
    drawn = ", by straight lines between audits" if any(len(place.audits) > 1 for place in meeting.places) else ""
    return f"At equal {_name(comparison.margin)}, {number(meeting.value, signed=True)} ({places}{drawn})"


def _read_at(name: str, place: Between) -> str:
    return f"{name} {'at ' if len(place.audits) == 1 else ''}{place}"


def _full_places(comparison: Comparison, meeting: Meeting) -> str:
    read = [
        _read_at(name, place)
        for name, place in zip(called(comparison), meeting.full, strict=True)
        if isinstance(place, Between)
    ]
    return ", ".join(read) or "no full audits there"


def _reasons(comparison: Comparison, meeting: Meeting) -> list[str]:
    """Why figures or intervals are missing: each reason once, with the figures it is of."""
    by_reason: dict[str, list[str]] = {}
    for row in meeting.rows:
        title = _TITLES[row.figure.name].split(" (")[0]
        for name, reading in zip(called(comparison), row.readings, strict=True):
            if math.isnan(reading.value) and reading.reason is not None:
                by_reason.setdefault(f"{name}: {plain(reading.reason)}", []).append(title)
        for difference in row.differences:
            finite = not any(math.isnan(reading.value) for reading in row.readings)
            if finite and math.isnan(difference.low) and difference.reason is not None:
                by_reason.setdefault(f"no interval: {plain(difference.reason)}", []).append(title)
    lines = [f"{', '.join(dict.fromkeys(titles))}: {reason}" for reason, titles in by_reason.items()]
    return lines if len(lines) <= _MOST_REASONS else [*lines[:_MOST_REASONS], f"and {len(lines) - _MOST_REASONS} more"]


# --- JSON -------------------------------------------------------------------------------------------------------------


def comparison_values(comparison: Comparison) -> dict[str, Any]:
    """The same as plain values for JSON; what is not known is None, with its reason beside it."""
    return {
        "sentence": sentence(comparison),
        "runs": [
            {
                "name": side.name,
                "directory": str(side.run.directory),
                "status": status.word,
                "since": status.since,
                "reason": status.reason,
                "beta": side.newest.provenance.beta,
                "probe_hash": side.newest.provenance.probe_hash,
                "steps": list(side.latest),
                "latest_healthy": latest_healthy(side.run).as_json(),
            }
            for side, status in zip(comparison.sides, comparison.statuses, strict=True)
        ],
        "at_step": _meeting_values(comparison, comparison.at_step),
        "at_margin": {"of": comparison.margin.name} | _meeting_values(comparison, comparison.at_margin),
        "notes": list(comparison.notes),
    }


def _meeting_values(comparison: Comparison, meeting: Meeting) -> dict[str, Any]:
    names = [side.name for side in comparison.sides]
    values: dict[str, Any] = {"value": _finite(meeting.value), "reason": meeting.reason}
    if meeting.kind == "step" and meeting.rows:
        values["statuses"] = {side.name: _status_at(side, int(meeting.value)) for side in comparison.sides}
    values["between"] = {
        name: {"steps": [record.step for record in place.audits], "weight": place.weight}
        for name, place in zip(names, meeting.places, strict=False)
    }
    values["figures"] = {
        row.figure.name: {
            "unit": row.figure.unit,
            "runs": dict(zip(names, map(_reading_values, row.readings), strict=True)),
            "differences": dict(zip(names[1:], map(_reading_values, row.differences), strict=False)),
        }
        for row in meeting.rows
    }
    return values


def _reading_values(reading: Reading) -> dict[str, Any]:
    return {
        "value": _finite(reading.value),
        "low": _finite(reading.low),
        "high": _finite(reading.high),
        "reason": reading.reason,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def short_names(paths: Sequence[str]) -> list[str]:
    """What to call runs: the last parts of their folders, as many as tell them apart.

    Example:
        >>> short_names(["runs/a/dpo", "runs/b/dpo"]), short_names(["runs/a", "runs/b"])
        (['a/dpo', 'b/dpo'], ['a', 'b'])
    """
    parts = [path.rstrip("/\\").replace("\\", "/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]
