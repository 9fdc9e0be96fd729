"""Records into the trackers that the trainer reports to: the ten curves, two pictures, status, alerts and the report.

A tracker that breaks (no network, a run that was closed, a bad key) breaks nothing: it is said once, and training goes on.
"""

from __future__ import annotations

import atexit
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align_audit.errors import ConfigurationError, named, pass_exit_on, plain, without_secrets
from align_audit.options.trackers import TrackerName
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, RecordKey
from align_audit.record.course import present_course
from align_audit.record.log import FOLDER, Failure
from align_audit.record.run import AuditRun, run_so_far, with_this
from align_audit.record.stored_records import chosen, heads_of
from align_audit.record.training_log import LogRow
from align_audit.writers.few_pictures import drawn_records, few_pictures
from align_audit.writers.standing import Standing, standing_at
from align_audit.writers.trackers.entry import Entry, Notice, Tracker
from align_audit.writers.trackers.mlflow_run import MlflowRun
from align_audit.writers.trackers.sender import CLOSING_SECONDS, MOST_WAITING, Sender
from align_audit.writers.trackers.trackio_run import TrackioRun
from align_audit.writers.trackers.wandb_run import WandbRun
from align_audit.writers.web.page import page
from align_audit.writers.web.page_data import page_data

if TYPE_CHECKING:
    import numpy as np

    from align_audit.config import AuditConfig
    from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)

OPENERS: Mapping[TrackerName, Callable[[], Tracker | None]] = {
    "wandb": WandbRun.opened,
    "mlflow": MlflowRun.opened,
    "trackio": TrackioRun.opened,
}
"""Each gives the run that is open in this process, None where there is none."""
TITLES: Mapping[TrackerName, str] = {"wandb": "W&B", "mlflow": "MLflow", "trackio": "Trackio"}

_MOST_FAILED = 100
"""Audits that broke and wait; those on top of that say the same once more."""
_PICTURES = "pictures"
_SHORT = 0.02
"""Seconds between two looks at whether there is room, at the end of a run."""


class TrackerWriter:
    """Sends each audit to one tracker, once its run is open; what came before is sent then.

    A thread of its own sends (:class:`~align_audit.writers.trackers.sender.Sender`): training waits while pictures are drawn,
    and at its end :data:`~align_audit.writers.trackers.sender.CLOSING_SECONDS` at most.

    Args:
        name: of the tracker.
        output_dir: of the training.
        training_log: gives what the trainer has logged so far.
        probe_names: of all sets that are audited.
        report: send the page of the run where an alert opens or gets worse, where audits begin to break, and at the end.
        texts: the page shows texts of probe pairs.
    """

    def __init__(
        self,
        name: TrackerName,
        output_dir: Path,
        training_log: Callable[[], Sequence[LogRow]] = tuple,
        *,
        probe_names: Sequence[str | None] = (None,),
        report: bool = True,
        texts: bool = False,
    ) -> None:
        self.name = TITLES[name]
        self._open = OPENERS[name]
        self._output_dir = output_dir
        self._directory = output_dir / FOLDER
        self._training_log = training_log
        self._probe_names, self._report, self._texts = probe_names, report, texts
        self._sender: Sender | None = None
        self._tried: set[RecordKey] = set()
        """The audits that were taken, or were made by an earlier process."""
        self._waiting: list[RecordKey] = []
        """Those that the tracker has no room for, or no run yet."""
        self._history: Sequence[AuditRecord] = ()
        """Of the run, at the audit that came last, which is in it."""
        self._failed: list[Entry] = []
        """Audits that broke, of which nobody was told yet."""
        self._broken: set[str | None] = set()
        """The probe sets whose last audit broke."""
        self._recovered: set[RecordKey] = set()
        """The audits that came through after one that broke."""
        self._report_due = False
        self._end = math.inf
        """When nothing more is begun, of ``time.monotonic``."""
        self._news = False
        """Was there anything to send in this process?"""
        self._lost: list[int] = []
        self._said: set[str] = set()

    def start(self, run: AuditRun) -> None:
        """Find the run, and remember what is no news: an earlier process has sent it, but for what nobody was told of."""
        self._directory, self._history = run.directory, run.records
        untold = [head.key for head in heads_of(run.untold)]
        self._tried = {head.key for head in heads_of(run.records)} - set(untold)
        self._guarded("find the run of", self._find_sender)
        for key in untold:
            self._take(key)

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Send an audit, with those that could not be sent before it."""
        self._history = with_this(history, record)
        if record.provenance.probe_name in self._broken:
            self._broken.discard(record.provenance.probe_name)
            self._recovered.add(record.key)
        self._take(record.key)

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """It is sent with its record."""

    def failure(self) -> None:
        """Send that the run is blind, with a notice at the first audit that breaks of a probe set."""
        self._guarded("write an audit that broke to", self._take_failure)
        self._guarded("write an audit that broke to", self._hand_over)

    def close(self) -> None:
        """Send what is left, and the report as it is now. The run is the trainer's to close."""
        if not self._news:
            return
        self._news = False
        atexit.unregister(self.close)
        self._guarded("write the end of the run to", self._send_rest)

    def _take(self, key: RecordKey) -> None:
        if key in self._tried:
            return
        self._tried.add(key)
        self._waiting.append(key)
        self._wake()
        self._guarded(f"write step {key[0]} to", self._hand_over)

    def _wake(self) -> None:
        """There is something to send; a training that breaks closes no writer, and its last alerts are those that count."""
        if not self._news:
            self._news = True
            atexit.register(self.close)

    def _find_sender(self) -> Sender | None:
        """Asked for in training's thread: the clients know their run by it."""
        if self._sender is None and (tracker := self._open()) is not None:
            self._sender = Sender(self.name, tracker)
        return self._sender

    def _hand_over(self) -> None:
        """Audits, and the report where it is due and there is room."""
        sender = self._hand_over_audits()
        if sender is not None and self._report_due and not sender.full:
            self._send_report(sender)

    def _hand_over_audits(self) -> Sender | None:
        """What there is room and time for: pictures of many audits take long to draw. None: no run is open."""
        sender = self._find_sender()
        if sender is None:
            return None
        for _ in range(MOST_WAITING):
            if not (self._waiting or self._failed) or sender.full or time.monotonic() >= self._end:
                break
            entry = self._next_entry()
            if entry is not None:
                sender.send(entry)
                self._report_due |= any(notice.event != "resolved" for notice in entry.notices)
        if sender.full:
            self._say("full", f"waits for {self.name}, which has not answered for {MOST_WAITING} audits")
        return sender

    def _next_entry(self) -> Entry | None:
        """The next one to be sent, which waits no longer; None: it could not be made, which is said."""
        if not self._waiting or (self._failed and self._failed[0].step <= self._waiting[0][0]):
            return self._failed.pop(0)
        key = self._waiting.pop(0)
        try:
            entry = self._entry(chosen(self._history, lambda head: head.key == key)[-1])
        except (Exception, SystemExit) as error:
            pass_exit_on(error)
            self._lost.append(key[0])
            self._say(type(error).__name__, f"could not write step {key[0]} to {self.name}: {named(error)}")
            return None
        self._said &= {_PICTURES}  # of what breaks from here on, each kind is news
        return entry

    def _entry(self, record: AuditRecord) -> Entry:
        standing = standing_at(record, self._history, self._training_log())
        entry = Entry.of(standing, self._pictures(record, standing), self._output_dir)
        if record.key in self._recovered:
            entry = replace(entry, notices=[Notice.of_success(record), *entry.notices])
        return entry

    def _pictures(self, record: AuditRecord, standing: Standing) -> dict[str, np.ndarray]:
        """A health audit has no more to show than its curves. Curves and alerts go without pictures that cannot be drawn."""
        from align_audit.writers.plots.canvas import pixels

        if record.kind == "health":
            return {}
        try:
            drawn = few_pictures(standing, drawn_records(record, self._history))
            images = {tag: pixels(figure) for tag, figure in drawn.items()}
        except (Exception, SystemExit) as error:
            pass_exit_on(error)
            self._say(_PICTURES, f"could not draw step {record.step} for {self.name}: {named(error)}")
            return {}
        self._said.discard(_PICTURES)
        return images

    def _take_failure(self) -> None:
        run = run_so_far(self._directory, self._history, self._training_log())
        failure = run.failures[-1]
        # One without a name broke before any set was come to.
        for name in self._probe_names if failure.probe_name is None else [failure.probe_name]:
            self._take_failure_of(name, failure.model_copy(update={"probe_name": name}), run)
        self._wake()

    def _take_failure_of(self, name: str | None, failure: Failure, run: AuditRun) -> None:
        here = run.select(name) if name in run.probe_names else replace(run, records=[])
        records = present_course(here.records)
        turns = name not in self._broken
        self._broken.add(name)
        if turns or len(self._failed) < _MOST_FAILED:
            standing = standing_at(records[-1], records, run.training_log) if records else None
            notices = [Notice.of_failure(failure, here.status, self._output_dir)] if turns else []
            self._failed.append(Entry.of_failure(failure, here.status, standing, notices))

    def _send_report(self, sender: Sender) -> None:
        """Made anew: the file beside the log may be of an earlier process, and has texts of the data."""
        self._report_due = False
        if self._report:
            run = run_so_far(self._directory, self._history, self._training_log())
            sender.send_report(page(page_data(run, texts=self._texts)).decode())

    def _send_rest(self) -> None:
        self._end = end = time.monotonic() + CLOSING_SECONDS
        sender = self._find_sender()
        if sender is None:
            raise RuntimeError("the trainer reports to it, and no run of it was open while audits were made")
        sender.hurry()
        self._guarded("write the end of the run to", self._hand_over_audits)
        # Until there is room for the report, too: of what finds none, nothing is sent.
        while (self._waiting or self._failed or sender.full) and time.monotonic() < end:
            time.sleep(_SHORT)
            self._guarded("write the end of the run to", self._hand_over_audits)
        # Once, after all audits.
        self._guarded("send the report to", lambda: self._send_report(sender))
        sender.close(end - time.monotonic())
        self._sender = None
        steps = [*self._lost, *(key[0] for key in self._waiting), *(entry.step for entry in self._failed)]
        self._waiting, self._failed, self._lost = [], [], []
        if missing := sender.missing(steps):
            logger.error(
                "align_audit could not send everything to %s: %s did not get through. All of it is in %s",
                *(self.name, missing, plain(self._directory)),
            )

    def _guarded(self, what: str, send: Callable[[], object]) -> None:
        """What breaks is said once a kind of error, without what may be secret in an address."""
        try:
            send()
        except (Exception, SystemExit) as error:
            pass_exit_on(error)
            self._say(type(error).__name__, f"could not {what} {self.name}: {named(error)}")

    def _say(self, kind: str, words: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.error(
                "align_audit %s; that is said once, training goes on, and all of it is in align_audit/records.jsonl",
                without_secrets(words),
            )


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
    """Where a run is written, in a line, and what trackers are sent of it.

    That begins like ``align_audit writes to runs/dpo/align_audit, W&B run calm-river-3``.
    """
    places = [str(surroundings.output_dir / FOLDER)]
    if config.tensorboard != "off" and (board := surroundings.trainers_tensorboard()) is not None:
        places.append(f"TensorBoard {board.log_dir}")
    names = chosen_trackers(config, surroundings)
    for name in names:
        tracker = OPENERS[name]()
        places.append(f"{TITLES[name]} (once its run is open)" if tracker is None else tracker.place)
    return plain(f"align_audit writes to {', '.join(places)}{f'; {_contents(config)}' if names else ''}")


def _contents(config: AuditConfig) -> str:
    """What a tracker is sent, in words."""
    if not config.report:
        return "trackers get curves, pictures and alerts"
    texts = "with texts of probe pairs" if config.trackers_texts else "without texts of the data"
    return f"trackers get curves, pictures, alerts and the report, {texts}"


def maker(name: TrackerName) -> Callable[[AuditConfig, Surroundings], TrackerWriter | None]:
    """Makes the writer to this tracker, where it is one of the chosen (raises as :func:`chosen_trackers`)."""

    def make(config: AuditConfig, surroundings: Surroundings) -> TrackerWriter | None:
        if name not in chosen_trackers(config, surroundings):
            return None
        return TrackerWriter(
            name,
            surroundings.output_dir,
            surroundings.training_log,
            probe_names=surroundings.probe_names,
            report=config.report,
            texts=config.trackers_texts,
        )

    return make
