"""The screen of ``align-audit watch``: many runs in one table, read from their logs as they grow. It loads no model."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_audit.cli.console import standard_output
from align_audit.errors import ConfigurationError, named, plain
from align_audit.record.alert import Alert
from align_audit.record.followed import FollowedRun
from align_audit.record.log import output_dir_of
from align_audit.record.places import log_folders
from align_audit.record.status import Status
from align_audit.record.stored_records import heads_of
from align_audit.writers.alert_command import AlertCommand
from align_audit.writers.runs_table import MOST_SILENT, RunRow, RunsTable, by_weight, row_of_run, time_of

if TYPE_CHECKING:
    from rich.console import Console

_SEARCH_SHARE = 0.05
"""Of the time that may go into looking for runs in large folders."""
_AROUND = 9
"""Lines of a terminal that are not rows of the table."""


class Board:
    """The runs below some folders, and how each stands.

    Args:
        places: runs, or folders that hold runs.
        on_alert: is given the run's folder and an alert, for each that opens or gets worse after the first look.
    """

    def __init__(self, places: Sequence[Path], on_alert: Callable[[str, Any], object] | None = None) -> None:
        self._places = places
        self._on_alert = on_alert
        self._runs: dict[Path, FollowedRun] = {}
        self._names: dict[Path, str] = {}
        self._next_search = 0.0
        self._looked = False
        self._began = datetime.now(UTC).replace(microsecond=0)  # as records are dated
        self._new: set[Path] = set()
        """Logs that the last search has found."""
        self._told: set[str] = set()
        """Alerts of runs that were there and are no more: they may come back, under another name too."""
        self.rows: dict[Path, RunRow] = {}
        self.gone: list[str] = []
        """Names of runs that were there and are no more."""

    def refresh(self) -> bool:
        """Look again; whether anything has changed."""
        changed = self._search()
        for folder, followed in self._runs.items():
            changed = self._refresh(folder, followed) or changed
        self._looked = True
        return changed

    def _search(self) -> bool:
        began = time.monotonic()
        if self._looked and began < self._next_search:
            return False
        named_logs = {log: name for place in self._places for log, name in _named_logs(place, len(self._places))}
        gone = self._runs.keys() - named_logs.keys()
        for folder in gone:
            self._told |= {alert.model_dump_json() for alert in self._runs[folder].run.alerts}
            del self._runs[folder], self.rows[folder]
        self.gone = [name for name in self.gone if name not in named_logs.values()]
        self.gone += sorted(self._names[folder] for folder in gone)
        self._new = named_logs.keys() - self._runs.keys()
        for folder in self._new:
            self._runs[folder] = FollowedRun(folder)
        fresh = bool(gone) or self._names != named_logs
        self._names = named_logs
        now = time.monotonic()
        self._next_search = now + (now - began) / _SEARCH_SHARE
        return fresh

    def _refresh(self, folder: Path, followed: FollowedRun) -> bool:
        try:
            changed, alerts = followed.refresh()
            if changed or folder not in self.rows:
                self.rows[folder] = row_of_run(followed.run, self._names[folder], followed.trouble)
        except Exception as error:  # one run's log ends no screen of many
            row = RunRow(
                self._names[folder],
                str(output_dir_of(folder)),
                Status("BLIND", None, f"It cannot be shown: {named(error)}."),
            )
            changed, alerts = row != self.rows.get(folder), []
            self.rows[folder] = row
        if self._looked and self._on_alert is not None:
            for alert in self._from_now_on(alerts, followed) if folder in self._new else alerts:
                if alert.level != "info":
                    self._on_alert(str(output_dir_of(folder)), alert)
        return changed

    def _from_now_on(self, alerts: list[Alert], followed: FollowedRun) -> list[Alert]:
        """Of a run that was found just now, what has happened since this began to look; the rest is as old as what it shows at
        its own start."""
        fresh = {
            alert.model_dump_json()
            for head in heads_of(followed.run.records)
            if (created := time_of(head.created)) is not None and created >= self._began
            for alert in head.alerts
        }
        return [alert for alert in alerts if (words := alert.model_dump_json()) in fresh and words not in self._told]


def _named_logs(place: Path, places: int) -> Iterable[tuple[Path, str]]:
    """The logs at a place, and what their runs are called: by their path inside it, under its own name where there are more."""
    if ".." in place.parts:
        place = Path(os.path.abspath(place))  # as the runs in it are told
    for log in log_folders(place):
        run = output_dir_of(log)
        inside = run.relative_to(place).as_posix() if run.is_relative_to(place) else "."
        name = plain(run.resolve().name if inside == "." else inside if places == 1 else f"{place}/{inside}")
        yield log, name


def look_at_runs(
    places: Sequence[Path],
    *,
    every: float,
    once: bool,
    as_json: bool,
    command: str | None,
    tell: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Show how runs stand, once or until a keyboard interrupt; the exit status.

    Raises:
        ConfigurationError: there is nothing to look at, or no command can be read.
    """
    for place in places:
        if not place.is_dir():
            raise ConfigurationError(f"no folder at {plain(place)}: expected a run, or a folder that holds runs")
    if once and command is not None:
        raise ConfigurationError(
            "--exec runs a command for alerts that come while it watches; with --once there are none: take its exit status"
        )
    notes: list[str] = []
    alerts = None if command is None else AlertCommand(command, notes.append)
    board = Board(places, None if alerts is None else alerts.run)
    board.refresh()
    if once:
        if not board.rows:
            listed = ", ".join(map(plain, places))
            raise ConfigurationError(f"no run in {listed}: expected folders with an align_audit log in them")
        if as_json:
            _print_json(board)
        else:
            standard_output().print(_table(board, notes))
        return int(any(row.status.word == "ERROR" for row in board.rows.values()))
    try:
        if as_json:
            _stream_json(board, every, notes, tell, wait)
        else:
            _live(board, every, notes, wait)
    except KeyboardInterrupt:
        pass
    return 0


def _print_json(board: Board) -> None:
    now = datetime.now(UTC)
    for row in by_weight(list(board.rows.values())):
        typer.echo(json.dumps(row.as_json(now)))


def _stream_json(
    board: Board, every: float, notes: list[str], tell: Callable[[str], None], wait: Callable[[float], None]
) -> None:
    """A line for each run now, and for one that has changed whenever it has."""
    shown: dict[Path, tuple[RunRow, bool]] = {}
    while True:
        now = datetime.now(UTC)
        rows = {folder: (row, row.silence(now) is not None) for folder, row in board.rows.items()}
        for folder, (row, silent) in rows.items():
            if folder not in shown or shown[folder][0] is not row or shown[folder][1] != silent:
                typer.echo(json.dumps(row.as_json(now)))
        sys.stdout.flush()
        shown = rows
        while notes:
            tell(notes.pop(0))
        wait(every)
        board.refresh()


def _live(board: Board, every: float, notes: Sequence[str], wait: Callable[[float], None]) -> None:
    """Redrawn in place on a terminal; off one, printed whenever something has changed."""
    from rich.live import Live

    console = standard_output()
    if not console.is_terminal:
        changed, silent = True, _silent(board)
        while True:
            if changed:
                console.print(_table(board, notes))
            wait(every)
            changed = board.refresh()
            # A run that was killed changes nothing in its log.
            silent, earlier = _silent(board), silent
            changed = changed or silent != earlier
    with Live(_table(board, notes, console), console=console, auto_refresh=False, screen=True) as live:
        while True:
            wait(every)
            board.refresh()
            live.update(_table(board, notes, console), refresh=True)


def _silent(board: Board) -> set[Path]:
    """The runs that nothing is heard of."""
    now = datetime.now(UTC)
    return {folder for folder, row in board.rows.items() if row.silence(now) is not None}


def _table(board: Board, notes: Sequence[str], console: Console | None = None) -> RunsTable:
    lines = [f"{name} is gone" for name in board.gone[-3:]] + list(notes[-3:])
    lines += [f"{row.name}: {row.trouble}" for row in by_weight(list(board.rows.values())) if row.trouble is not None][
        :3
    ]
    if not board.rows:
        lines.append("no run yet: waiting for align_audit logs")
    below = len(lines) + min(len(_silent(board)), MOST_SILENT)
    most = None if console is None else max(console.height - _AROUND - below, 3)
    return RunsTable(list(board.rows.values()), datetime.now(UTC), most, tuple(lines))
