"""A tracker in memory, and the writer to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditRun
from align_audit.options.trackers import TRACKER_NAMES
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import FOLDER
from align_audit.writers.trackers import sender, writer
from align_audit.writers.trackers.entry import Entry, Notice, Tracker
from align_audit.writers.trackers.writer import TrackerWriter
from tests.helpers.screens import a_run, quick_look

RECORDS = [quick_look(record) for record in a_run("ruined")]
"""Looks at steps 0, 5, 10, 20 and 40; alerts open at 20."""

Breaks = Callable[[Any], BaseException | None]


class Paper:
    """A tracker that keeps what it is given.

    Args:
        breaks: of an entry, a notice or a page: what is raised at it.
        hangs: nothing is answered before this is set.
    """

    place = "a paper"

    def __init__(self, breaks: Breaks = lambda given: None, hangs: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.entries: list[Entry] = []
        self.notices: list[Notice] = []
        self.pages: list[str] = []
        self._breaks, self._hangs = breaks, hangs

    def add(self, entry: Entry) -> None:
        self._answer(entry)
        self.entries.append(entry)
        self.steps.append(entry.step)

    def notify(self, notice: Notice) -> None:
        self._answer(notice)
        self.notices.append(notice)

    def add_report(self, page: str) -> None:
        self._answer(page)
        self.pages.append(page)

    def _answer(self, given: Any) -> None:
        if self._hangs is not None:
            self._hangs.wait(60)
        if (error := self._breaks(given)) is not None:
            raise error


def open_papers(monkeypatch: pytest.MonkeyPatch) -> list[Tracker | None]:
    """What the openers of all trackers give, one after the other; the last again and again. Nothing is paused for."""
    papers: list[Tracker | None] = []

    def opener() -> Tracker | None:
        return papers.pop(0) if len(papers) > 1 else papers[0]

    monkeypatch.setattr(writer, "OPENERS", dict.fromkeys(TRACKER_NAMES, opener))
    monkeypatch.setattr(sender, "PAUSES", (0.0, 0.0))
    return papers


def a_writer(folder: Path, records: Sequence[AuditRecord] = (), **options: Any) -> TrackerWriter:
    """One that was told that its run begins, with what it held before."""
    made = TrackerWriter("mlflow", folder, **options)
    made.start(AuditRun(folder / FOLDER, list(records), [], []))
    return made


def tell(told: TrackerWriter, *places: int) -> None:
    """Audits of the run, by their places in it."""
    for place in places:
        told.record(RECORDS[place], RECORDS[: place + 1])


def until(holds: Callable[[], bool]) -> None:
    """Wait for the thread that sends."""
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert holds()
