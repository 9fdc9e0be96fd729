"""What a tracker is given of a run: an entry an audit, a notice for what happens to an alert; and what a tracker is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from align_audit.errors import plain
from align_audit.record.audit_record import Alert, AuditRecord
from align_audit.record.stored_records import events_of
from align_audit.writers.few_scalars import few_scalars, status_text
from align_audit.writers.messages import paragraphs
from align_audit.writers.standing import Standing

if TYPE_CHECKING:
    import numpy as np

STEP = "train/global_step"
"""What transformers' callbacks call the training step in W&B and Trackio, which count what is logged otherwise."""
ROOT = "align_audit"

_LONGEST_TITLE = 63
"""Characters; W&B takes less than 64."""


@dataclass(frozen=True)
class Notice:
    """An alert that opened, got worse or is over, in texts of printable characters.

    Attributes:
        rule: what every notice of this alert has in common.
        level: ``info`` where it is over.
        title: a line of less than 64 characters.
        text: all that is said of it, a paragraph a line.
    """

    rule: str
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
        over = alert.event == "resolved"
        begin = "RESOLVED" if over else f"{alert.level.upper()} {alert.event}"
        return cls(
            alert.rule,
            "info" if over else alert.level,
            plain(f"{ROOT} {begin}: {alert.rule}", _LONGEST_TITLE),
            "\n".join(paragraphs(alert, directory)),
            alert.step,
        )


@dataclass(frozen=True)
class Entry:
    """How a run stands at an audit.

    Attributes:
        scalars: tag → value, finite; those of :mod:`align_audit.writers.few_scalars`.
        status: ``status``, ``status_since``, ``status_reason`` and ``rules`` (those of open warnings and errors), each a text;
            of a named probe set with the name and a dot before.
        status_tag, status_text: the same for people, in Markdown, and what it is called.
        pictures: tag → RGB image, ``uint8`` of shape (height, width, 3).
        notices: of warnings and errors to which something happened.
    """

    step: int
    scalars: Mapping[str, float]
    status: Mapping[str, str]
    status_tag: str
    status_text: str
    pictures: Mapping[str, np.ndarray]
    notices: Sequence[Notice]

    @classmethod
    def of(cls, standing: Standing, pictures: Mapping[str, np.ndarray], directory: Path | None = None) -> Entry:
        """What is told of an audit."""
        record = standing.record
        name = record.provenance.probe_name
        events = [alert for alert in events_of(record.alerts) if alert.level != "info"]
        return cls(
            record.step,
            few_scalars(standing),
            _status(standing, record),
            f"{ROOT} status" if name is None else f"{ROOT} status/{name}",
            status_text(standing),
            pictures,
            [Notice.of(alert, directory) for alert in events],
        )


def _status(standing: Standing, record: AuditRecord) -> dict[str, str]:
    name = record.provenance.probe_name
    prefix = "" if name is None else f"{name}."
    status = standing.status
    values = {
        "status": status.word,
        "status_since": "" if status.since is None else str(status.since),
        "status_reason": plain(standing.headline()),
        "rules": ", ".join(alert.rule for alert in standing.alerts if alert.level != "info"),
    }
    return {prefix + key: plain(text) for key, text in values.items()}


class Tracker(Protocol):
    """A run of a tracker, which its client library has open. What breaks in a method is the caller's to say."""

    place: str
    """What people call it: ``W&B run calm-river-3``. No URL, which may hold a key."""

    def add(self, entry: Entry) -> None:
        """Send an audit: curves, pictures and status, then its notices."""

    def add_report(self, path: Path, step: int) -> None:
        """Send the report as it is now, in the place of what was sent before where the tracker can.

        Args:
            path: an HTML file in one piece.
            step: of the last audit that is in it.
        """
