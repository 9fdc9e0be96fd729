"""What is open of the alerts that records hold: their order, since when, and of which cause. Whoever reads alerts asks here."""

from __future__ import annotations

from collections.abc import Sequence

from align_audit.options.rules import BY_NAME, RETIRED
from align_audit.record.alert import Alert, AlertLevel
from align_audit.record.stored_records import Head

SEVERITY: dict[AlertLevel, int] = {"error": 0, "warning": 1, "info": 2}
"""Level → its place; the worst first."""


def cause_of(alert: Alert) -> str:
    """Its cause; of records of versions that had none, that of its rule."""
    if alert.cause:
        return alert.cause
    rule = BY_NAME.get(alert.rule)
    return alert.rule if rule is None else rule.cause


def since_of(alert: Alert) -> int:
    """The step at which it was opened; of records of versions that did not say so, its own."""
    return alert.step if alert.since is None else alert.since


def is_serious(alert: Alert) -> bool:
    """Is it a warning or an error that is open, of a rule that still is one?"""
    return alert.level != "info" and alert.event != "resolved" and alert.rule not in RETIRED


def open_alerts(heads: Sequence[Head]) -> list[Alert]:
    """What is open after the last step of these records, one alert of each cause.

    A record has all alerts that are open at it, whatever their probe set, so that of a step the one made last counts; those
    made within one second have no order. Records of versions whose alerts had no cause have those of their own set alone.
    """
    if not heads:
        return []
    last_step, last_time = max((head.step, head.created) for head in heads)
    alerts = [
        alert
        for head in heads
        if head.step == last_step
        for alert in head.alerts
        if alert.rule not in RETIRED and (head.created == last_time or not alert.cause)
    ]
    return open_after(alerts, last_step)


def open_after(alerts: Sequence[Alert], at: int) -> list[Alert]:
    """What stays open after a step, of the alerts of records of that step which may have been judged in any order."""
    still_open = []
    for cause in dict.fromkeys(map(cause_of, alerts)):
        same = [alert for alert in alerts if cause_of(alert) == cause]
        # One that was resolved at this step began before it: where another begins at it, that one came after.
        anew = [alert for alert in same if alert.event != "resolved" and since_of(alert) == at]
        if not anew and any(alert.event == "resolved" for alert in same):
            continue
        newest = anew or same
        worst = min(newest, key=lambda alert: (SEVERITY[alert.level], since_of(alert), -alert.looks, repr(alert)))
        looks = max(alert.looks for alert in newest)
        still_open.append(worst.model_copy(update={"looks": looks}))
    return still_open
