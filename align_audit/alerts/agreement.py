"""From signs to one alert a cause: one noisy sign is no error, and several that agree are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from align_audit.alerts.history import Sign
from align_audit.config import AlertConfig
from align_audit.options.rules import CAUSES, RULES
from align_audit.record.alert import Alert, AlertLevel
from align_audit.record.open_alerts import SEVERITY

_PLACES = {rule.name: place for place, rule in enumerate(RULES)}
_CAUSES = {cause: place for place, cause in enumerate(CAUSES)}


def alert_of(
    signs: Sequence[Sign], config: AlertConfig, *, is_open: bool = False, extra_looks: int = 0
) -> Alert | None:
    """The alert that signs of one cause make together; None: they are not enough.

    An error: a sign that is certain; one beyond its limit of an error at ``error_looks`` looks in a row, where its rule may be
    one alone; two independent signs (of two families), one of them beyond that limit; or ``agreeing_families`` of any strength.
    A warning: a rule that stands alone, seen for as many looks as its patience says; or two independent signs, whatever their
    patience, one of which stands alone.

    Args:
        signs: of all probe sets, and of the trainer's log; not empty.
        is_open: the alert of this cause is open: it stays so as long as anything but a witness sees it.
        extra_looks: looks that a warning needs beyond its rule's patience, shortly after it was resolved.
    """
    level, why = _level(signs, config, is_open, extra_looks)
    if level is None:
        return None
    lead = min(signs, key=_order)
    further = sorted(
        {sign.rule.name for sign in signs} - {lead.rule.name}, key=lambda name: _PLACES.get(name, len(_PLACES))
    )
    newest = max(sign.step for sign in signs)
    # What leads may have been measured earlier than what agrees with it.
    begin = "" if lead.step == newest else f"At step {lead.step}: "
    return Alert(
        rule=lead.rule.name,
        cause=lead.rule.cause,
        level=level,
        step=newest,
        seen_since=min(sign.since for sign in signs if sign is lead or sign.weight != "witness"),
        looks=1,
        signals=further,
        probe_name=lead.probe_name,
        layers=sorted(lead.layers),
        value=lead.value,
        baseline=lead.baseline,
        threshold=lead.limit,
        message=f"{begin}{lead.words}{why}{_told(signs, lead)}",
        suggestion=lead.suggestion,
    )


def _order(sign: Sign) -> tuple[int, int, int, int, str]:
    """The strongest sign first; the same whatever the order of the probe sets."""
    weight = {"certain": 0, "alone": 1, "witness": 2}[sign.weight]
    # The trainer's log is of other pairs than the rest: it leads only where nothing was measured.
    logged = sign.rule.source == "log" and sign.weight != "certain"
    place = _PLACES.get(sign.rule.name, len(_PLACES))
    return weight + 3 * logged, sign.level != "error", place, -sign.step, sign.probe_name or ""


def _level(
    signs: Sequence[Sign], config: AlertConfig, is_open: bool, extra_looks: int
) -> tuple[AlertLevel | None, str]:
    """Of which level they are together, and a sentence that says why where that is not plain."""
    families = {sign.rule.family for sign in signs}
    strong = [sign for sign in signs if sign.level == "error" and config.may_be_error(sign.rule.name)]
    may_be_error = any(config.may_be_error(sign.rule.name) for sign in signs)
    if any(sign.weight == "certain" and sign.held >= config.patience(sign.rule) for sign in strong):
        return "error", ""
    if strong and len(families) >= 2:
        return "error", ""
    if any(
        sign.rule.lone_error and sign.error_looks >= max(config.error_looks, config.patience(sign.rule))
        for sign in strong
    ):
        looks = max(sign.error_looks for sign in strong)
        # It is looked back only as far as is needed: it may have been so for longer.
        return "error", f" It was so at the last {looks} looks." if looks > 1 else ""
    if may_be_error and len(families) >= config.agreeing_families:
        return "error", ""
    alone = [sign for sign in signs if sign.weight != "witness"]
    confirmed = [sign for sign in alone if sign.held >= config.patience(sign.rule) + extra_looks]
    agreeing = len(families) >= 2 and alone and not extra_looks
    return ("warning" if confirmed or agreeing or (alone and is_open) else None), ""


def _told(signs: Sequence[Sign], lead: Sign) -> str:
    """The other signs, in a sentence; of those that were seen at another step than the first one, at which."""
    seen: dict[str, str] = {}
    for sign in sorted(signs, key=_order):
        if sign.rule.name != lead.rule.name:
            value = [] if math.isnan(sign.value) else [f"{sign.value:.3g}"]
            details = " ".join([*value, *([] if sign.step == lead.step else [f"at step {sign.step}"])])
            seen.setdefault(sign.rule.name, f"{sign.rule.name} ({details})" if details else sign.rule.name)
    return f" It agrees with {', '.join(seen.values())}." if seen else ""


def by_severity(alert: Alert) -> tuple[bool, int, int, str]:
    """The worst first; resolved ones last."""
    return alert.event == "resolved", SEVERITY[alert.level], _CAUSES.get(alert.cause, len(_CAUSES)), alert.cause
