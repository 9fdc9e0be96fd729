"""The real clients of W&B, MLflow and Trackio, offline, and what their own stores hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest
from PIL import Image

Curves = dict[str, dict[int, float]]
"""Tag → training step → value."""


@dataclass
class Stored:
    """What a tracker keeps of one run.

    Attributes:
        notices: (level, title, text) of each alert, by time; of MLflow, which keeps tags, the newest of each cause.
        status: the texts of the status; of Trackio only that for people.
        report: the page as a reader opens it now.
        report_step: where on the axis of training steps it moves the run to; None: nowhere.
        axis: of the trainer's loss: what the tracker itself numbers its points by.
    """

    curves: Curves
    pictures: dict[str, dict[int, tuple[int, int]]]
    notices: list[tuple[str, str, str]]
    status: str
    report: str | None
    report_step: int | None = None
    axis: list[int] = field(default_factory=list)


class Store(Protocol):
    """One tracker, whose runs lie below a folder of the tests."""

    name: str

    def run(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A run that is open within, as the trainer's callback opens one."""

    def read(self, name: str) -> Stored:
        """What is kept of the run of this name, once it is closed."""

    def train(self, step: int) -> None:
        """What the trainer's callback logs at a step."""

    def finish(self) -> None:
        """Close the run that a trainer left open."""


# --- W&B --------------------------------------------------------------------------------------------------------------


class WandbStore:
    """Runs of ``WANDB_MODE=offline``: a log of protobuf records, and files beside it."""

    name: ClassVar[str] = "wandb"

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("wandb", reason="wandb is not installed: pip install 'align-audit[trackers]'")
        self._folder = folder
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}

    @contextlib.contextmanager
    def run(self, name: str) -> Iterator[None]:
        import wandb

        with wandb.init(project="tests", name=name) as run:
            run.define_metric("train/global_step")
            run.define_metric("*", step_metric="train/global_step", step_sync=True)
            yield

    def train(self, step: int) -> None:
        import wandb

        wandb.log({"train/loss": 0.7, "train/global_step": step})

    def finish(self) -> None:
        import wandb

        wandb.finish()

    def logs(self) -> list[Path]:
        """Of all runs so far."""
        return list(self._folder.glob("wandb/offline-run-*/*.wandb"))

    def read(self, name: str) -> Stored:
        # Another process writes the log, and goes on for a moment after the run was finished.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for path in self.logs():
                records = list(wandb_records(path.read_bytes()))
                named = any(record.HasField("run") and record.run.display_name == name for record in records)
                if named and any(record.HasField("exit") for record in records):
                    return self._stored(records, path.parent / "files")
            time.sleep(0.05)
        raise AssertionError(f"no finished run {name!r} below {self._folder}")

    def _stored(self, records: list[Any], files: Path) -> Stored:
        stored = Stored(defaultdict(dict), defaultdict(dict), [], "", None)
        status: dict[str, str] = {}
        for record in records:
            if record.HasField("alert"):
                alert = record.alert
                stored.notices.append((alert.level, alert.title, alert.text))
            if record.HasField("summary"):
                status |= {key: value for key, value in _items(record.summary.update).items() if isinstance(value, str)}
            if record.HasField("history"):
                self._add(stored, _items(record.history.item), files)
        stored.status = "\n".join(f"{key}: {text}" for key, text in status.items())
        return stored

    def _add(self, stored: Stored, row: dict[str, Any], files: Path) -> None:
        if "train/loss" in row:
            stored.axis.append(row["_step"])
        step = row.get("train/global_step", -1)
        for tag, value in row.items():
            kind = value.get("_type") if isinstance(value, dict) else None
            if kind == "image-file":
                with Image.open(files / value["path"]) as image:
                    stored.pictures[tag][step] = image.size
            elif kind == "html-file":
                stored.report = (files / value["path"]).read_text()
                stored.report_step = row.get("train/global_step")
            elif isinstance(value, int | float):
                stored.curves[tag][step] = value


def _items(items: Any) -> dict[str, Any]:
    """Key → value; one with parts, as a picture has them, is a dict."""
    row: dict[str, Any] = {}
    for item in items:
        key, *part = list(item.nested_key) or [item.key]
        value = json.loads(item.value_json)
        if part:
            row.setdefault(key, {})[part[0]] = value
        else:
            row[key] = value
    return row


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, of chunks with a checksum, a length and a kind each.

    Ends before a chunk that is not whole: the log of a run that another process still writes is cut anywhere.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk of a record
            yield Record.FromString(whole)
            whole = b""


# --- MLflow -----------------------------------------------------------------------------------------------------------


class MlflowStore:
    """A SQLite store, and artifacts beside it."""

    name: ClassVar[str] = "mlflow"

    def __init__(self, folder: Path) -> None:
        mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'align-audit[trackers]'")
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'runs.db'}")
        mlflow.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
        os.environ["MLFLOW_EXPERIMENT_NAME"] = "tests"
        mlflow.set_experiment("tests")

    @contextlib.contextmanager
    def run(self, name: str) -> Iterator[None]:
        import mlflow

        with mlflow.start_run(run_name=name):
            yield

    def train(self, step: int) -> None:
        import mlflow

        mlflow.log_metric("loss", 0.7, step)

    def finish(self) -> None:
        """Its callback ends what it began."""

    def read(self, name: str) -> Stored:
        import mlflow

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tests")
        runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        assert len(runs) == 1
        run = runs[0]
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        curves: Curves = {
            tag: {point.step: point.value for point in client.get_metric_history(run.info.run_id, tag)}
            for tag in run.data.metrics
        }
        pictures: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        for path in sorted((folder / "images").glob("**/*.png")):
            tag, _, step, *_ = str(path.relative_to(folder / "images")).replace("%", "+").split("+")
            with Image.open(path) as image:
                pictures[tag.replace("~", "/").replace("#", "/")][int(step)] = image.size
        tags = {key: text for key, text in run.data.tags.items() if key.startswith("align_audit")}
        notices = [("", *text.split("\n", 1)) for key, text in tags.items() if key.startswith("align_audit.alert.")]
        status = "\n".join(f"{key}: {text}" for key, text in tags.items() if ".alert." not in key)
        report = folder / "align_audit" / "report.html"
        axis = sorted(curves.get("loss", {}))
        return Stored(curves, pictures, notices, status, report.read_text() if report.exists() else None, axis=axis)


# --- Trackio ----------------------------------------------------------------------------------------------------------


class TrackioStore:
    """A local project: a SQLite file, and media beside it."""

    name: ClassVar[str] = "trackio"

    def __init__(self, folder: Path) -> None:
        os.environ["TRACKIO_DIR"] = str(folder)  # read once, when it is imported
        pytest.importorskip("trackio", reason="trackio is not installed: pip install 'align-audit[trackers]'")
        from trackio.utils import TRACKIO_DIR

        self._folder = TRACKIO_DIR

    @contextlib.contextmanager
    def run(self, name: str) -> Iterator[None]:
        import trackio

        trackio.init(project="tests", name=name, resume="allow", embed=False)
        try:
            yield
        finally:
            trackio.finish()

    def train(self, step: int) -> None:
        import trackio

        trackio.log({"train/loss": 0.7, "train/global_step": step})

    def finish(self) -> None:
        """Its callback finishes what it began."""

    def read(self, name: str) -> Stored:
        from trackio.sqlite_storage import SQLiteStorage

        stored = Stored(defaultdict(dict), defaultdict(dict), [], "", None)
        project = next(each for each in SQLiteStorage.get_projects() if name in SQLiteStorage.get_runs(each))
        for row in SQLiteStorage.get_logs(project, name):
            if "train/loss" in row:
                stored.axis.append(row["step"])
            step = row.get("train/global_step", -1)
            for tag, value in row.items():
                kind = value.get("_type") if isinstance(value, dict) else None
                if kind == "trackio.image":
                    with Image.open(self._folder / "media" / value["file_path"]) as image:
                        stored.pictures[tag][step] = image.size
                elif kind == "trackio.html":
                    stored.report = (self._folder / "media" / value["file_path"]).read_text()
                    stored.report_step = row.get("train/global_step")
                elif kind == "trackio.markdown":
                    stored.status = value["_value"]
                elif isinstance(value, int | float) and tag != "step":  # its count of what was logged
                    stored.curves[tag][step] = value
        alerts = [alert for alert in SQLiteStorage.get_alerts(project) if alert["run"] == name]
        alerts.sort(key=lambda alert: alert["timestamp"])
        stored.notices = [(alert["level"], alert["title"], alert["text"]) for alert in alerts]
        return stored


STORES = (WandbStore, MlflowStore, TrackioStore)
