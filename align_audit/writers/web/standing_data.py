"""How a run stands, what to do, and one row for each of its alerts, as data of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align_audit.errors import counted
from align_audit.options.rules import CAUSES, RETIRED
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.open_alerts import SEVERITY, cause_of, since_of
from align_audit.record.run import AuditRun
from align_audit.record.status import Status
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.training_log import LogRow, up_to
from align_audit.writers.brief import what_to_do
from align_audit.writers.standing import Standing, figure, logged_figure, percent, standing_at
from align_audit.writers.web.json_values import number, text
from align_audit.writers.words import pairs_in_words


def standing_now(run: AuditRun, records: Sequence[AuditRecord]) -> Standing | None:
    """How a run of one probe set stands, failures since the last audit included; None: nothing was audited.

    Args:
        records: of its present course, by step.
    """
    if not records:
        return None
    return replace(standing_at(records[-1], records, run.training_log), status=run.status)


def status_data(run: AuditRun, standing: Standing | None) -> dict[str, Any]:
    """What the banner says.

    Returns:
        ``word``, ``since`` (a step, or None), ``sentences``, ``do`` (``words``, ``checkpoint``, ``command``), ``log`` (what the
        training log says; empty: nothing), ``audited``, when the last audit was made (ISO 8601; None: there is none), and
        ``facts``, a line about the audits.
    """
    status = run.status
    return {
        "word": status.word,
        "since": status.since,
        "sentences": [text(words) for words in _sentences(run, standing)],
        "do": _do(status, standing),
        "log": _log(standing, run.training_log),
        "audited": None if standing is None else standing.record.provenance.created,
        "facts": _facts(run, standing),
    }


def _sentences(run: AuditRun, standing: Standing | None) -> list[str]:
    if not run.in_use and standing is not None:
        left = f"The run goes on without these pairs: this is of step {standing.record.step}."
        return [left, *_sentences(replace(run, in_use=True, training_log=(), failures=[]), standing)]
    if standing is None:
        return [run.status.reason]
    if run.status.word == "BLIND":
        return [run.status.reason, f"At step {standing.record.step}, the last audit: {_figures(standing)}."]
    if run.status.word == "HEALTHY":
        step = standing.record.step
        if step == 0 and standing.record.reference_check.same_weights:
            return ["Training has not begun: policy and reference are equal.", _at_start(standing)]
        still = sum(alert.level == "info" for alert in standing.alerts)
        first = f"No warning and no error is open at step {step}." if still else f"No alert is open at step {step}."
        return [first, f"{_capital(_figures(standing))}."]
    words = standing.headline()
    return [f"{_capital(words)}.", f"{_capital(_figures(standing))}."]


def _at_start(standing: Standing) -> str:
    margins = standing.record.margins
    return f"The reference predicts {percent(margins.reference_token_accuracy.mean)} of the chosen answers' tokens."


def _figures(standing: Standing) -> str:
    """The three figures that tell whether a policy still writes, each with its limit."""
    margins = standing.record.margins
    change = margins.chosen_logp_change_per_token.mean
    drop, most = standing.limit("chosen_drop"), standing.limit("kl")
    if math.isnan(change):
        chosen = "the chosen answers' change is not known"
    elif abs(change) < 0.005:
        chosen = "chosen answers are as likely as before"
    else:
        verb = "lost" if change < 0 else "gained"
        chosen = f"chosen answers {verb} {figure(abs(change))} nats per token"
        chosen += "" if drop is None or change > 0 else f" (limit {drop:.3g})"
    unit = " nats per token" if math.isfinite(margins.kl.mean) else ""
    kl = f"KL to the reference is {figure(margins.kl.mean)}{unit}" + ("" if most is None else f" (limit {most:.3g})")
    right = margins.token_accuracy.mean
    reference = f"(reference {percent(margins.reference_token_accuracy.mean)})"
    tokens = (
        f"{percent(right)} of next tokens are right {reference}"
        if math.isfinite(right)
        else "next tokens are not known"
    )
    return f"{chosen}, {kl}, {tokens}"


def _do(status: Status, standing: Standing | None) -> dict[str, Any]:
    """The next step. The command of an alert goes back to a checkpoint that still existed when it was raised."""
    nothing = {"checkpoint": None, "command": None}
    if status.word == "HEALTHY":
        return {"words": "Nothing to do.", **nothing}
    if standing is None:
        return {"words": f"{_capital(status.advice or 'wait for the first audit')}.", **nothing}
    words, alert = text(f"{_capital(what_to_do(standing, command=False))}."), standing.worst
    if status.word == "BLIND" or alert is None:
        return {"words": words, **nothing}
    return {
        "words": words,
        "checkpoint": None if alert.checkpoint is None else text(alert.checkpoint),
        "command": _command(alert),
    }


def _command(alert: Alert) -> str | None:
    """What goes back, of an error. A warning costs no training yet."""
    return None if alert.command is None or alert.level != "error" else text(alert.command)


def _log(standing: Standing | None, log: Sequence[LogRow]) -> str:
    """What the trainer said of itself at the step of the last audit, or the last time before it."""
    if standing is None:
        return ""
    step = standing.record.step
    said: list[tuple[int, str]] = []
    for column, words in (
        ("loss", "loss"),
        ("rewards/margins", "reward margin"),
        ("rewards/accuracies", "reward accuracy"),
    ):
        logged = next((each for each in reversed(up_to(log, step)) if column in each.logs), None)
        if logged is not None:
            value = logged.logs[column]
            shown = (
                percent(value) if column == "rewards/accuracies" else logged_figure(value, column == "rewards/margins")
            )
            said.append((logged.step, f"{words} {shown}"))
    if not said:
        return ""
    last = max(at for at, _ in said)
    each = ", ".join(words + ("" if at == last else f" (step {at})") for at, words in said)
    return f"The training log at step {last}: {each}."


def _facts(run: AuditRun, standing: Standing | None) -> str:
    failures = len(run.failures)
    broken = f"{counted(failures, 'audit')} broke" if failures else ""
    if standing is None:
        return broken or "No audit yet"
    record = standing.record
    heads = heads_of(run.records)
    full = len({head.step for head in heads if head.kind == "full"})
    steps = len({head.step for head in heads})
    words = [
        f"{counted(steps, 'step')} audited, {full} in full; last at step {record.step}",
        broken,
        pairs_in_words(record, "probe pairs"),
        f"reference: {record.reference_check.source}",
    ]
    return text(" · ".join(word for word in words if word))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


# --- alerts -----------------------------------------------------------------------------------------------------------


def alert_rows(heads: Sequence[Head], standing: Standing | None) -> list[dict[str, Any]]:
    """One row for each cause of alerts: open ones first, the worst at the top.

    Args:
        heads: of the present course of one probe set, by step.

    Returns:
        Of each ``level`` (the highest since it was opened last), ``rule``, ``cause`` in words, ``since``, ``cleared`` (a step;
        None: still open), ``times`` that it was opened, ``earlier`` (what it was before: ``level``, ``since``, ``cleared``),
        ``message``, ``suggestion``, ``checkpoint``, ``command`` (of errors), ``value``, ``limit`` and ``agreeing``, the rules
        that say the same.
    """
    by_cause: dict[str, list[Alert]] = {}
    for head in heads:
        for alert in head.alerts:
            if alert.rule not in RETIRED:
                by_cause.setdefault(cause_of(alert), []).append(alert)
    still = {cause_of(alert) for alert in standing.alerts} if standing is not None else set()
    steps = [head.step for head in heads]
    rows = [_alert_row(cause, alerts, cause in still, steps) for cause, alerts in by_cause.items()]
    return sorted(rows, key=lambda row: (row["cleared"] is not None, SEVERITY[row["level"]], row["since"]))


def _alert_row(cause: str, alerts: Sequence[Alert], is_open: bool, steps: Sequence[int]) -> dict[str, Any]:
    *earlier, life = _lives(alerts)
    last, cleared = life[-1], None if is_open else _cleared(life, alerts, steps)
    return {
        **_life(life, cleared),
        "rule": text(last.rule),
        "cause": text(CAUSES.get(cause, "")),
        "times": len(earlier) + 1,
        "earlier": [_life(each, _cleared(each, alerts, steps)) for each in earlier],
        "message": text(last.message),
        "suggestion": "" if cleared is not None else text(last.suggestion),
        "checkpoint": None if last.checkpoint is None else text(last.checkpoint),
        "command": None if cleared is not None else _command(last),
        "value": number(last.value),
        "limit": number(last.threshold),
        "agreeing": [text(signal) for signal in last.signals],
    }


def _lives(alerts: Sequence[Alert]) -> list[list[Alert]]:
    """The alerts of one cause from one opening to the next; those of versions that did not tell of openings are one life."""
    seen = [alert for alert in alerts if alert.event != "resolved"] or list(alerts)
    if not any(alert.cause for alert in seen):
        return [seen]
    lives: dict[int, list[Alert]] = {}
    for alert in seen:
        lives.setdefault(since_of(alert), []).append(alert)
    return [lives[since] for since in sorted(lives)]


def _life(life: Sequence[Alert], cleared: int | None) -> dict[str, Any]:
    level = min((alert.level for alert in life), key=SEVERITY.__getitem__)
    return {"level": level, "since": min(map(since_of, life)), "cleared": cleared}


def _cleared(life: Sequence[Alert], alerts: Sequence[Alert], steps: Sequence[int]) -> int:
    """At which step it was over."""
    last = life[-1].step
    resolved = [alert.step for alert in alerts if alert.event == "resolved" and alert.step >= last]
    # Of versions that told of no end, it is over at the first step that it is not said at.
    return next(iter(resolved or [step for step in steps if step > last] or [steps[-1]]))


def first_error(heads: Sequence[Head]) -> int | None:
    """The first step of the course at which an error was open; None: at none."""
    return next(
        (
            head.step
            for head in heads
            if any(
                alert.level == "error" and alert.event != "resolved" and alert.rule not in RETIRED
                for alert in head.alerts
            )
        ),
        None,
    )
