"""When should somebody look? Pure rules: records and the trainer's log in, alerts out. ``DETECTORS`` has one for each rule.

:func:`judge` asks every rule of every probe set, puts the signs of one cause together (:mod:`align_audit.alerts.agreement`)
and carries on the life of its alert (:mod:`align_audit.alerts.lifecycle`). :func:`suspect` asks the trainer's log alone.

Absolute limits, per token or as a share of the reference's own value, hold from the first audit, because a run can be ruined
before its second. Once ``baseline_audits`` healthy audits exist, a run is also compared with itself. An interval has to lie
beyond a limit as a whole: a wide interval on few probes raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import ModuleType
from typing import Any, Self

from align_audit.alerts import behaviour, inside, integrity, preference, text, trainer_log
from align_audit.alerts.added import answers, detector_of, log_detector_of, rule_of
from align_audit.alerts.agreement import alert_of, by_severity
from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.history import FURTHEST, Detector, History, LogDetector, Sign, View, knows, measured
from align_audit.alerts.lifecycle import step
from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME, RULES, Rule, Source
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.course import course_of
from align_audit.record.open_alerts import cause_of, open_alerts
from align_audit.record.probe_sets_in_use import STEPS_APART
from align_audit.record.stored_records import Head, chosen, heads_of
from align_audit.record.training_log import LogRow


def _by_name(*rooms: ModuleType) -> dict[str, Any]:
    return {rule.name: getattr(room, rule.name) for rule in RULES for room in rooms if hasattr(room, rule.name)}


DETECTORS: dict[str, Detector] = _by_name(integrity, behaviour, text, inside, preference)
"""Rule of a record → what computes it: the function of its name."""
LOG_DETECTORS: dict[str, LogDetector] = _by_name(trainer_log)
"""Rule of the trainer's log → what computes it."""

_SILENCING = ("reference", "numbers")
"""Causes after whose error, where a record shows it, nothing that is measured against the reference means anything."""


@dataclass(frozen=True)
class Suspicion:
    """What the trainer's log alone suggests: a reason to look, no verdict."""

    rule: str
    step: int
    message: str


def judge(
    record: AuditRecord,
    earlier: Sequence[AuditRecord],
    log: Sequence[LogRow] = (),
    config: AlertConfig | None = None,
    *,
    max_steps: int | None = None,
    broken: Mapping[str | None, int] | None = None,
) -> list[Alert]:
    """All alerts that are open at an audit, or were resolved at it; the worst first.

    Args:
        record: the audit, without alerts of its own.
        earlier: records of all probe sets of the run with their alerts, by step; those of the same step on other sets with
            them. Those of later steps, and of a course that the run left when it was resumed, are passed over.
        log: the trainer's, by step; rows after the audit are passed over.
        max_steps: of the run; None: not known, and rules that speak of a share of it go by steps.
        broken: probe set → the step at which an audit on it broke last. Its alerts are not over for that.

    Example:
        >>> from align_audit.config import AlertConfig
        >>> judge(record, [], (), AlertConfig(enabled=False))                        # doctest: +SKIP
        []
    """
    config = AlertConfig() if config is None else config
    if not config.enabled:
        return []
    course = course_of(record, earlier)
    heads = heads_of(course)
    still_open = open_alerts(heads)
    view = View(
        step=record.step,
        config=config,
        log=TrainerLog(log).until(record.step),
        max_steps=max_steps,
        eased=_eased(still_open),
    )
    looks = [_Look.of(history, course) for history in _histories(view, record, course)]
    signs = _on_every_set([sign for look in looks for sign in _signs(look)], looks, heads, record.step)
    # What the log alone shows is silent with the rest, or seen with it, but silences nothing.
    silent = any(
        alert.level == "error" and alert.step == record.step
        for alert in _raised([sign for sign in signs if sign.rule.cause in _SILENCING], view, still_open, heads)
    )
    signs += _log_signs(view, heads)
    heard = {*_SILENCING, *_apart(config)}
    raised = _raised([sign for sign in signs if not silent or sign.rule.cause in heard], view, still_open, heads)
    held = {cause_of(alert) for alert in still_open} - heard if silent else set()
    unknown = _unmeasured(still_open, looks, view, _breaking(broken or {}, record, course))
    return sorted(step(still_open, raised, record.step, held, unknown), key=by_severity)


def suspect(log: Sequence[LogRow], config: AlertConfig, *, max_steps: int | None = None) -> list[Suspicion]:
    """What the trainer's log suggests at its last row, by the rules that read it; those of the user's own with them.

    It reads the start and the end of the log only, so that it can be asked at every step.
    """
    curve = TrainerLog(log)
    if not config.enabled or not log:
        return []
    view = View(step=curve.step, config=config, log=curve, max_steps=max_steps)
    return [
        Suspicion(rule.name, curve.step, sign.message)
        for rule, detector in _log_rules(config)
        if (sign := detector(view)) is not None
    ]


# --- whose records, and of which course ---------------------------------------------------------------------------------


def _apart(config: AlertConfig) -> set[str]:
    """Causes of the user's own rules that read neither model: what the trainer logs, and what audits cost."""
    rules = (rule_of(name, added) for name, added in config.added.items())
    return {
        rule.cause for rule in rules if rule.source == "log" or any(read.startswith("cost.") for read in rule.reads)
    }


def _breaking(broken: Mapping[str | None, int], record: AuditRecord, course: Sequence[AuditRecord]) -> set[str | None]:
    """The probe sets that are still audited, and on which audits break."""
    first = min(_last_steps(record, course))
    return {name for name, at in broken.items() if at >= first}


def _last_steps(record: AuditRecord, course: Sequence[AuditRecord]) -> list[int]:
    """Of the audits that say which probe sets are in use."""
    return sorted({head.step for head in heads_of(course)} | {record.step})[-STEPS_APART:]


def _histories(view: View, record: AuditRecord, course: Sequence[AuditRecord]) -> list[History]:
    """What is known of each probe set at this step: of this one its new record, of the others their last."""
    steps = _last_steps(record, course)
    latest = {head.probe_name: head for head in heads_of(course) if head.step >= steps[0]}
    name = record.provenance.probe_name
    last_records = [_record_of(course, head) for set_name, head in latest.items() if set_name != name]
    return [_history(view, newest, course) for newest in (record, *last_records)]


def _record_of(course: Sequence[AuditRecord], wanted: Head) -> AuditRecord:
    return chosen(course, lambda head: (head.key, head.created) == (wanted.key, wanted.created))[0]


def _history(view: View, newest: AuditRecord, course: Sequence[AuditRecord]) -> History:
    """What came before a record on the same pairs: numbers of other pairs are no trend."""
    there = newest.provenance

    def comparable(head: Head) -> bool:
        same = head.probe_name == there.probe_name and head.probe_hash == there.probe_hash
        return same and head.step < newest.step

    seen: dict[str, Any] = {**vars(view), "step": newest.step}
    return History(**seen, record=newest, earlier=chosen(course, comparable), course=course)


# --- what each rule sees ------------------------------------------------------------------------------------------------


def _rules(config: AlertConfig) -> Iterator[tuple[Rule, Detector]]:
    """The rules of a record that are switched on."""
    yield from ((BY_NAME[name], detector) for name, detector in DETECTORS.items() if config.uses(name))
    for name, added in config.added.items():
        if (rule := rule_of(name, added)).source != "log":
            yield rule, detector_of(name, added)


def _log_rules(config: AlertConfig) -> Iterator[tuple[Rule, LogDetector]]:
    """The rules of the trainer's log that are switched on."""
    yield from ((BY_NAME[name], detector) for name, detector in LOG_DETECTORS.items() if config.uses(name))
    for name, added in config.added.items():
        if (rule := rule_of(name, added)).source == "log":
            yield rule, log_detector_of(name, added)


@dataclass(frozen=True)
class _Look:
    """One probe set at a step.

    Attributes:
        history: of its newest audit.
        siblings: audits of the same weights and step.
        bases: what :meth:`base` has looked for already.
    """

    history: History
    siblings: Sequence[AuditRecord]
    bases: dict[Source, History | None] = field(default_factory=dict)

    @classmethod
    def of(cls, history: History, course: Sequence[AuditRecord]) -> Self:
        """That of a history, among the audits of the run."""
        there = history.record.provenance
        same = (history.step, there.policy_hash, there.reference_hash, there.probe_name)
        return cls(history, chosen(course, lambda head: head.key[:4] == same))

    @property
    def probe_name(self) -> str | None:
        """Of the set."""
        return self.history.record.provenance.probe_name

    @property
    def tells(self) -> bool:
        """Are there pairs enough to say that something is not there?"""
        margins = self.history.record.margins
        return math.isfinite(margins.shift.low) and math.isfinite(margins.accuracy.high)

    def base(self, source: Source) -> History | None:
        """The newest look that has a part: the audit itself, another one of the same weights and step, or one before."""
        if source not in self.bases:
            self.bases[source] = self._base(source)
        return self.bases[source]

    def _base(self, source: Source) -> History | None:
        history = self.history
        for record in (history.record, *self.siblings):
            if measured(record, source):
                return replace(history, record=record)
        last = history.last(source)
        return None if last is None else replace(last, eased=history.eased)


def _signs(look: _Look) -> Iterator[Sign]:
    """What the rules see of one probe set, each at the last audit that measured what it reads."""
    config = look.history.config
    for rule, detector in _rules(config):
        base = look.base(rule.source)
        if base is not None and (sign := detector(base)) is not None:
            now = replace(sign, step=base.step, probe_name=look.probe_name)
            yield _counted(now, _looks_before(base, rule, detector, config), config)


def _on_every_set(signs: Sequence[Sign], looks: Sequence[_Look], heads: Sequence[Head], at: int) -> list[Sign]:
    """The signs; of rules that every probe set has to show, where all do at this step, and as long as all have.

    A set of too few pairs for an interval cannot show that something is missing, and is not asked. One that is not audited any
    more has its say where its last audit saw a shift.
    """
    telling = [look for look in looks if look.tells]
    gone = {head.probe_name: head for head in heads if head.probe_name not in {look.probe_name for look in looks}}
    if any(head.shift.low > 0 for head in gone.values()):
        telling = []
    kept = list(signs)
    for rule in {sign.rule for sign in signs if sign.rule.on_every_set}:
        held = {sign.probe_name: sign.held for sign in signs if sign.rule is rule}
        shown = bool(telling) and all(look.probe_name in held and look.history.step == at for look in telling)
        kept = [
            replace(sign, held=min(held.values())) if sign.rule is rule else sign
            for sign in kept
            if sign.rule is not rule or shown
        ]
    return kept


def _looks_before(
    history: History, rule: Rule, detector: Detector, config: AlertConfig
) -> Iterator[tuple[int, Sign | None]]:
    """What a rule saw at the looks before this one, back in time. Of one that could not tell nothing is given."""
    look, untold = history.last(rule.source), 0
    while look is not None and untold < FURTHEST:
        sign = detector(look)
        if sign is not None or _tells(look, rule, config):
            yield look.step, sign
            untold = 0
        else:
            untold += 1
        look = look.last(rule.source)


def _log_signs(view: View, heads: Sequence[Head]) -> Iterator[Sign]:
    """What the rules of the trainer's log see at this step; looks before are the steps of the audits before."""
    steps = sorted({head.step for head in heads if 0 < head.step < view.step}, reverse=True)
    for _, detector in _log_rules(view.config):
        if (sign := detector(view)) is not None:
            views = (replace(view, step=at, log=view.log.until(at), eased=frozenset()) for at in steps)
            looks = ((look.step, detector(look)) for look in views)
            yield _counted(replace(sign, step=view.step), looks, view.config)


def _counted(sign: Sign, earlier: Iterable[tuple[int, Sign | None]], config: AlertConfig) -> Sign:
    """With how many looks in a row it was seen at, and since which step, as far as its patience asks for; ``earlier`` goes back
    in time, step by step."""
    held, errors, since = 1, int(sign.level == "error"), sign.step
    for at, previous in islice(earlier, max(config.patience(sign.rule), config.error_looks - 1)):
        if previous is None or (previous.witness and not sign.witness):
            break
        if previous.level == "error" and errors == held:
            errors += 1
        held, since = held + 1, at
    return replace(sign, held=held, error_looks=errors, since=since)


# --- alerts -------------------------------------------------------------------------------------------------------------


def _raised(signs: Sequence[Sign], view: View, still_open: Sequence[Alert], heads: Sequence[Head]) -> list[Alert]:
    """The alerts that signs make, one of each cause."""
    causes = dict.fromkeys(sign.rule.cause for sign in signs)
    made = (_alert(cause, signs, view, still_open, heads) for cause in causes)
    return [alert for alert in made if alert is not None]


def _unmeasured(
    still_open: Sequence[Alert], looks: Sequence[_Look], view: View, breaking: Collection[str | None]
) -> set[str]:
    """Causes of open alerts of which a rule that is no mere witness reads what was known before this step, and is not at it,
    on the probe set that leads: it was not measured, it came out as NaN, or the user's function broke. Of a rule that every set
    has to show: on any of them.

    A set that has no say any more holds nothing, unless audits on it break, and neither does a rule that is switched off, or
    what no audit of late knows.
    """
    by_name = {look.probe_name: look for look in looks}
    rules = {rule.name: rule for rule, _ in _rules(view.config)}
    causes = set()
    for alert in still_open:
        look = by_name.get(alert.probe_name)
        if look is None:
            causes |= {cause_of(alert)} if alert.probe_name in breaking and alert.rule in rules else set()
            continue
        for name in (alert.rule, *alert.signals):
            rule = rules.get(name)
            if rule is None or (name != alert.rule and rule.weight == "witness"):
                continue
            base = _last_known(look.base(rule.source), rule, view.config)
            waits = rule.on_every_set and any(each.tells and each.history.step < view.step for each in looks)
            if waits or (base is not None and base.step < view.step):
                causes.add(cause_of(alert))
    return causes


def _last_known(history: History | None, rule: Rule, config: AlertConfig) -> History | None:
    """The newest look, from this one back, at which a rule could be judged; None: at none of the last few."""
    for _ in range(FURTHEST):
        if history is None or _tells(history, rule, config):
            return history
        history = history.last(rule.source)
    return None


def _tells(history: History, rule: Rule, config: AlertConfig) -> bool:
    """Can a rule be judged at a look: are its numbers known, and does the user's function not break?"""
    added = config.added.get(rule.name)
    return answers(added, history) if added is not None and added.check else knows(history, rule)


def _alert(
    cause: str, signs: Sequence[Sign], view: View, still_open: Sequence[Alert], heads: Sequence[Head]
) -> Alert | None:
    """The alert that the signs of a cause make together."""
    is_open = any(cause_of(alert) == cause for alert in still_open)
    extra = int(not is_open and _cools_down(cause, view, heads))
    same = [sign for sign in signs if sign.rule.cause == cause]
    return alert_of(same, view.config, is_open=is_open, extra_looks=extra)


def _cools_down(cause: str, view: View, heads: Sequence[Head]) -> bool:
    """Was an alert of this cause resolved at one of the last ``cooldown`` looks, or at another look of this very step?"""
    if not view.config.cooldown:
        return False
    # Looks at one step count once, so that the second of two probe sets is no later look than the first.
    steps = sorted({head.step for head in heads if head.step < view.step})[-view.config.cooldown :]
    since = min([*steps, view.step])
    return any(
        alert.event == "resolved" and cause_of(alert) == cause
        for head in heads
        if head.step >= since
        for alert in head.alerts
    )


def _eased(still_open: Sequence[Alert]) -> frozenset[str]:
    """The limits of warnings that open alerts went by."""
    names = {name for alert in still_open for name in (alert.rule, *alert.signals)}
    return frozenset(
        limit.option for name in names if name in BY_NAME for limit in BY_NAME[name].limits if limit.level == "warning"
    )
