"""What an alert says away from the terminal, and the channels inside the process: Python logging, and a user's function.

The third channel is :mod:`align_audit.writers.webhook`. Channels are told of events alone: an alert opened, got worse or was
resolved.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from align_audit.errors import ConfigurationError, named, pass_exit_on, plain
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, RecordKey
from align_audit.record.numbers import is_unknown, json_number, span
from align_audit.record.stored_records import events_of, heads_of

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.record.run import AuditRun
    from align_audit.writers.writer import Surroundings

alert_logger = logging.getLogger("align_audit.alerts")
logger = logging.getLogger(__name__)

OnAlert = Callable[[Alert, AuditRecord], object]
"""A user's function: it is given the alert, and the record that it was raised on."""


_NO_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "\uff20"})
_LONGEST = 2000
"""Characters of a paragraph; Slack cuts messages, and log collectors cut lines."""


# --- words ------------------------------------------------------------------------------------------------------------


def headline(alert: Alert) -> str:
    """Level, event, rule and step, in a line: ``ERROR opened at step 20: kl_out_of_bounds (layers 3–5)``.

    An alert that is resolved says so first: ``RESOLVED at step 60: kl_out_of_bounds (warning since step 20)``.
    """
    details = []
    if alert.event == "resolved":
        begin = f"RESOLVED at step {alert.step}"
        details.append(alert.level if alert.since is None else f"{alert.level} since step {alert.since}")
    else:
        begin = f"{alert.level.upper()} {alert.event} at step {alert.step}"
        if alert.since is not None and alert.since != alert.step:
            details.append(f"since step {alert.since}")
    if alert.probe_name is not None:
        details.append(f"probes {alert.probe_name!r}")
    if alert.layers:
        details.append(f"layers {span(alert.layers)}")
    return plain(f"{begin}: {alert.rule}" + (f" ({', '.join(details)})" if details else ""))


def paragraphs(alert: Alert, directory: Path | None = None) -> list[str]:
    """An alert in whole: its headline, what was seen, the numbers, what to do, where to go back to, and the run's folder.

    Each is one line of printable characters, whatever is in the alert.
    """
    numbers = {"value": alert.value, "limit": alert.threshold, "baseline": alert.baseline}
    given = [f"{name} {value:.3g}" for name, value in numbers.items() if value is not None and not is_unknown(value)]
    given += [f"agreeing: {', '.join(alert.signals)}"] if alert.signals else []
    back = [] if alert.clean_step is None else [f"last clean audit: step {alert.clean_step}"]
    back += [] if alert.checkpoint is None else [f"newest checkpoint from before: {alert.checkpoint}"]
    back += [] if alert.command is None else [f"go back with: {alert.command}"]
    resolved = alert.event == "resolved"
    lines = [
        headline(alert),
        alert.message,
        "; ".join(given),
        "" if resolved else f"To do: {alert.suggestion}",
        "" if resolved else "; ".join(back),
        "" if directory is None else f"run: {directory}",
    ]
    return [plain(line, _LONGEST) for line in lines if line]


def as_json(alert: Alert, record: AuditRecord, directory: Path) -> dict[str, Any]:
    """An alert as plain values for another program: numbers that are not finite are words, as in records.

    Texts have their control characters escaped; other than that they are as in the record, and whoever shows them escapes
    them for where they are shown.
    """
    values = alert.model_dump()
    message = {
        "align_audit": record.provenance.versions.get("align-audit"),
        **{name: values[name] for name in ("event", "rule", "cause", "level", "step", "since", "looks", "value")},
        "limit": values["threshold"],
        **{name: values[name] for name in ("baseline", "layers", "signals", "message", "suggestion")},
        **{name: values[name] for name in ("clean_step", "checkpoint", "command")},
        "run": str(directory),
        "probes": alert.probe_name,
    }
    return {name: _json_value(value) for name, value in message.items()}


def as_slack(alert: Alert, record: AuditRecord, directory: Path) -> dict[str, Any]:
    """An alert as a Slack message, in which nothing of it is markup, a link or a mention.

    Source: https://api.slack.com/docs/message-formatting (the three characters to be escaped; ``mrkdwn``; what is written
    between angle brackets). Others that take this form find mentions in plain text: an at sign is shown in full width.
    """
    return {"text": without_markup("\n".join(paragraphs(alert, directory))), "mrkdwn": False}


def without_markup(text: str) -> str:
    """A text in which Slack, and what takes its form, finds no markup, no link and no mention: see :func:`as_slack`.

    Example:
        >>> without_markup("<!channel> & @here")
        '&lt;!channel&gt; &amp; ＠here'
    """
    return text.translate(_NO_MARKUP)


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return json_number(value)
    return plain(value) if isinstance(value, str) else value


def checked(function: OnAlert | None) -> OnAlert | None:
    """A user's function, or none.

    Raises:
        ConfigurationError: it cannot be called.
    """
    if function is not None and not callable(function):
        raise ConfigurationError(
            f"expected on_alert to be a function of an alert and its record, found {type(function).__name__}"
        )
    return function


# --- channels ---------------------------------------------------------------------------------------------------------


class Channel:
    """A writer of events: it says each alert that opens, gets worse or is resolved, and nothing of audits.

    What the run held when it was started is no news: ``align-audit run`` shows stored audits again. But for what nobody was
    told of, because the process was killed between log and channels: that is said at the start.
    """

    name: str

    def __init__(self) -> None:
        self._stored: set[RecordKey] = set()

    def start(self, run: AuditRun) -> None:
        """Remember what is no news any more, and say what was not said. Channels that have to get ready do so first."""
        self._stored = {head.key for head in heads_of(run.records)}
        for record in run.untold:
            for alert in events_of(record.alerts):
                try:
                    self.say(alert, record)
                except Exception as error:  # an old alert that cannot be said is no reason to refuse a run
                    logger.error("align_audit could not tell %s of step %d: %s", self.name, record.step, named(error))

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """An audit is no event."""

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """Say it, where it is news."""
        if alert.event != "open" and record.key not in self._stored:
            self.say(alert, record)

    def say(self, alert: Alert, record: AuditRecord) -> None:
        """Say one event."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


class LogLines(Channel):
    """A line for each warning and error on the logger ``align_audit.alerts``, through the handlers that a program has set up.

    A handler that writes to where standard output goes is passed over: the terminal's writer prints the alert there. Where
    no handler is set up, nothing is logged, for the same reason.
    """

    name = "Python logging"

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self:
        """Whatever the configuration."""
        return cls()

    def say(self, alert: Alert, record: AuditRecord) -> None:
        """One line. That of an alert that is resolved is a warning, so that it is where its beginning was."""
        if alert.level == "info":
            return
        level = logging.ERROR if alert.level == "error" and alert.event != "resolved" else logging.WARNING
        if not alert_logger.isEnabledFor(level):
            return
        words = " | ".join(paragraphs(alert))
        entry = alert_logger.makeRecord(
            alert_logger.name, level, __file__, 0, "align_audit: %s", (words,), None, "alert"
        )
        if alert_logger.filter(entry):
            for handler in _handlers(alert_logger):
                if level >= handler.level and not _is_standard_output(handler):
                    handler.handle(entry)


class Told(Channel):
    """Hands each event, of every level, to a user's function. What that raises is logged once a kind, and goes no further."""

    name = "on_alert"

    def __init__(self, function: OnAlert) -> None:
        super().__init__()
        self._function = function
        self._raised: set[type[BaseException]] = set()

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self | None:
        """Where there is a function."""
        return None if surroundings.on_alert is None else cls(surroundings.on_alert)

    def say(self, alert: Alert, record: AuditRecord) -> None:
        """Call it."""
        try:
            self._function(alert, record)
        except (Exception, SystemExit) as error:
            pass_exit_on(error)
            if type(error) not in self._raised:
                self._raised.add(type(error))
                logger.error(
                    "on_alert raised %s at the alert %s of step %d; that is said once, and training goes on",
                    *(named(error), alert.rule, alert.step),
                    exc_info=error,
                )


def _handlers(start: logging.Logger) -> Iterator[logging.Handler]:
    """Those that an entry of this logger reaches, as :meth:`logging.Logger.callHandlers` finds them."""
    place: logging.Logger | None = start
    while place is not None:
        yield from place.handlers
        place = place.parent if place.propagate else None


def _is_standard_output(handler: logging.Handler) -> bool:
    """Does it write to the file, pipe or terminal that standard output is?"""
    console = getattr(handler, "console", None)  # rich's handler
    stream = getattr(handler, "stream", None) or getattr(console, "file", None)
    if stream is None:
        return False
    here, there = _identity(sys.stdout), _identity(stream)
    # Without a descriptor (a notebook's cell) both standard streams are shown in the same place.
    return here == there if here and there else stream in (sys.stdout, sys.stderr)


def _identity(stream: Any) -> tuple[int, int] | None:
    try:
        status = os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


__all__ = [
    "Channel",
    "LogLines",
    "OnAlert",
    "Told",
    "as_json",
    "as_slack",
    "checked",
    "headline",
    "paragraphs",
    "without_markup",
]
