"""Trackio: the run that the trainer's callback has open, which takes what comes after the callback finished it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Self

from align_audit.errors import plain
from align_audit.writers.messages import without_markup
from align_audit.writers.trackers.entry import LONGEST_TITLE, ROOT, STEP, Entry, Notice


class TrackioRun:
    """Curves over ``train/global_step``, as the trainer's are.

    No ``step`` is given: Trackio goes on counting from the largest one that it was given, so that the trainer's next point,
    which has none, would move.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._alert = _silent(run.alert)
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

    def notify(self, notice: Notice) -> None:
        """An alert, which Trackio may hand on to Slack as it is."""
        import trackio

        levels = {
            "info": trackio.AlertLevel.INFO,
            "warning": trackio.AlertLevel.WARN,
            "error": trackio.AlertLevel.ERROR,
        }
        title, text = plain(without_markup(notice.title), LONGEST_TITLE), without_markup(notice.text)
        self._alert(title, text, level=levels[notice.level], step=notice.step)

    def add_report(self, page: str) -> None:
        """A page of the run, whose last value is the report as it is now."""
        import trackio

        self._run.log({f"{ROOT} report": trackio.Html(page, inject=False)})


def _silent(method: Any) -> Callable[..., Any]:
    """A client's method that prints nothing: Trackio prints each alert, which the terminal has already.

    It is the same code with a ``print`` of its own. The process's standard output stays as it is: what other threads print
    meanwhile is theirs.
    """
    function = getattr(method, "__func__", None)
    if not isinstance(function, FunctionType):
        return method  # type: ignore[no-any-return]
    names = {**function.__globals__, "print": lambda *_, **__: None}
    silent = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    silent.__kwdefaults__ = function.__kwdefaults__
    return silent.__get__(method.__self__)
