"""Many runs in one table, red first: since when, how far, whether it gets worse, how old the last audit is, what to do.

::

    3 runs: 1 ERROR, 2 HEALTHY                                                          14:03:22
    status   since  step  chosen                KL                    audited  run
    ERROR       20    40  ▇▇▅▁▁▁  −5.67         ▁▁▃▇██  9.26            3 min  ruined
    HEALTHY      0    60  ▇▇▇▇▇▇  −0.02         ▁▁▁▁▁▁  0.04             12 s  healthy

    ruined  the policy is leaving its language, since step 20 (and 1 more alert)
      do    last clean audit: step 5; no checkpoint from then or before was kept (save_steps, save_total_limit)
      latest healthy  step 0, the model that training started from
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from align_audit.errors import counted
from align_audit.record.alert import Alert
from align_audit.record.course import present_course
from align_audit.record.open_alerts import open_alerts
from align_audit.record.probe_sets_in_use import sets_in_use
from align_audit.record.run import AuditRun
from align_audit.record.status import WORST_FIRST, Status
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.training_log import TRAINING
from align_audit.writers.brief import what_to_do
from align_audit.writers.latest_healthy import LatestHealthy, latest_healthy
from align_audit.writers.standing import Standing, figure, limit_of, standing_at
from align_audit.writers.styled import STATUS_STYLES, Part, overflow_of, text_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-~=+*#"
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("status", "left"), ("since", "right"), ("step", "right"), ("chosen", "right"), ("KL", "right"),
    ("audited", "right"), ("run", "left"),
)  # fmt: skip
_APART = 2
"""Blanks between two columns."""
_SHORT_NAME, _LONG_NAME = 10, 24
"""Characters of a run's name that have room before its sparklines have any, and before they have much."""
_SHORTEST, _SHORT, _LONGEST = 3, 6, 24
"""Audits of a sparkline, the last ones."""
_SILENT_AFTER, _SHORTEST_SILENCE, _LAST_AUDITS = 3, 600.0, 6
"""Times what lay between two audits, seconds, and so many audits."""
MOST_SILENT = 3
"""Runs that nothing is heard of, in lines below the table."""
_SUMMARY = "train_runtime"
"""Is logged when training has ended."""
_BEFORE = 3
"""Characters of a name that are shown before those by which it differs from another."""


@dataclass(frozen=True)
class RunRow:
    """How one run stands.

    Attributes:
        name: as it is shown.
        folder: of the run.
        standing: of the probe set that is worst off, at its last audit; None: there is no audit.
        curve: the heads of its audits, one a step, of the course that the run is on.
        alerts: warnings and errors that are open, on any set, the errors first.
        audits: of all sets.
        failures: audits that broke.
        trouble: what of its log cannot be read, in a sentence; None: nothing.
        latest_healthy: None: there is no audit.
        heard: when the training logged something last; None: not known.
        ended: the training has logged its summary, which comes last.
    """

    name: str
    folder: str
    status: Status
    standing: Standing | None = None
    curve: tuple[Head, ...] = ()
    alerts: tuple[Alert, ...] = ()
    audits: int = 0
    failures: int = 0
    trouble: str | None = None
    latest_healthy: LatestHealthy | None = None
    heard: datetime | None = None
    ended: bool = False

    @property
    def created(self) -> datetime | None:
        """When the last audit was made."""
        return None if self.standing is None else time_of(self.standing.record.provenance.created)

    @property
    def opened(self) -> datetime:
        """When it came to its status, as far as is known."""
        since = self.status.since if self.status.since is not None else 0
        times = [
            created for head in self.curve if head.step >= since and (created := time_of(head.created)) is not None
        ]
        return min(times, default=self.created or datetime.min.replace(tzinfo=UTC))

    def headline(self) -> str:
        """What is wrong, as a clause; of a healthy run, that nothing is."""
        return self.status.reason.rstrip(".") if self.standing is None else self.standing.headline()

    def what_to_do(self) -> str:
        """The next step, in a line; empty where nothing is to be done, or nothing is known yet."""
        if self.status.word == "HEALTHY":
            return ""
        return self.status.advice if self.standing is None else what_to_do(self.standing)

    def as_json(self, now: datetime) -> dict[str, Any]:
        """Plain JSON values; None: not known. Figures are of the last audit, in nats per token and as shares."""
        made: dict[str, Any] = {
            "run": self.name,
            "folder": self.folder,
            "status": self.status.word,
            "since": self.status.since,
            "reason": self.status.reason,
            "step": None,
            "ended": self.ended,
            "silent_seconds": self.silence(now),
            "audits": self.audits,
            "failures": self.failures,
            "trouble": self.trouble,
        }
        if self.standing is not None:
            record = self.standing.record
            margins = record.margins
            made |= {
                "step": record.step,
                "kind": record.kind,
                "probes": record.provenance.probe_name,
                "audited": record.provenance.created,
                "age_seconds": self.age(now),
                "chosen_logp_change_per_token": _finite(margins.chosen_logp_change_per_token.mean),
                "kl": _finite(margins.kl.mean),
                "token_accuracy": _finite(margins.token_accuracy.mean),
                "reward_accuracy": _finite(self.standing.reward_accuracy.mean),
                "reward_margin": _finite(self.standing.reward_margin),
            }
        alerts = [alert.model_dump(mode="json", include=_OF_ALERT) for alert in self.alerts]
        healthy = None if self.latest_healthy is None else self.latest_healthy.as_json()
        return made | {"alerts": alerts, "to_do": self.what_to_do() or None, "latest_healthy": healthy}

    def silence(self, now: datetime) -> float | None:
        """Seconds since a training that has not ended was heard of, where that is longer than three times what lay between its
        last audits at most, and than ten minutes: it was killed, or hangs. None: it is heard of, is no training that was
        audited from inside, or nothing is known."""
        times = [time for head in self.curve if (time := time_of(head.created)) is not None]
        inside = self.standing is not None and self.standing.record.occasion is not None
        if self.ended or self.heard is None or not inside or len(times) < 2:
            return None
        gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(sorted(times)[-_LAST_AUDITS:])]
        silence = (now - max(self.heard, *times)).total_seconds()
        return silence if silence > max(_SILENT_AFTER * max(gaps), _SHORTEST_SILENCE) else None

    def age(self, now: datetime) -> float | None:
        """Seconds since the last audit was made."""
        created = self.created
        return None if created is None else max((now - created).total_seconds(), 0.0)


_OF_ALERT = {"rule", "cause", "level", "event", "since", "message", "clean_step", "checkpoint"}


def row_of_run(run: AuditRun, name: str, trouble: str | None = None) -> RunRow:
    """How a run stands now.

    Args:
        trouble: what of its log cannot be read, in a sentence.
    """
    status, folder = run.status, str(run.output_dir)
    course = present_course(run.records)
    heads = heads_of(course)
    if not heads:
        return RunRow(name, folder, status, failures=len(run.failures), trouble=trouble)
    used = sets_in_use(heads, run.failures)
    last = {head.probe_name: place for place, head in enumerate(heads) if head.probe_name in used}
    standings = [standing_at(course[place], run.records, run.training_log) for place in last.values()]
    standings.sort(key=lambda standing: WORST_FIRST.index(standing.status.word))
    worst = standings[0]
    curve = {head.step: head for head in heads if head.probe_name == worst.record.provenance.probe_name}
    alerts = [alert for alert in open_alerts(heads) if alert.level != "info"]
    return RunRow(
        name,
        folder,
        status,
        replace(worst, status=status),
        tuple(curve.values()),
        tuple(sorted(alerts, key=lambda alert: alert.level != "error")),
        len(run.records),
        len(run.failures),
        trouble,
        latest_healthy(run),
        _heard(run),
        any(_SUMMARY in row.logs and row.step >= run.training_log[-1].step for row in run.training_log),
    )


def _heard(run: AuditRun) -> datetime | None:
    try:
        return datetime.fromtimestamp((run.directory / TRAINING).stat().st_mtime, UTC)
    except OSError:  # there is none, or it was just removed
        return None


def by_weight(rows: Sequence[RunRow]) -> list[RunRow]:
    """The worst first, then by name."""
    return sorted(rows, key=lambda row: (WORST_FIRST.index(row.status.word), row.name))


@dataclass(frozen=True)
class RunsTable:
    """A rich renderable.

    Attributes:
        rows: in any order.
        now: of the ages.
        most_rows: of the table; of more, the worst are shown.
        notes: lines below it.
    """

    rows: Sequence[RunRow]
    now: datetime
    most_rows: int | None = None
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        def text(words: str, style: str = "") -> Any:
            return text_of([(words, style)], options)

        rows = by_weight(self.rows)
        shown = rows if self.most_rows is None else rows[: max(self.most_rows, 1)]
        yield text_of(self._summary(), options)
        table = Table(box=None, pad_edge=False, padding=(0, _APART, 0, 0), header_style="dim")
        for name, justify in _COLUMNS:
            table.add_column(name, justify=justify, no_wrap=True, overflow=overflow_of(options))
        for row, cells in zip(shown, self._cells(shown, options), strict=True):
            first, *rest = cells
            table.add_row(text(first, STATUS_STYLES[row.status.word]), *map(text, rest))
        yield table
        if len(rows) > len(shown):
            yield text(f"and {_words(rows[len(shown) :])} more", "dim")
        for note in self.notes:
            yield text(note, "dim")
        silent = [(row.name, silence) for row in shown if (silence := row.silence(self.now)) is not None]
        for name, silence in silent[:MOST_SILENT]:
            words = f"nothing heard for {ago(silence)}, and training has not said that it ended: killed, or hung?"
            yield text(f"{name}: {words} See whether its process still runs", STATUS_STYLES["BLIND"])
        yield from self._worst(options)

    def _cells(self, rows: Sequence[RunRow], options: ConsoleOptions) -> list[list[str]]:
        """What stands in each row: sparklines as long as there is room for, and names that are cut at their beginning."""
        from rich.cells import cell_len

        def widths(cells: Sequence[Sequence[str]]) -> list[int]:
            headers = [name for name, _ in _COLUMNS]
            return [max(map(cell_len, column)) for column in zip(headers, *cells, strict=True)]

        bare = [_cells(row, self.now, 0, options.ascii_only) for row in rows]
        *columns, names = widths(bare)
        room = options.max_width - sum(columns) - _APART * len(columns)
        longest = max((len(row.curve) for row in rows), default=0)
        # Short sparklines before long names, which are told apart by their ends.
        length = max((room - min(names, _LONG_NAME)) // 2, min((room - min(names, _SHORT_NAME)) // 2, _SHORT))
        length = min(length, longest, _LONGEST) if length >= _SHORTEST else 0
        cells = [_cells(row, self.now, length, options.ascii_only) for row in rows]
        *columns, names = widths(cells)
        room = max(options.max_width - sum(columns) - _APART * len(columns), 4)
        cut = _told_apart([name for *_, name in cells], room, "..." if options.ascii_only else "…")
        return [[*rest, name] for (*rest, _), name in zip(cells, cut, strict=True)]

    def _summary(self) -> list[Part]:
        rows = by_weight(self.rows)
        count = counted(len(rows), "run")
        parts: list[Part] = [(f"{count}: " if rows else count, "bold")]
        for word, number in Counter(row.status.word for row in rows).items():
            parts += [(", " if len(parts) > 1 else "", ""), (f"{number} {word}", STATUS_STYLES[word])]
        return [*parts, (f"   {self.now.astimezone():%H:%M:%S}", "dim")]

    def _worst(self, options: ConsoleOptions) -> RenderResult:
        """The newest of the worst alerts, and what to do about it."""
        from rich.padding import Padding

        row = newest_of_worst(self.rows)
        if row is None:
            return
        yield text_of([("", "")], options)
        yield text_of([(row.name, "bold"), ("  ", ""), (row.headline(), STATUS_STYLES[row.status.word])], options)
        if row.what_to_do():
            yield Padding(text_of([("do  ", "bold"), (row.what_to_do(), "")], options), (0, 0, 0, 2), expand=False)
        if row.latest_healthy is not None:
            healthy = text_of([("latest healthy  ", "bold"), (str(row.latest_healthy), "")], options)
            yield Padding(healthy, (0, 0, 0, 2), expand=False)


def _end_of(name: str, room: int, mark: str) -> str:
    """The end of a name, in so many columns of a terminal, of which a character may take two; behind a mark where it is cut."""
    from rich.cells import cell_len

    if cell_len(name) <= room:
        return name
    end = name[-room:]
    while end and cell_len(mark + end) > room:
        end = end[1:]
    return mark + end


def _told_apart(names: Sequence[str], room: int, mark: str) -> list[str]:
    """The ends of names, in so many columns; of those that would look the same, what they begin to differ by."""
    ends = [_end_of(name, room, mark) for name in names]
    cut = list(ends)
    for place, name in enumerate(names):
        same = [each for each, shown in zip(names, ends, strict=True) if shown == ends[place] and each != name]
        if same:
            differs = min(_alike(name, each) for each in same)
            begin = max(differs - _BEFORE, 0)
            cut[place] = _beginning_of((mark if begin else "") + name[begin:], room, mark)
    return cut


def _alike(name: str, another: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(name, another, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(name), len(another)))


def _beginning_of(name: str, room: int, mark: str) -> str:
    from rich.cells import cell_len

    begin = name
    while begin and cell_len(begin + mark) > room and cell_len(name) > room:
        begin = begin[:-1]
    return name if begin == name else begin + mark


def newest_of_worst(rows: Sequence[RunRow]) -> RunRow | None:
    """The run whose alert opened last, among those with an error open, else among those that are blind, else with a warning."""
    worst = [row for row in rows if row.status.word != "HEALTHY"]
    if not worst:
        return None
    word = by_weight(worst)[0].status.word
    return max((row for row in worst if row.status.word == word), key=lambda row: row.opened)


def sparkline(values: Sequence[float], low: float, high: float, *, ascii_only: bool = False) -> str:
    """Numbers as bars between two levels; what is not a number is a gap.

    Example:
        >>> sparkline([0.0, 0.5, 1.0, float("nan")], 0.0, 1.0)
        '▁▅█ '
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    width = high - low
    if not width > 0:
        return "".join(blocks[0] if math.isfinite(value) else " " for value in values)
    places = [min(max((value - low) / width, 0.0), 1.0) if not math.isnan(value) else None for value in values]
    return "".join(" " if place is None else blocks[round(place * (len(blocks) - 1))] for place in places)


def _cells(row: RunRow, now: datetime, length: int, ascii_only: bool) -> tuple[str, ...]:
    since = "" if row.status.since is None else str(row.status.since)
    if row.standing is None:
        return row.status.word, since, "", "", "", "", row.name
    chosen, kl = (_bars(row, option, length, ascii_only) for option in ("chosen_drop_warning", "kl_warning"))
    margins = row.standing.record.margins
    age = row.age(now)
    name = row.standing.record.provenance.probe_name
    return (
        row.status.word,
        since,
        str(row.standing.record.step),
        f"{chosen}  {figure(margins.chosen_logp_change_per_token.mean, signed=True):>7}",
        f"{kl}  {figure(margins.kl.mean):>7}",
        "" if age is None else ago(age),
        row.name if name is None else f"{row.name} ({name})",
    )


def _bars(row: RunRow, option: str, length: int, ascii_only: bool) -> str:
    """A sparkline that reaches at least as far as the warning's limit: noise far from it stays flat."""
    if length == 0 or row.standing is None:
        return ""
    falls = option == "chosen_drop_warning"
    values = [head.chosen_logp_change_per_token.mean if falls else head.kl.mean for head in row.curve][-length:]
    finite = [value for value in values if math.isfinite(value)]
    limit = limit_of(row.standing.record, option) or 0.0
    low, high = min(0.0, -limit if falls else 0.0, *finite), max(0.0, 0.0 if falls else limit, *finite)
    return sparkline(values, low, high, ascii_only=ascii_only).ljust(length)


def ago(seconds: float) -> str:
    """An age in its largest unit.

    Example:
        >>> ago(4), ago(200), ago(3 * 3600), ago(2e6)
        ('4 s', '3 min', '3 h', '23 d')
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (1 if unit == "min" else 2):
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _words(rows: Sequence[RunRow]) -> str:
    return ", ".join(f"{number} {word}" for word, number in Counter(row.status.word for row in rows).items())


def time_of(words: str) -> datetime | None:
    """When a record says that it was made; None: it does not say so in a way that can be read."""
    try:
        time = datetime.fromisoformat(words)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
