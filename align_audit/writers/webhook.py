"""Alerts posted to a web address, from a thread of its own: training waits for it nowhere but at the end, and there briefly.

It is the standard library that posts. Its clients log nothing, while httpx logs whole URLs and urllib3 their paths, and a
Slack URL is a secret; and neither of these bounds all tries of a message together.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from align_audit.errors import ConfigurationError, first_line, named, plain
from align_audit.files import append_whole
from align_audit.options.webhook import WebhookConfig, check_web_address
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.writers.messages import Channel, as_json, as_slack
from align_audit.writers.outbox import Outbox

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.record.run import AuditRun
    from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)

VARIABLE = "ALIGN_AUDIT_WEBHOOK_URL"
"""The environment variable that the URL is read from where the options hold none."""
UNSENT = "unsent.jsonl"
"""Beside the log: the messages that could not be posted, as they would have been, each with the reason."""

MOST_WAITING = 100
"""Messages that wait to be posted; what comes on top is kept as unsent."""
_FIRST_PAUSE = 0.25
"""Seconds before a second try; each further pause is twice as long."""


@dataclass(frozen=True)
class Refusal:
    """Why a message did not get through.

    Attributes:
        again: whether another try may help.
        pause: seconds that the server asks to wait before it.
    """

    reason: str
    again: bool
    pause: float = 0.0


class Address:
    """Posts to one URL, whose host alone is ever named: the rest, and the headers, may be secret."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._headers = {"User-Agent": "align_audit", **headers, "Content-Type": "application/json"}
        # The proxies of the environment, certificates verified, and no redirect followed: that would turn a POST into a GET.
        self._opener = urllib.request.build_opener(_NoRedirect)
        parts = urlsplit(url)
        self.host = f"{parts.scheme}://{parts.netloc}"

    def post(self, body: bytes, deadline: float) -> str | None:
        """Post until it is taken, it is refused for good, or ``deadline`` (of ``time.monotonic``) is over.

        Too many requests (429), errors of the server (5xx) and broken connections are tried again, after 0.25 s, 0.5 s, 1 s
        and so on, or when the server says. A message of which the answer was lost may so arrive twice.

        Returns:
            Why it was not taken; None: it was.
        """
        pause = _FIRST_PAUSE
        refusal = Refusal("there was no time left", again=False)
        while (left := deadline - time.monotonic()) > 0:
            result = self._try(body, left)
            if result is None or not result.again:
                return None if result is None else result.reason
            refusal, wait = result, max(pause, result.pause)
            if time.monotonic() + wait >= deadline:
                break
            time.sleep(wait)
            pause *= 2
        return refusal.reason

    def _try(self, body: bytes, seconds: float) -> Refusal | None:
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        try:
            # Its answer is of no interest, and is not read.
            self._opener.open(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            with error:
                again = error.code == 429 or error.code >= 500
                return Refusal(
                    f"the answer was {error.code} {plain(error.reason, 60)}", again, _asked_pause(error.headers)
                )
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                return Refusal("there was no answer in time", again=False)
            what = first_line(cause) if isinstance(cause, OSError) else type(cause).__name__
            broke_off = isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
            again = broke_off or not isinstance(cause, ssl.SSLError)
            return Refusal(f"the connection failed: {what}", again=again)
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None follows it, and the answer is an error like any other."""


def _asked_pause(headers: Message) -> float:
    """``Retry-After`` in seconds; one that is a date, or no number, asks for nothing."""
    text = (headers.get("Retry-After") or "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0


class Webhook(Channel):
    """Posts warnings and errors as they open, get worse and are resolved.

    Args:
        options: with the URL, or without one where the environment has it.
        output_dir: of the run.
    """

    name = "the webhook"

    def __init__(self, options: WebhookConfig, output_dir: Path) -> None:
        super().__init__()
        self._options = options
        self._folder = Path(os.path.abspath(output_dir))
        self._unsent = self._folder / UNSENT
        self._outbox: Outbox[bytes] | None = None
        self._host = ""
        self._form = as_json
        self._said: set[str] = set()

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self | None:
        """Where one is asked for."""
        options = config.alerts.webhook
        return None if options is None else cls(options, surroundings.output_dir)

    def check(self) -> None:
        """Is there an address to post to?

        Raises:
            ConfigurationError: as :meth:`start`.
        """
        _url(self._options)

    def start(self, run: AuditRun) -> None:
        """Find out where to post.

        Raises:
            ConfigurationError: neither the options nor the environment hold a URL, or the environment's is none.
        """
        headers = {name: text.get_secret_value() for name, text in self._options.headers.items()}
        address = Address(_url(self._options), headers)
        self._host, self._unsent = address.host, run.directory / UNSENT
        slack = self._options.form == "slack" or (
            self._options.form == "auto" and urlsplit(address.host).hostname == "hooks.slack.com"
        )
        self._form = as_slack if slack else as_json
        self._outbox = Outbox(
            address.post, self._keep, self._options.timeout_seconds, most=MOST_WAITING, name="align_audit webhook"
        )
        super().start(run)

    def say(self, alert: Alert, record: AuditRecord) -> None:
        """Hand it to the thread."""
        if alert.level != "info" and self._outbox is not None:
            self._outbox.put(json.dumps(self._form(alert, record, self._folder), allow_nan=False).encode())

    def close(self) -> None:
        """Wait for what is under way, one time-out at most."""
        if self._outbox is not None:
            self._outbox.close()

    def _keep(self, body: bytes, reason: str) -> None:
        """What was not posted goes beside the log; that there is such a thing is said once."""
        line = {"time": datetime.now(UTC).isoformat(), "reason": reason, "posted": json.loads(body)}
        kept = f"It is kept in {plain(self._unsent)}, and so is what else cannot be posted"
        try:
            append_whole(self._unsent, json.dumps(line).encode() + b"\n")
        except OSError as error:
            kept = f"It could not be kept in {plain(self._unsent)} either ({named(error)})"
        if kept not in self._said:
            self._said.add(kept)
            logger.error(
                "align_audit could not post an alert to %s: %s. %s; alerts.jsonl holds all alerts (said once)",
                *(self._host, reason, kept),
            )


def _url(options: WebhookConfig) -> str:
    if options.url is not None:
        return options.url.get_secret_value()
    url = os.environ.get(VARIABLE, "").strip()
    if not url:
        raise ConfigurationError(
            f"alerts.webhook has no url, and the environment variable {VARIABLE} is not set; expected one of them to hold "
            "the address that alerts are posted to. Stored options never hold it"
        )
    try:
        check_web_address(url)
    except ValueError as error:
        raise ConfigurationError(f"the environment variable {VARIABLE}: {error}") from None
    return url
