"""MLflow: the run that the trainer's callback has open, by its id, so that it takes what comes after the callback ended it."""

from __future__ import annotations

import re
from typing import Any, Self

from align_audit.errors import plain
from align_audit.writers.trackers.entry import ROOT, Entry, Notice

_LONGEST_TAG = 4000
"""Characters of a tag's value; every store takes 5,000."""


class MlflowRun:
    """Curves by training step, pictures with a slider over steps, status and alerts as tags: MLflow has no alerts.

    Args:
        client: an ``MlflowClient``.
        run: as ``mlflow.active_run()`` gives it.
    """

    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self._id = run.info.run_id
        self.place = plain(f"MLflow run {run.info.run_name or self._id}", 100)

    @classmethod
    def opened(cls) -> Self | None:
        """The process's run; None where none is open."""
        import mlflow

        run = mlflow.active_run()
        return None if run is None else cls(mlflow.MlflowClient(), run)

    def add(self, entry: Entry) -> None:
        """See :class:`~align_audit.writers.trackers.entry.Tracker`; the status is some tags."""
        from mlflow.entities import Metric, RunTag

        now = int(entry.time * 1000)
        metrics = [Metric(_name(tag), value, now, entry.step) for tag, value in entry.scalars.items()]
        tags = [RunTag(_name(f"{ROOT}.{key}"), text[:_LONGEST_TAG]) for key, text in entry.status.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)
        for tag, pixels in entry.pictures.items():
            self._client.log_image(self._id, pixels, key=_name(tag), step=entry.step, timestamp=now)

    def notify(self, notice: Notice) -> None:
        """A tag for each cause: its newest notice."""
        text = f"{notice.title}\n{notice.text}"[:_LONGEST_TAG]
        self._client.set_tag(self._id, _name(f"{ROOT}.alert.{notice.key}"), text)

    def add_report(self, page: str) -> None:
        """The artifact ``align_audit/report.html``, written over."""
        self._client.log_text(self._id, page, f"{ROOT}/report.html")


def _name(text: str) -> str:
    """A name of a metric, an image or a tag: what every store takes of it, up to 250 characters."""
    return re.sub(r"[^0-9A-Za-z_\-. /]", "_", text)[:250]
