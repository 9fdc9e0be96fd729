"""Trackio: the run that the trainer's callback has open, which takes what comes after the callback finished it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Self

from align_audit.errors import plain
from align_audit.writers.trackers.entry import ROOT, STEP, Entry


class TrackioRun:
    """Curves over ``train/global_step``, as the trainer's are.

    No ``step`` is given: Trackio goes on counting from the largest one that it was given, so that the trainer's next point,
    which has none, would move.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self.place = plain(f"Trackio run {run.name} (project {run.project})", 100)

    @classmethod
    def opened(cls) -> Self | None:
        """The process's run; None where none is open."""
        from trackio import context_vars

        run = context_vars.current_run.get()
        return None if run is None else cls(run)

    def add(self, entry: Entry) -> None:
        """See :class:`~align_audit.writers.trackers.entry.Tracker`; the status is a text beside the curves."""
        import trackio

        images = {tag: trackio.Image(pixels) for tag, pixels in entry.pictures.items()}
        text = trackio.Markdown(entry.status_text)
        self._run.log({**entry.scalars, **images, entry.status_tag: text, STEP: entry.step})
        levels = {
            "info": trackio.AlertLevel.INFO,
            "warning": trackio.AlertLevel.WARN,
            "error": trackio.AlertLevel.ERROR,
        }
        # Trackio prints each alert, which the terminal has already.
        with contextlib.redirect_stdout(io.StringIO()):
            for notice in entry.notices:
                self._run.alert(notice.title, notice.text, level=levels[notice.level], step=notice.step)

    def add_report(self, path: Path, step: int) -> None:
        """A page of the run, whose last value is the report as it is now."""
        import trackio

        self._run.log({f"{ROOT} report": trackio.Html(path, inject=False), STEP: step})
