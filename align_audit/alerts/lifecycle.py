"""The life of an alert: opened, worse, open, resolved. One cause is one alert, over looks and over probe sets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from align_audit.options.rules import BY_NAME
from align_audit.record.audit_record import Alert

_RANK = {"info": 0, "warning": 1, "error": 2}


def step(open_alerts: Iterable[Alert], found: Iterable[Alert], at: int, held: Collection[str] = ()) -> list[Alert]:
    """The alerts that are open, or were just resolved, after a look.

    An alert is resolved when two looks in a row do not see it; until then it stays open, with ``looks`` of 0 after the first.
    Its level never falls while it is open.

    Args:
        open_alerts: at the look before, with at most one of each cause.
        found: what this look sees, at most one of each cause. One whose ``step`` is earlier was seen where it was measured
            last: it keeps an alert open, and opens none.
        at: the step of this look. Looks at one step (of several probe sets, or a health and a full audit) count once.
        held: causes about which nothing can be said now: they stay as they are.
    """
    earlier = {cause_of(alert): alert for alert in open_alerts}
    seen = {cause_of(alert): alert for alert in found}
    alerts: list[Alert] = []
    for cause in dict.fromkeys([*earlier, *seen]):
        previous, now = earlier.get(cause), seen.get(cause)
        if previous is None:
            assert now is not None
            if now.step == at:
                alerts.append(now.model_copy(update={"event": "opened", "since": at, "looks": 1}))
        elif cause in held:
            alerts.append(previous.model_copy(update={"event": "open", "step": at}))
        elif now is not None:
            alerts.append(_seen_again(previous, now, at))
        else:
            alerts.append(_not_seen(previous, at))
    return alerts


def _seen_again(previous: Alert, now: Alert, at: int) -> Alert:
    worse = _RANK[now.level] > _RANK[previous.level]
    looks = previous.looks
    if now.step == at:
        looks = max(looks, 1) if previous.step == at else looks + 1
    return now.model_copy(
        update={
            "event": "worse" if worse else "open",
            "level": now.level if worse else previous.level,
            "step": at,
            "since": since_of(previous),
            "looks": looks,
            "clean_step": previous.clean_step,
            "checkpoint": previous.checkpoint,
            "command": previous.command,
        }
    )


def _not_seen(previous: Alert, at: int) -> Alert:
    resolved = previous.looks == 0 and previous.step < at
    return previous.model_copy(
        update={"event": "resolved" if resolved else "open", "step": at, "looks": 0, "since": since_of(previous)}
    )


def open_after(alerts: Sequence[Alert], at: int) -> list[Alert]:
    """What stays open after a step, of the alerts of records of that step which may have been judged in any order."""
    open_alerts = []
    for cause in dict.fromkeys(map(cause_of, alerts)):
        same = [alert for alert in alerts if cause_of(alert) == cause]
        # One that was resolved at this step began before it: where another begins at it, that one came after.
        anew = [alert for alert in same if alert.event != "resolved" and since_of(alert) == at]
        if not anew and any(alert.event == "resolved" for alert in same):
            continue
        newest = anew or same
        worst = max(
            newest, key=lambda alert: (_RANK[alert.level], -since_of(alert), alert.looks, alert.model_dump_json())
        )
        looks = max(alert.looks for alert in newest)
        open_alerts.append(worst.model_copy(update={"looks": looks}))
    return open_alerts


def cause_of(alert: Alert) -> str:
    """Its cause; of records of versions that had none, that of its rule."""
    if alert.cause:
        return alert.cause
    rule = BY_NAME.get(alert.rule)
    return alert.rule if rule is None else rule.cause


def since_of(alert: Alert) -> int:
    """The step at which it was opened; of records of versions that did not say so, its own."""
    return alert.step if alert.since is None else alert.since
