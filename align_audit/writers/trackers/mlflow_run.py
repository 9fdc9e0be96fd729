"""MLflow: the run that the trainer's callback has open, by its id, so that it takes what comes after the callback ended it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Self

from align_audit.errors import plain
from align_audit.writers.trackers.entry import ROOT, Entry

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
        """See :class:`~align_audit.writers.trackers.entry.Tracker`. An alert is a tag of its rule: its newest notice."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(_name(tag), value, now, entry.step) for tag, value in entry.scalars.items()]
        texts = {f"{ROOT}.{key}": text for key, text in entry.status.items()}
        texts |= {f"{ROOT}.alert.{notice.rule}": f"{notice.title}\n{notice.text}" for notice in entry.notices}
        tags = [RunTag(_name(key), text[:_LONGEST_TAG]) for key, text in texts.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)
        for tag, pixels in entry.pictures.items():
            self._client.log_image(self._id, pixels, key=_name(tag), step=entry.step, timestamp=now)

    def add_report(self, path: Path, step: int) -> None:
        """The artifact ``align_audit/report.html``, written over."""
        self._client.log_artifact(self._id, str(path), ROOT)


def _name(text: str) -> str:
    """A name of a metric, an image or a tag: what every store takes of it, up to 250 characters."""
    return re.sub(r"[^0-9A-Za-z_\-. /]", "_", text)[:250]
