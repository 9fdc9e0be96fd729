"""Weights & Biases: the run that the trainer's callback has open."""

from __future__ import annotations

from typing import Any, Self

from align_audit.errors import plain
from align_audit.writers.messages import without_markup
from align_audit.writers.trackers.entry import LONGEST_TITLE, ROOT, STEP, Entry, Notice

_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
_NO_WAIT = 0.001
"""Seconds between two alerts of one title. Not 0, which stands for a minute in which all but the first are dropped."""


class WandbRun:
    """Curves over ``train/global_step``, as the trainer's are: a ``step`` would be W&B's own count of what was logged."""

    def __init__(self, run: Any) -> None:
        self._run = run
        mode = run.settings.mode
        self.place = plain(f"W&B run {run.name or run.id}", 100) + ("" if mode == "online" else f" ({mode})")

    @classmethod
    def opened(cls) -> Self | None:
        """The process's run; None where none is open."""
        import wandb

        return None if wandb.run is None else cls(wandb.run)

    def add(self, entry: Entry) -> None:
        """See :class:`~align_audit.writers.trackers.entry.Tracker`; the status stands in the run's summary."""
        import wandb

        images = {tag: wandb.Image(pixels) for tag, pixels in entry.pictures.items()}
        self._run.log({**entry.scalars, **images, STEP: entry.step})
        self._run.summary.update({f"{ROOT}/{key}": text for key, text in entry.status.items()})

    def notify(self, notice: Notice) -> None:
        """An alert, which W&B hands on to Slack as it is."""
        title, text = plain(without_markup(notice.title), LONGEST_TITLE), without_markup(notice.text)
        self._run.alert(title, text, level=_LEVELS[notice.level], wait_duration=_NO_WAIT)

    def add_report(self, page: str) -> None:
        """A panel of the run, whose last value is the report as it is now."""
        import wandb

        self._run.log({f"{ROOT}/report": wandb.Html(page, inject=False, data_is_not_path=True)})
