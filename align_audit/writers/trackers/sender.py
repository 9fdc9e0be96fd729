"""What is on its way to one tracker: sent by a thread of its own, tried again, and counted where it did not get through."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from align_audit.errors import counted, listed, named, plural, without_secrets
from align_audit.writers.outbox import Outbox
from align_audit.writers.trackers.entry import Entry, Notice, Tracker

logger = logging.getLogger(__name__)

MOST_WAITING = 16
"""Audits that wait to be sent, each with its pictures (1.6 MB); those on top of that wait as keys of the log."""
MOST_NOTICES = 100
"""Notices that did not get through and are kept for another try; of more the oldest go."""
PAUSES = (1.0, 10.0)
"""Seconds before a second and a third try; there is none after that."""
CLOSING_SECONDS = 20.0
"""What the end of a run waits for a tracker at most."""


class Sender:
    """Sends audits and pages to a tracker in the order in which they come. Nothing is waited for but at the end.

    A notice that does not get through is kept, and tried again after the next audit.

    Whoever has it closes it, also where the process ends: there is more to say then than what waits here.

    Args:
        name: of the tracker, in words.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self._tracker = tracker
        self._outbox: Outbox[Entry | str] = Outbox(
            self._send, self._keep, CLOSING_SECONDS, most=MOST_WAITING, name=f"align_audit {name}", at_exit=False
        )
        self._hurried = threading.Event()
        self._under_way: Entry | str | None = None
        self._notices: list[Notice] = []
        """Those that are to be sent with what is under way, or after it."""
        self._lost_steps: list[int] = []
        self._lost_notices = 0
        self._lost_report = False
        """Is the page that was to be sent last lost?"""
        self._said: set[type[BaseException]] = set()

    @property
    def full(self) -> bool:
        """Does as much wait as may?"""
        return self._outbox.full

    def send(self, entry: Entry) -> None:
        """Take an audit, or one that broke."""
        self._outbox.put(entry)

    def send_report(self, page: str) -> None:
        """Take a page, which is sent after what was taken before it."""
        self._outbox.put(page)

    def hurry(self) -> None:
        """The run is over: nothing is paused for any more, and what broke has one more try."""
        self._hurried.set()

    def close(self, seconds: float) -> None:
        """Wait for what is under way, ``seconds`` at most; the rest is not sent."""
        self.hurry()
        self._outbox.close(seconds)

    def missing(self, steps: list[int]) -> str:
        """What did not get through, in words, once this is closed; empty: all did.

        Args:
            steps: of audits that were not even taken.
        """
        steps = sorted({*self._lost_steps, *steps})
        notices = self._lost_notices + len(self._notices)
        parts = [f"{counted(len(steps), 'audit')} ({plural('step', len(steps))} {listed(steps)})"] if steps else []
        parts += [counted(notices, "notice") + " of alerts"] if notices else []
        parts += ["the report as it is now"] if self._lost_report else []
        return ", ".join(parts)

    def _send(self, job: Entry | str, _: float) -> None:
        self._under_way = job
        tries = 1 + len(PAUSES)
        if isinstance(job, Entry):
            self._notices += job.notices
            if self._tried(f"write step {job.step} to", partial(self._tracker.add, job), tries):
                self._said.clear()  # what breaks from here on is news
            else:
                self._lost_steps.append(job.step)
                tries = 1  # of a server that is gone
        self._send_notices(tries)
        if isinstance(job, str):
            sent = self._tried("send the report to", partial(self._tracker.add_report, job), tries)
            self._lost_report = not sent

    def _send_notices(self, tries: int) -> None:
        """In their order: after one that does not get through, those of the same alert wait, too."""
        held: set[str] = set()
        for notice in list(self._notices):
            if notice.key not in held and self._tried("send an alert to", partial(self._tracker.notify, notice), tries):
                self._notices.remove(notice)
            else:
                held.add(notice.key)
        self._lost_notices += max(len(self._notices) - MOST_NOTICES, 0)
        del self._notices[:-MOST_NOTICES]

    def _tried(self, what: str, send: Callable[[], object], tries: int) -> bool:
        """Did it get through? That it did not is said once a kind of error, until an audit gets through again."""
        for pause in PAUSES[: tries - 1]:
            try:
                send()
                return True
            except (Exception, SystemExit):
                if self._hurried.wait(pause):
                    break
        try:
            send()
        except (Exception, SystemExit) as error:
            self.say(what, error)
            return False
        return True

    def say(self, what: str, error: BaseException) -> None:
        """What broke, once a kind of error, without what may be secret in an address."""
        if type(error) in self._said:
            return
        self._said.add(type(error))
        logger.error(
            "align_audit could not %s %s: %s; that is said once, training goes on, and all of it is in "
            "align_audit/records.jsonl",
            *(what, self.name, without_secrets(named(error))),
        )

    def _keep(self, job: Entry | str, reason: str) -> None:
        """It was not sent, or not answered in time."""
        if isinstance(job, str):
            self._lost_report = True
            return
        self._lost_steps.append(job.step)
        if job is not self._under_way:
            self._notices += job.notices
