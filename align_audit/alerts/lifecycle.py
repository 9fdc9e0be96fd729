"""The life of an alert: opened, worse, open, resolved. One cause is one alert, over looks and over probe sets."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from align_audit.record.alert import Alert
from align_audit.record.open_alerts import SEVERITY, cause_of, since_of


def step(
    open_alerts: Iterable[Alert],
    alerts_now: Iterable[Alert],
    at: int,
    held: Collection[str] = (),
    unmeasured: Collection[str] = (),
) -> list[Alert]:
    """The alerts that are open, or were just resolved, after a look.

    An alert is resolved when two looks in a row do not see it; until then it stays open, with ``looks`` of 0 after the first.
    Its level never falls while it is open. The message of one that is not seen says so, and what was said of it before.

    Args:
        open_alerts: at the look before, with at most one of each cause.
        alerts_now: what this look sees, at most one of each cause. One whose ``step`` is earlier was seen where it was measured
            last: it keeps an alert open, and opens none.
        at: the step of this look. Looks at one step (of several probe sets, or a health and a full audit) count once.
        held: causes about which nothing can be said now: they stay as they are.
        unmeasured: causes that went by what this look did not measure (another probe set, a part of a full audit): for them it
            is no look, and where it does not see them it neither counts nor moves their step.
    """
    earlier = {cause_of(alert): alert for alert in open_alerts}
    seen = {cause_of(alert): alert for alert in alerts_now}
    alerts: list[Alert] = []
    for cause in dict.fromkeys([*earlier, *seen]):
        previous, now = earlier.get(cause), seen.get(cause)
        if previous is None:
            assert now is not None
            if now.step == at:
                alerts.append(now.model_copy(update={"event": "opened", "since": at, "looks": 1}))
        elif cause in held:
            alerts.append(_retold(previous, f"Nothing can be said of it at step {at}.", event="open", step=at))
        elif now is not None:
            alerts.append(_seen_again(previous, now, at))
        elif cause in unmeasured:
            alerts.append(_retold(previous, f"What it goes by was not measured at step {at}.", event="open"))
        else:
            alerts.append(_not_seen(previous, at))
    return alerts


def _seen_again(previous: Alert, now: Alert, at: int) -> Alert:
    worse = SEVERITY[now.level] < SEVERITY[previous.level]
    looks = previous.looks
    if now.step == at:
        looks = max(looks, 1) if previous.step == at else looks + 1
    else:
        now = _retold(now, f"What it goes by was not measured at step {at}.")
    return now.model_copy(
        update={
            "event": "worse" if worse else "open",
            "level": now.level if worse else previous.level,
            "step": at,
            "since": since_of(previous),
            "seen_since": previous.seen_since,
            "looks": looks,
            "clean_step": previous.clean_step,
            "checkpoint": previous.checkpoint,
            "command": previous.command,
        }
    )


def _not_seen(previous: Alert, at: int) -> Alert:
    resolved = previous.looks == 0 and previous.step < at
    words = f"It is not seen at step {at}; it is over when the next look does not see it either."
    if resolved:
        words = f"It is over: at step {at} a second look in a row did not see it."
    event = "resolved" if resolved else "open"
    return _retold(previous, words, event=event, step=at, looks=0, since=since_of(previous))


def _retold(alert: Alert, words: str, **update: object) -> Alert:
    """An alert that is not seen now: what was said of it when it was, is told as of then."""
    observation = alert.observation or alert.message
    # Records of versions without it do not say when one was seen that the look before did not see.
    at = alert.observed_at if alert.observed_at is not None or alert.looks == 0 else alert.step
    when = "Earlier" if at is None else f"At step {at}"
    message = f"{words} {when} it said: {observation}"
    return alert.model_copy(update={"message": message, "observation": observation, "observed_at": at, **update})
