"""How a run stands at one of its audits: its status, what is open, and the figures that every screen shows first.

Terminal, closing table, TensorBoard and pictures read them here, so that all of them say the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from align_audit.config import AlertConfig
from align_audit.errors import counted, plural
from align_audit.options.rules import CAUSES, LIMITS, RULE_OF
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, control_items
from align_audit.record.course import course_of
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import is_unknown, span
from align_audit.record.open_alerts import SEVERITY, cause_of, open_alerts, since_of
from align_audit.record.status import AuditsSoFar, Status, status_of_course
from align_audit.record.stored_records import Head, StoredRecords, chosen, heads_of
from align_audit.record.training_log import LogRow, last_until, up_to

_MARGIN = "rewards/margins"
"""What the trainer calls its reward margin on the training pairs."""


@dataclass(frozen=True)
class Standing:
    """A run, of one probe set, as it stood at an audit.

    Attributes:
        record: of the audit.
        status: at its step, from this audit and those before it.
        alerts: what is open, the worst first, then the oldest.
        full: the last full audit up to this one; None: there was none.
        logged: the trainer's last row up to this step that has a reward margin.
    """

    record: AuditRecord
    status: Status
    alerts: list[Alert]
    full: AuditRecord | None
    logged: LogRow | None

    @property
    def worst(self) -> Alert | None:
        """The alert that the status is of; None: no warning and no error is open."""
        return next((alert for alert in self.alerts if alert.level != "info"), None)

    @property
    def broken(self) -> bool:
        """Has the measurement's own identity control failed?"""
        return self.full is not None and self.full.controls.identity.verdict == "failed"

    @property
    def level(self) -> str:
        """Of the limits that are worth showing: those of an error where one is open."""
        return "error" if self.status.word == "ERROR" else "warning"

    @property
    def reward_margin(self) -> float | None:
        """β times the margin shift, in TRL's unit; None: β is not known."""
        beta = self.record.provenance.beta
        return None if beta is None else beta * self.record.margins.shift.mean

    @property
    def logged_margin(self) -> float | None:
        """What the trainer itself says of its training pairs."""
        return None if self.logged is None else self.logged.logs[_MARGIN]

    @cached_property
    def reward_accuracy(self) -> Estimate:
        """Share of pairs whose margin has grown; not known where policy and reference are equal."""
        return Head.of(self.record).reward_accuracy

    def limit(self, option: str) -> float | None:
        """The limit that a figure is held to: that of an open alert that goes by it, else of the level worth showing.

        An alert that is open goes by its limit of a warning, eased, until its figure has come back behind that.

        Args:
            option: of the limits, without their level: ``kl`` or ``chosen_drop``.

        Returns:
            Above 0, in the option's unit. None: the rule is switched off.
        """
        rule, at = RULE_OF[f"{option}_warning"], self.record.provenance.probe_name
        alert = next(
            (each for each in self.alerts if rule in (each.rule, *each.signals) and each.level != "info"), None
        )
        if alert is None or alert.probe_name not in (None, at):
            return limit_of(self.record, f"{option}_{self._level_of(option)}")
        if alert.rule == rule and not is_unknown(alert.threshold):
            assert alert.threshold is not None
            return abs(alert.threshold)
        margins = self.record.margins
        value = margins.kl.mean if option == "kl" else -margins.chosen_logp_change_per_token.mean
        error, warning = (limit_of(self.record, f"{option}_{level}") for level in ("error", "warning"))
        if error is not None and value > error:
            return error
        if warning is None or since_of(alert) == self.record.step:
            return warning
        return LIMITS[f"{option}_warning"].eased(warning, _hysteresis(self.record))

    def _level_of(self, option: str) -> str:
        """That of the limit which holds where no alert goes by the figure.

        KL beyond its first limit opens nothing while the chosen completions keep their likelihood: then the second one holds.
        """
        if option != "kl":
            return self.level
        margins, limit = self.record.margins, limit_of(self.record, "kl_warning")
        drop = limit_of(self.record, "kl_chosen_drop")
        kept = drop is not None and margins.keeps_chosen(drop)
        return "error" if kept and limit is not None and margins.kl.mean > limit else self.level

    @cached_property
    def entropy_ratio(self) -> float:
        """Entropy of the policy over that of the reference; NaN where it cannot be known."""
        margins = self.record.margins
        reference = margins.reference_entropy.mean
        return margins.entropy.mean / reference if reference > 0 else math.nan

    def headline(self) -> str:
        """What is wrong, as a clause, and since when; of a healthy run, that nothing is."""
        worst = self.worst
        if self.status.word == "BLIND" or worst is None:
            return self.status.reason.rstrip(".")
        words = CAUSES.get(cause_of(worst)) or worst.rule.replace("_", " ")
        since = since_of(worst)
        words += "" if since == self.record.step else f", since step {since}"
        if worst.looks == 0:
            seen = worst.observed_at
            words += f", not seen at step {self.record.step}" if seen is None else f", last seen at step {seen}"
        more = sum(alert.level != "info" for alert in self.alerts) - 1
        words += f" (and {counted(more, 'more alert')})" if more else ""
        return f"{words}. {self.status.blind.rstrip('.')}" if self.status.blind else words


def standing_at(record: AuditRecord, history: Sequence[AuditRecord], log: Sequence[LogRow] = ()) -> Standing:
    """How things stood at an audit.

    Args:
        history: audits of the run, of all probe sets, in any order, with this one or without; later ones do not count.
        log: the trainer's, by step.
    """
    records = _up_to_here(record, history)
    rows = up_to(log, record.step)
    full = chosen(records, lambda head: head.kind == "full")
    return Standing(
        record,
        status_of_course(records, [], rows),
        _by_weight(open_alerts(heads_of(records))),
        full[-1] if full else None,
        next((row for row in reversed(rows) if _MARGIN in row.logs), None),
    )


def standings_over(course: Sequence[AuditRecord], log: Sequence[LogRow] = ()) -> list[Standing]:
    """How things stood at each step, by step: as :func:`standing_at` of each, with the course gone through once.

    Args:
        course: audits of one course and one probe set, by step.
        log: the trainer's, by step.
    """
    heads, so_far, end = heads_of(course), AuditsSoFar(), 0
    with_margin = [row for row in log if _MARGIN in row.logs]
    standings: list[Standing] = []
    full: AuditRecord | None = None
    for place in _places_of_steps(heads):
        record, head = course[place], heads[place]
        last_full = None
        while end < len(heads) and (heads[end].step, heads[end].created) <= (head.step, head.created):
            so_far.add(heads[end])
            last_full = end if heads[end].kind == "full" else last_full
            end += 1
        if last_full is not None:
            full = record if last_full == place else course[last_full]
        row = last_until(log, head.step)
        status = so_far.status(full, [], None if row is None else row.step)
        alerts = _by_weight(open_alerts(so_far.of_last_step))
        standings.append(Standing(record, status, alerts, full, last_until(with_margin, head.step)))
    return standings


def _up_to_here(record: AuditRecord, history: Sequence[AuditRecord]) -> Sequence[AuditRecord]:
    """The audits of its probe set up to this one, which is among them, by step; stored ones are not parsed for it.

    Of the course that it is on: a run that was resumed has others as well.
    """
    history = course_of(record, history)
    here = (record.step, record.provenance.created)
    kept = chosen(
        history,
        lambda head: (
            head.probe_name == record.provenance.probe_name
            and ((head.step, head.created) <= here or head.key == record.key)
        ),
    )
    missing = not any(head.key == record.key for head in heads_of(kept))
    if isinstance(kept, StoredRecords):
        kept = kept.by_step()
        return kept.followed_by(record) if missing else kept
    kept = sorted(kept, key=lambda each: (each.step, each.provenance.created))
    return [*kept, record] if missing else kept


def audit_of_each_step(records: Sequence[AuditRecord]) -> list[AuditRecord]:
    """One audit of each step, by step: the full one where there was one, else the last look. Others are not parsed for it.

    Args:
        records: of one course and one probe set, by step.
    """
    return [records[place] for place in _places_of_steps(heads_of(records))]


def heads_of_each_step(records: Sequence[AuditRecord]) -> list[Head]:
    """The heads of :func:`audit_of_each_step`."""
    heads = heads_of(records)
    return [heads[place] for place in _places_of_steps(heads)]


def _places_of_steps(heads: Sequence[Head]) -> list[int]:
    latest: dict[int, int] = {}
    for place, head in enumerate(heads):
        if head.kind == "full" or head.step not in latest or heads[latest[head.step]].kind == "health":
            latest[head.step] = place
    return list(latest.values())


def _by_weight(alerts: Sequence[Alert]) -> list[Alert]:
    """The worst first, then the oldest."""
    return sorted(alerts, key=lambda alert: (SEVERITY[alert.level], since_of(alert)))


def limit_of(record: AuditRecord, option: str) -> float | None:
    """A limit of the rules as it stood in the configuration of an audit; None: that rule or level was switched off, or the rule
    may give a warning at most.

    Example:
        >>> limit_of(record, "kl_warning")                                                    # doctest: +SKIP
        0.35
    """
    options, rule = _alert_options(record), RULE_OF[option]
    said = options["rules"].get(rule) if isinstance(options.get("rules"), dict) else None
    if options.get("enabled") is False or (isinstance(said, dict) and said.get("enabled") is False):
        return None
    if LIMITS[option].level == "error" and isinstance(said, dict) and said.get("level") == "warning":
        return None
    try:
        value = float(options.get(option, LIMITS[option].default))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _alert_options(record: AuditRecord) -> dict[str, Any]:
    options = record.provenance.config.get("alerts", {})
    return options if isinstance(options, dict) else {}


def _hysteresis(record: AuditRecord) -> float:
    share = _alert_options(record).get("hysteresis")
    return float(share) if isinstance(share, int | float) else AlertConfig().hysteresis


# --- where, and with what evidence ------------------------------------------------------------------------------------


def where_in_words(full: AuditRecord | None, step: int) -> str:
    """Where the preference sits, in a few words: ``layers 3–4, 92 % of the gain``.

    Args:
        full: the last full audit.
        step: of the audit that it is said at.
    """
    if full is None:
        return "not measured yet"
    if full.reference_check.same_weights:
        return "nowhere: policy and reference are equal" if full.step == step else "not measured since training began"
    return _where(full) + ("" if full.step == step else f" (step {full.step})")


def where_in_short(full: AuditRecord | None) -> str:
    """The same for a column: ``layers 3–4`` is a claim, ``peak at 2 (31 %)`` is none; ``–``: not known."""
    if full is None or full.patching is None or full.reference_check.same_weights:
        return "–"
    if full.finding is not None and full.finding.localized:
        return _layers(full.finding.layers)
    peak = full.patching.peak_layer
    return "–" if peak is None else f"peak at {peak}" + _share(peak_share(full), " ({})")


def peak_share(full: AuditRecord) -> float:
    """Share of the margin shift that is gained at the peak layer; NaN where it cannot be known."""
    patching = full.patching
    if patching is None or patching.peak_layer is None:
        return math.nan
    return patching.layer_gain[patching.peak_layer].mean


def _where(full: AuditRecord) -> str:
    patching = full.patching
    if patching is None:
        return "not measured"
    if full.finding is not None and full.finding.localized:
        gain = patching.standing_out.gain.mean if patching.standing_out is not None else math.nan
        return _layers(full.finding.layers) + _share(gain, ", {} of the gain")
    if patching.peak_layer is None:
        return "no layer stands out"
    return f"peak at layer {patching.peak_layer}" + _share(peak_share(full), ", {} of the gain") + ", not localized"


def _share(value: float, form: str) -> str:
    return form.format(percent(value)) if math.isfinite(value) else ""


def _layers(layers: Sequence[int]) -> str:
    return f"{plural('layer', len(layers))} {span(layers)}"


def evidence_in_words(full: AuditRecord | None) -> str:
    """How many of the controls that were run have passed, and which did not: ``4 of 5 controls (not split half)``."""
    if full is None:
        return "no controls yet"
    run = [(name, control) for name, control in control_items(full) if control.verdict != "not_run"]
    if not run:
        return "no control was run"
    failed = [name.replace("_", " ") for name, control in run if control.verdict == "failed"]
    passed = f"{len(run) - len(failed)} of {len(run)} controls"
    return passed + (f" (not {', '.join(failed)})" if failed else "")


# --- figures ----------------------------------------------------------------------------------------------------------


def figure(value: float | None, signed: bool = False) -> str:
    """A number with two decimals, more where it is small: ``+0.01``, ``9.42``, ``0.0041``, ``−∞``, ``not known``.

    Example:
        >>> figure(9.42), figure(-5.4, signed=True), figure(0.0041), figure(float("nan"))
        ('9.42', '−5.40', '0.0041', 'not known')
    """
    if is_unknown(value):
        return "not known"
    assert value is not None
    sign = "+" if signed else ""
    small = 0 < abs(value) < 0.01
    words = f"{value:{sign}.2g}" if small else f"{value:{sign}.2f}".replace("inf", "∞")
    return words.replace("-", "−", 1) if words.startswith("-") else words


def logged_figure(value: float | None, signed: bool = False) -> str:
    """The same of a number that the trainer logged: there NaN is what it computed, and not a gap.

    Example:
        >>> logged_figure(float("nan")), logged_figure(float("-inf"))
        ('NaN', '−∞')
    """
    return "NaN" if value is not None and math.isnan(value) else figure(value, signed)


def percent(value: float | None) -> str:
    """A share.

    One that is nearly all or nearly nothing has a decimal, so that it does not read as all or nothing.

    Example:
        >>> percent(0.824), percent(0.9996), percent(-0.003), percent(1.0), percent(None)
        ('82 %', '99.9 %', '−0.3 %', '100 %', 'not known')
    """
    if is_unknown(value) or value is None:
        return "not known"
    if value < 0.0:
        return f"−{percent(-value)}"
    near_an_end = 0.0 < value < 0.005 or 0.995 <= value < 1.0
    return f"{min(max(value * 100, 0.1), 99.9):.1f} %" if near_an_end else f"{abs(value) * 100:.0f} %"  # of −0.0, too
