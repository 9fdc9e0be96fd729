"""Records into the trackers that the trainer reports to: the ten curves, two pictures, status, alerts and the report.

A tracker that breaks (no network, a run that was closed, a bad key) breaks nothing: it is said once, and training goes on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.errors import ConfigurationError, named, plain
from align_audit.options.trackers import TrackerName
from align_audit.record.audit_record import Alert, AuditRecord, RecordKey
from align_audit.record.log import FOLDER, REPORT
from align_audit.record.stored_records import heads_of
from align_audit.record.training_log import LogRow
from align_audit.writers.few_pictures import drawn_records, few_pictures
from align_audit.writers.standing import standing_at
from align_audit.writers.trackers.entry import Entry, Tracker
from align_audit.writers.trackers.mlflow_run import MlflowRun
from align_audit.writers.trackers.trackio_run import TrackioRun
from align_audit.writers.trackers.wandb_run import WandbRun

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.record.run import AuditRun
    from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)

OPENERS: Mapping[TrackerName, Callable[[], Tracker | None]] = {
    "wandb": WandbRun.opened,
    "mlflow": MlflowRun.opened,
    "trackio": TrackioRun.opened,
}
"""Each gives the run that is open in this process, None where there is none."""
TITLES: Mapping[TrackerName, str] = {"wandb": "W&B", "mlflow": "MLflow", "trackio": "Trackio"}


_REST = 10.0
"""After a try that broke, times as long as it took in which no other is made: a server that is gone costs training a tenth."""


class TrackerWriter:
    """Sends each audit to one tracker, once its run is open; what came before is sent then.

    Args:
        name: of the tracker.
        output_dir: of the training, below which the report lies.
        training_log: gives what the trainer has logged so far.
    """

    def __init__(
        self, name: TrackerName, output_dir: Path, training_log: Callable[[], Sequence[LogRow]] = tuple
    ) -> None:
        self.name = TITLES[name]
        self._open = OPENERS[name]
        self._output_dir = output_dir
        self._training_log = training_log
        self._tracker: Tracker | None = None
        self._tried: set[RecordKey] = set()
        """The audits that were sent, or broke on the way, or were made by an earlier process."""
        self._waiting: list[AuditRecord] = []
        self._history: Sequence[AuditRecord] = []
        """Of the run, at the audit that came last."""
        self._report_sent: tuple[int, int] | None = None
        """Size and time of the report that was sent last."""
        self._step = 0
        self._said: set[str] = set()
        self._rests_until = 0.0

    def start(self, run: AuditRun) -> None:
        """Find the run, and remember what is no news: an earlier process has sent it."""
        self._tried = {head.key for head in heads_of(run.records)}
        self._guarded("find the run of", self._find_tracker)

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Send an audit, with those that could not be sent before it."""
        if record.key in self._tried or any(waiting.key == record.key for waiting in self._waiting):
            return
        self._waiting.append(record)
        self._step = max(self._step, record.step)
        self._history = history
        if time.monotonic() >= self._rests_until:
            self._guarded(f"write step {record.step} to", self._send)

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """It is sent with its record."""

    def close(self) -> None:
        """Send what is left, and the report as it is now. The run is the trainer's to close."""
        if self._waiting or self._tried:
            self._guarded("write the end of the run to", self._send_rest)

    def _find_tracker(self) -> Tracker | None:
        if self._tracker is None:
            self._tracker = self._open()
        return self._tracker

    def _send(self) -> None:
        tracker = self._find_tracker()
        if tracker is None:
            return
        changed = False
        while self._waiting:
            # An audit that breaks would break again, and hold up the others.
            record = self._waiting.pop(0)
            self._tried.add(record.key)
            entry = self._entry(record, self._history)
            tracker.add(entry)
            changed |= bool(entry.pictures or entry.notices)
        if changed:
            self._send_report(tracker)

    def _send_rest(self) -> None:
        self._send()
        if self._tracker is not None:
            self._send_report(self._tracker)
        elif self._waiting:
            raise RuntimeError("the trainer reports to it, and no run of it was open while audits were made")

    def _entry(self, record: AuditRecord, history: Sequence[AuditRecord]) -> Entry:
        from align_audit.writers.plots.canvas import pixels

        standing = standing_at(record, history, self._training_log())
        # A health audit has no more to show than its curves.
        drawn = {} if record.kind == "health" else few_pictures(standing, drawn_records(record, history))
        return Entry.of(standing, {tag: pixels(figure) for tag, figure in drawn.items()}, self._output_dir)

    def _send_report(self, tracker: Tracker) -> None:
        """Where there is one, and it is another than was sent last."""
        path = self._output_dir / FOLDER / REPORT
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        version = (status.st_size, status.st_mtime_ns)
        if version != self._report_sent:
            self._report_sent = version
            tracker.add_report(path, self._step)

    def _guarded(self, what: str, send: Callable[[], object]) -> None:
        """What breaks is said once a kind of error, without what may be secret in an address."""
        began = time.monotonic()
        try:
            send()
        except (Exception, SystemExit) as error:
            now = time.monotonic()
            self._rests_until = now + _REST * (now - began)
            kind = type(error).__name__
            if kind not in self._said:
                self._said.add(kind)
                logger.error(
                    "align_audit could not %s %s: %s; that is said once, training goes on, and all of it is in "
                    "align_audit/records.jsonl",
                    *(what, self.name, _without_secrets(named(error))),
                )


def _without_secrets(words: str) -> str:
    """A client's words in a line, without the user and password of an address and what follows its question mark.

    Example:
        >>> _without_secrets("cannot reach http://me:pass@host/api?key=1")
        'cannot reach http://…@host/api?…'
    """
    shown = re.sub(r"://[^/\s@]*@", "://…@", words)
    return plain(re.sub(r"(://[^\s?]*\?)\S+", r"\1…", shown), 400)


def chosen_trackers(config: AuditConfig, surroundings: Surroundings) -> list[TrackerName]:
    """The trackers that are written to.

    Raises:
        ConfigurationError: one is asked for that the trainer does not report to.
    """
    reported, wanted = surroundings.trackers, config.trackers
    if wanted == "auto":
        return list(reported)
    if wanted == "off":
        return []
    for name in wanted:
        if name not in reported:
            to = ", ".join(reported) or "no tracker"
            raise ConfigurationError(
                f"the option trackers asks for {name}, and the trainer reports to {to}; expected one that it reports to: add "
                f"{name!r} to report_to of the training arguments, or take it out of trackers"
            )
    return list(wanted)


def destinations(config: AuditConfig, surroundings: Surroundings) -> str:
    """Where a run is written, in a line: ``align_audit writes to runs/dpo/align_audit, W&B run calm-river-3``."""
    places = [str(surroundings.output_dir / "align_audit")]
    if config.tensorboard != "off" and (board := surroundings.trainers_tensorboard()) is not None:
        places.append(f"TensorBoard {board.log_dir}")
    for name in chosen_trackers(config, surroundings):
        tracker = OPENERS[name]()
        places.append(f"{TITLES[name]} (once its run is open)" if tracker is None else tracker.place)
    return plain(f"align_audit writes to {', '.join(places)}")


def maker(name: TrackerName) -> Callable[[AuditConfig, Surroundings], TrackerWriter | None]:
    """Makes the writer to this tracker, where it is one of the chosen (raises as :func:`chosen_trackers`)."""

    def make(config: AuditConfig, surroundings: Surroundings) -> TrackerWriter | None:
        if name not in chosen_trackers(config, surroundings):
            return None
        return TrackerWriter(name, surroundings.output_dir, surroundings.training_log)

    return make
