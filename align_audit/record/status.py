"""How a run stands, in a word, from what is stored of it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from align_audit.record.audit_record import Alert, AuditRecord
from align_audit.record.course import present_course
from align_audit.record.log import Failure
from align_audit.record.stored_records import Head, chosen, heads_of
from align_audit.record.training_log import LogRow

StatusWord = Literal["HEALTHY", "WATCH", "ERROR", "BLIND"]

_INTERVALS = 3
"""So many intervals without an audit are silence."""
NOT_ALERTS = ("control_failed",)
"""What versions before this one alerted to, and which says nothing of the run."""


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        word: ``ERROR``: an error is open. ``BLIND``: audits fail, the measurement's own identity control failed, or no audit
            came for three intervals; silence is not health. ``WATCH``: a warning is open. ``HEALTHY``: none of these.
        since: the step since which it stands so; None: not known, or nothing was audited yet.
        reason: why, in a sentence.
    """

    word: StatusWord
    since: int | None
    reason: str

    def __str__(self) -> str:
        return self.word if self.since is None else f"{self.word} since step {self.since}"


def status_of(records: Sequence[AuditRecord], failures: Sequence[Failure], log: Sequence[LogRow]) -> Status:
    """The status of a run, or of one probe set of it.

    Args:
        records: by step, then by creation.
        failures: audits that broke.
        log: the trainer's, which tells how far training has come; empty: not known.

    Example:
        >>> status_of([], [], []).word
        'BLIND'
    """
    records = present_course(records)
    heads = heads_of(records)
    still_open = open_alerts(heads)
    errors = [alert for alert in still_open if alert.level == "error"]
    if errors:
        return _by(errors, "ERROR")
    blind = _blind(records, heads, failures, log)
    if blind is not None:
        return blind
    warnings = [alert for alert in still_open if alert.level == "warning"]
    if warnings:
        return _by(warnings, "WATCH")
    return Status("HEALTHY", _healthy_since(heads), f"No alert is open at step {heads[-1].step}.")


def open_alerts(heads: Sequence[Head]) -> list[Alert]:
    """What the records of the last step say is open, whatever their probe set."""
    if not heads:
        return []
    step = heads[-1].step
    alerts = [alert for head in heads if head.step == step for alert in head.alerts]
    resolved = {alert.cause for alert in heads[-1].alerts if alert.event == "resolved"}
    return [
        alert
        for alert in alerts
        if alert.event != "resolved"
        and alert.rule not in NOT_ALERTS
        and (not alert.cause or alert.cause not in resolved)
    ]


def _by(alerts: Sequence[Alert], word: StatusWord) -> Status:
    since = [alert.step if alert.since is None else alert.since for alert in alerts]
    oldest = min(range(len(alerts)), key=lambda place: since[place])
    return Status(word, since[oldest], alerts[oldest].message)


def _healthy_since(heads: Sequence[Head]) -> int:
    """The first step of those at the end at which nothing serious was open."""
    since = heads[-1].step
    for head in reversed(heads):
        serious = any(
            alert.level != "info" and alert.event != "resolved" and alert.rule not in NOT_ALERTS
            for alert in head.alerts
        )
        if serious:
            break
        since = head.step
    return since


def _blind(
    records: Sequence[AuditRecord], heads: Sequence[Head], failures: Sequence[Failure], log: Sequence[LogRow]
) -> Status | None:
    last_failure = max(failures, key=lambda failure: (failure.time, failure.step), default=None)
    if not heads:
        reason = "No audit has been made yet."
        if last_failure is not None:
            reason = (
                f"No audit has come through; the last broke at step {last_failure.step}: {_last_line(last_failure)}."
            )
        return Status("BLIND", None, reason)
    since = _broken_since(heads, failures)
    if since:
        return Status("BLIND", since[0].step, f"Audits break since step {since[0].step}: {_last_line(since[-1])}.")
    full = chosen(records, lambda head: head.kind == "full")
    if full and full[-1].controls.identity.verdict == "failed":
        record = full[-1]
        return Status("BLIND", record.step, f"The identity control failed: {record.controls.identity.reason}.")
    return _silent(records, heads, log)


def _broken_since(heads: Sequence[Head], failures: Sequence[Failure]) -> list[Failure]:
    """The failures, by time, that no later audit of their probe set has made good; one without a name is of all sets.

    Those of a course that was left when the run was resumed are older than its audits.
    """
    last: dict[str | None, tuple[str, int]] = {}
    for head in heads:
        last[head.probe_name] = max(last.get(head.probe_name, ("", -1)), (head.created, head.step))
    ages = {each.probe_name: last.get(each.probe_name, ("", -1)) for each in failures}
    ages[None] = last.get(None, min(last.values()))
    return sorted(
        (each for each in failures if each.step > ages[each.probe_name][1] and each.time >= ages[each.probe_name][0]),
        key=lambda each: (each.time, each.step),
    )


def _silent(records: Sequence[AuditRecord], heads: Sequence[Head], log: Sequence[LogRow]) -> Status | None:
    """Has training gone on for three intervals without an audit?"""
    if not log:
        return None
    last, now = heads[-1].step, log[-1].step
    occasion = records[-1].occasion
    if occasion is not None:
        if occasion.next_step is None:
            return None  # none is planned
        interval = occasion.next_step - last
    else:
        steps = sorted({head.step for head in heads})
        if len(steps) < 3:
            return None
        interval = round(median(after - step for step, after in pairwise(steps)))
    if now - last <= _INTERVALS * max(interval, 1):
        return None
    return Status(
        "BLIND", last, f"Training is at step {now}, and the last audit is of step {last}: one was due every {interval}."
    )


def _last_line(failure: Failure) -> str:
    lines = failure.error.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "nothing is known of the error"
