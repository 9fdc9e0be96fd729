"""What a tracker is given of a run: an entry an audit, a notice for what happens to an alert; and what a tracker is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from align_audit.errors import plain
from align_audit.options.rules import CAUSES
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import Failure
from align_audit.record.status import Status
from align_audit.record.stored_records import events_of
from align_audit.writers.few_scalars import HEALTH, STATUS_VALUES, few_scalars, group_of, status_text
from align_audit.writers.markdown import escaped
from align_audit.writers.messages import paragraphs
from align_audit.writers.standing import Standing

if TYPE_CHECKING:
    import numpy as np

STEP = "train/global_step"
"""What transformers' callbacks call the training step in W&B and Trackio, which count what is logged otherwise."""
ROOT = "align_audit"

LONGEST_TITLE = 63
"""Characters; W&B takes less than 64."""
_LONGEST_LINE = 2000
_AUDITS = "audits"
"""The key of notices of audits that break."""


def _beside(probe_name: str | None, key: str) -> str:
    return key if probe_name is None else f"{probe_name}.{key}"


@dataclass(frozen=True)
class Notice:
    """An alert that opened, got worse or is over, in texts of printable characters.

    Attributes:
        key: what every notice of this alert has in common: its cause. The rule, and the probe set that it is seen on, may be
            others at each audit.
        event: what happened.
        level: ``info`` where it is over.
        title: a line of less than 64 characters.
        text: all that is said of it, a paragraph a line.
    """

    key: str
    event: Literal["opened", "worse", "resolved"]
    level: Literal["info", "warning", "error"]
    title: str
    text: str
    step: int

    @classmethod
    def of(cls, alert: Alert, directory: Path | None = None) -> Notice:
        """What is said of an alert.

        Args:
            directory: the folder of the run, which the text ends with.
        """
        event = "opened" if alert.event == "open" else alert.event
        begin = "RESOLVED" if event == "resolved" else f"{alert.level.upper()} {event}"
        key = alert.cause or alert.rule
        return cls(
            key,
            event,
            "info" if event == "resolved" else alert.level,
            plain(f"{ROOT} {begin}: {CAUSES.get(alert.cause) or key}", LONGEST_TITLE),
            "\n".join(paragraphs(alert, directory)),
            alert.step,
        )

    @classmethod
    def of_failure(cls, failure: Failure, status: Status, directory: Path | None = None) -> Notice:
        """That audits break: what is seen of training from here on is nothing."""
        key = _beside(failure.probe_name, _AUDITS)
        lines = [
            f"Audits break since step {failure.step}",
            status.reason,
            "To do: read the traceback in align_audit/failures.jsonl; training goes on, and nothing watches it",
            "" if directory is None else f"run: {directory}",
        ]
        text = "\n".join(plain(line, _LONGEST_LINE) for line in lines if line)
        title = plain(f"{ROOT} BLIND, audits break: {key}", LONGEST_TITLE)
        return cls(key, "opened", "error", title, text, failure.step)

    @classmethod
    def of_success(cls, record: AuditRecord) -> Notice:
        """That an audit came through after some broke."""
        key = _beside(record.provenance.probe_name, _AUDITS)
        text = f"RESOLVED at step {record.step}: audits come through again"
        return cls(key, "resolved", "info", plain(f"{ROOT} RESOLVED: {key}", LONGEST_TITLE), text, record.step)


@dataclass(frozen=True)
class Entry:
    """How a run stands at an audit, or when one broke.

    Attributes:
        scalars: tag → value, finite; those of :mod:`align_audit.writers.few_scalars`.
        status: ``status``, ``status_since``, ``status_reason`` and ``rules`` (those of open warnings and errors), each a text;
            of a named probe set with the name and a dot before.
        status_tag, status_text: the same for people, in Markdown, and what it is called.
        pictures: tag → RGB image, ``uint8`` of shape (height, width, 3).
        notices: of warnings and errors to which something happened.
        time: when it came to be, in seconds since the epoch: a second try is not another point.
    """

    step: int
    scalars: Mapping[str, float]
    status: Mapping[str, str]
    status_tag: str
    status_text: str
    pictures: Mapping[str, np.ndarray]
    notices: Sequence[Notice]
    time: float = field(default_factory=time.time)

    @classmethod
    def of(cls, standing: Standing, pictures: Mapping[str, np.ndarray], directory: Path | None = None) -> Entry:
        """What is told of an audit."""
        record = standing.record
        name = record.provenance.probe_name
        events = [alert for alert in events_of(record.alerts) if alert.level != "info"]
        return cls(
            record.step,
            few_scalars(standing),
            _status(name, standing.status, standing.headline(), standing.alerts),
            _status_tag(name),
            status_text(standing),
            pictures,
            [Notice.of(alert, directory) for alert in events],
        )

    @classmethod
    def of_failure(
        cls, failure: Failure, status: Status, standing: Standing | None, notices: Sequence[Notice]
    ) -> Entry:
        """What is told of an audit that broke.

        Args:
            status: of its probe set since then.
            standing: at the last audit that came through; None: there was none.
        """
        name = failure.probe_name
        if standing is None:
            headline, alerts, text = status.reason, [], f"**{status.word}**: {escaped(plain(status.reason))}"
        else:
            standing = replace(standing, status=status)
            headline, alerts, text = standing.headline(), standing.alerts, status_text(standing)
        return cls(
            failure.step,
            {f"{group_of(HEALTH, name)}/status": STATUS_VALUES[status.word]},
            _status(name, status, headline, alerts),
            _status_tag(name),
            text,
            {},
            notices,
        )


def _status_tag(probe_name: str | None) -> str:
    return f"{ROOT} status" if probe_name is None else f"{ROOT} status/{probe_name}"


def _status(probe_name: str | None, status: Status, headline: str, alerts: Sequence[Alert]) -> dict[str, str]:
    values = {
        "status": status.word,
        "status_since": "" if status.since is None else str(status.since),
        "status_reason": headline,
        "rules": ", ".join(alert.rule for alert in alerts if alert.level != "info"),
    }
    return {_beside(probe_name, key): plain(text) for key, text in values.items()}


class Tracker(Protocol):
    """A run of a tracker, which its client library has open. What breaks in a method is the caller's to say, and to try again.

    Its methods are called from one thread, which is another than training's.
    """

    place: str
    """What people call it: ``W&B run calm-river-3``. No URL, which may hold a key."""

    def add(self, entry: Entry) -> None:
        """Send an audit: curves, pictures and status. Its notices are sent after it, each by itself."""

    def notify(self, notice: Notice) -> None:
        """Send what happened to an alert."""

    def add_report(self, page: str) -> None:
        """Send the report as it is now, in the place of what was sent before where the tracker can.

        It has no step: the last one that the trainer logged stays where the tracker's axis is.

        Args:
            page: HTML in one piece.
        """
