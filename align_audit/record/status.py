"""How a run stands, in a word, from what is stored of it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import median
from typing import Literal

from align_audit.errors import SHOWN, counted, named, plain
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.course import present_course
from align_audit.record.log import Failure
from align_audit.record.open_alerts import is_serious, open_alerts, since_of
from align_audit.record.probe_sets_in_use import sets_in_use
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.training_log import LogRow

StatusWord = Literal["HEALTHY", "WATCH", "ERROR", "BLIND"]

WORST_FIRST: tuple[StatusWord, ...] = ("ERROR", "BLIND", "WATCH", "HEALTHY")
"""Silence must not look like health."""

_READ_FAILURES = (
    "find out why audits do not come through: align_audit/failures.jsonl, beside the records, has the tracebacks"
)
_NOT_BY_LAYER = "trust nothing that is said by layer; margins, KL and tokens are measured without patching, and stand"
_LOOK_AFTER = (
    "see whether this training still has the callback, and what its terminal says: it goes on, and nothing watches it"
)
_READ_LINES = "look at these lines: they may be torn, or written by a newer version, which can read them"
_SWITCH_ON = "switch rules on (alerts.enabled, alerts.rules), or judge by the numbers yourself"

_INTERVALS = 3
"""So many intervals without an audit are silence."""


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        word: ``ERROR``: an error is open. ``BLIND``: audits fail, the measurement's own identity control failed, or no audit
            came for three intervals, or alerts are switched off; silence is not health. ``WATCH``: a warning is open.
            ``HEALTHY``: none of these.
        since: the step since which it stands so; None: not known, or nothing was audited yet.
        reason: why, in a sentence.
        advice: of ``BLIND``, what to do to see again, as a clause; empty: an alert says what to do, or nothing is known yet.
        blind: of ``ERROR``, why nothing has been seen of it since, in a sentence; empty: it is seen.
    """

    word: StatusWord
    since: int | None
    reason: str
    advice: str = ""
    blind: str = ""

    def __str__(self) -> str:
        return self.word if self.since is None else f"{self.word} since step {self.since}"


def status_of(
    records: Sequence[AuditRecord], failures: Sequence[Failure], log: Sequence[LogRow], unread: str | None = None
) -> Status:
    """The status of a run, or of one probe set of it.

    Args:
        records: by step, then by creation.
        failures: audits that broke.
        log: the trainer's, which tells how far training has come; empty: not known.
        unread: why what came after the last of the records cannot be read, in a sentence (:func:`unread_end`); None: nothing
            came after it, or it is known.

    Example:
        >>> status_of([], [], []).word
        'BLIND'
    """
    return status_of_course(present_course(records), failures, log, unread)


def status_of_course(
    course: Sequence[AuditRecord], failures: Sequence[Failure], log: Sequence[LogRow], unread: str | None = None
) -> Status:
    """The same after the last audit of one course, by step, whenever each was made."""
    so_far = AuditsSoFar()
    for head in heads_of(course):
        so_far.add(head)
    status = so_far.status(_last_full(course), failures, log[-1].step if log else None)
    if unread is not None and (not course or status.word in ("WATCH", "HEALTHY")):
        return Status("BLIND", status.since, unread, _READ_LINES)
    return status


def status_when_left(records: Sequence[AuditRecord]) -> Status:
    """How a run stood by a probe set at its last audit on it: it goes on without that set, so that silence since means nothing.

    Args:
        records: of that set.
    """
    status = status_of(records, [], [])
    last = max((head.step for head in heads_of(present_course(records))), default=0)
    return replace(status, reason=f"The run goes on without these pairs since step {last}. {status.reason}")


def _last_full(course: Sequence[AuditRecord]) -> AuditRecord | None:
    """The last full audit; of several probe sets one whose identity control failed at the last of its set. None: there is none.

    What broke in the measurement of one set is not mended by another's, as long as that set is in use.
    """
    heads = heads_of(course)
    used = sets_in_use(heads)
    last = {
        head.probe_name: place for place, head in enumerate(heads) if head.kind == "full" and head.probe_name in used
    }
    places = sorted(last.values(), reverse=True)
    if len(places) < 2:
        return course[places[0]] if places else None
    full = [course[place] for place in places]
    return next((record for record in full if record.controls.identity.verdict == "failed"), full[0])


def unread_end(lines: int, reason: str | None) -> str | None:
    """What of the end of a log cannot be read, in a sentence; None: all of it can.

    A damaged line counts for the status only where no record stands behind it: one that does says how the run stands now.

    Args:
        lines: after the last record that could be read.
        reason: what is wrong with the last of them.

    Example:
        >>> unread_end(2, "it is not JSON."), unread_end(0, None)
        ('2 lines at the end of the log cannot be read: it is not JSON.', None)
    """
    if not lines:
        return None
    return f"{counted(lines, 'line')} at the end of the log cannot be read: {(reason or 'not known').rstrip('.')}."


def unread_log(error: BaseException) -> str:
    """The same of a log that cannot be read at all."""
    return f"The log cannot be read: {plain(named(error), SHOWN).rstrip('.')}."


class AuditsSoFar:
    """The audits of one course, by step, as far as they tell how a run stands after the last of them.

    One more takes as long whatever came before, so that a run is gone through once for its status at each audit.
    """

    def __init__(self) -> None:
        self.of_last_step: list[Head] = []
        self._heads: list[Head] = []
        self._steps: list[int] = []
        self._clean_since: int | None = None
        """The first step of those at the end that were judged, with nothing serious open; None: the last is none of them."""

    def add(self, head: Head) -> None:
        """The next one."""
        if not self._steps or self._steps[-1] != head.step:
            self._steps.append(head.step)
            self.of_last_step = []
        self.of_last_step.append(head)
        self._heads.append(head)
        if any(map(is_serious, head.alerts)) or not head.judged:
            self._clean_since = None
        elif self._clean_since is None:
            self._clean_since = head.step

    def status(self, full: AuditRecord | None, failures: Sequence[Failure], now: int | None) -> Status:
        """How the run stands.

        Args:
            full: the last full audit of these; None: there is none.
            failures: as of :func:`status_of`.
            now: the step that training has come to; None: not known.
        """
        still_open = open_alerts(self.of_last_step)
        errors = [alert for alert in still_open if alert.level == "error"]
        blind = self._blind(full, failures, now)
        if errors:
            unseen = blind is not None and blind.since is not None and blind.since >= self._steps[-1]
            return replace(_by(errors, "ERROR"), blind=blind.reason if blind is not None and unseen else "")
        if blind is not None:
            return blind
        warnings = [alert for alert in still_open if alert.level == "warning"]
        if warnings:
            return _by(warnings, "WATCH")
        last = self._steps[-1]
        since = last if self._clean_since is None else self._clean_since
        return Status("HEALTHY", since, f"No alert is open at step {last}.")

    def _blind(self, full: AuditRecord | None, failures: Sequence[Failure], now: int | None) -> Status | None:
        if not self._heads:
            return Status("BLIND", None, _nothing_audited(failures), _READ_FAILURES if failures else "")
        since = _broken_since(self._heads, failures) if failures else []
        if since:
            words = f"Audits break since step {since[0].step}: {_last_line(since[-1])}."
            return Status("BLIND", since[0].step, words, _READ_FAILURES)
        if full is not None and full.controls.identity.verdict == "failed":
            words = f"The identity control failed: {full.controls.identity.reason}."
            return Status("BLIND", full.step, words, _NOT_BY_LAYER)
        return _silent(self._steps, self._heads[-1].occasion, now) or _unjudged(self._heads)


def _by(alerts: Sequence[Alert], word: StatusWord) -> Status:
    oldest = min(alerts, key=since_of)
    return Status(word, since_of(oldest), oldest.message)


def _nothing_audited(failures: Sequence[Failure]) -> str:
    last = max(failures, key=lambda failure: (failure.time, failure.step), default=None)
    if last is None:
        return "No audit has been made yet."
    return f"No audit has come through; the last broke at step {last.step}: {_last_line(last)}."


def _broken_since(heads: Sequence[Head], failures: Sequence[Failure]) -> list[Failure]:
    """The failures, by time, that no later audit of their probe set has made good; one without a name is of all sets. Those of
    a set that is no longer in use mean nothing any more.

    Those of a course that was left when the run was resumed are older than its audits.
    """
    used = sets_in_use(heads, failures)
    last: dict[str | None, tuple[str, int]] = {}
    for head in heads:
        if head.probe_name not in used:
            continue
        last[head.probe_name] = max(last.get(head.probe_name, ("", -1)), (head.created, head.step))
    ages = {each.probe_name: last.get(each.probe_name, ("", -1)) for each in failures if each.probe_name in used}
    ages[None] = last.get(None, min(last.values()))
    return sorted(
        (
            each
            for each in failures
            if each.probe_name in ages
            and each.step > ages[each.probe_name][1]
            and each.time >= ages[each.probe_name][0]
        ),
        key=lambda each: (each.time, each.step),
    )


def _silent(steps: Sequence[int], occasion: Occasion | None, now: int | None) -> Status | None:
    """Has training gone on for three intervals without an audit?

    Args:
        steps: those audited, each once.
        occasion: of the last audit.
    """
    if now is None:
        return None
    last = steps[-1]
    if occasion is not None:
        if occasion.next_step is None:
            return None  # none is planned
        interval = occasion.next_step - last
    else:
        if len(steps) < 3:
            return None
        interval = round(median(after - step for step, after in pairwise(steps)))
    if now - last <= _INTERVALS * max(interval, 1):
        return None
    words = f"Training is at step {now}, and the last audit is of step {last}: one was due every {interval}."
    return Status("BLIND", last, words, _LOOK_AFTER)


def _unjudged(heads: Sequence[Head]) -> Status | None:
    """Do the last audits go by no rule? Then that none is open says nothing, nor does it end what was open before."""
    since = None
    for head in takewhile(lambda head: not head.judged, reversed(heads)):
        since = head.step
    if since is None:
        return None
    words = (
        "Alerts are switched off (alerts.enabled, or every rule that could open one): nothing says whether all is well."
    )
    return Status("BLIND", since, words, _SWITCH_ON)


def _last_line(failure: Failure) -> str:
    lines = failure.error.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "nothing is known of the error"
