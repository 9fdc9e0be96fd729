"""How a run stands, what to do, and one row for each of its alerts, as data of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align_audit.options.rules import CAUSES, RETIRED
from align_audit.record.audit_record import Alert, AuditRecord
from align_audit.record.run import AuditRun
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.training_log import LogRow
from align_audit.writers.brief import what_to_do
from align_audit.writers.standing import Standing, figure, limit_of, percent, standing_at
from align_audit.writers.web.json_values import number, text

_ORDER = {"error": 0, "warning": 1, "info": 2}


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
        training log says; empty: nothing), and ``facts``, a line about the audits.
    """
    status = run.status
    return {
        "word": status.word,
        "since": status.since,
        "sentences": [text(words) for words in _sentences(run, standing)],
        "do": _do(status.word, standing),
        "log": _log(standing, run.training_log),
        "facts": _facts(run, standing),
    }


def _sentences(run: AuditRun, standing: Standing | None) -> list[str]:
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
    record, level = standing.record, standing.level
    margins = record.margins
    change = margins.chosen_logp_change_per_token.mean
    drop, most = limit_of(record, f"chosen_drop_{level}"), limit_of(record, f"kl_{level}")
    if not math.isfinite(change):
        chosen = "the chosen answers' change is not known"
    elif abs(change) < 0.005:
        chosen = "chosen answers are as likely as before"
    else:
        verb = "lost" if change < 0 else "gained"
        chosen = f"chosen answers {verb} {figure(abs(change))} nats per token"
        chosen += "" if drop is None or change > 0 else f" (limit {drop:g})"
    kl = f"KL to the reference is {figure(margins.kl.mean)}" + ("" if most is None else f" (limit {most:g})")
    right = margins.token_accuracy.mean
    reference = f"(reference {percent(margins.reference_token_accuracy.mean)})"
    tokens = (
        f"{percent(right)} of next tokens are right {reference}"
        if math.isfinite(right)
        else "next tokens are not known"
    )
    return f"{chosen}, {kl}, {tokens}"


def _do(word: str, standing: Standing | None) -> dict[str, Any]:
    """The next step. The command of an alert goes back to a checkpoint that still existed when it was raised."""
    nothing = {"checkpoint": None, "command": None}
    if word == "HEALTHY":
        return {"words": "Nothing to do.", **nothing}
    if standing is None:
        return {
            "words": "Find out why audits do not come through: failures.jsonl, beside the records, has the tracebacks.",
            **nothing,
        }
    alert = standing.worst
    if word == "BLIND" or alert is None:
        return {"words": text(f"{_capital(what_to_do(standing))}."), **nothing}
    return {
        "words": text(_advice(alert)),
        "checkpoint": None if alert.checkpoint is None else text(alert.checkpoint),
        "command": None if alert.command is None else text(alert.command),
    }


def _advice(alert: Alert) -> str:
    """Where to go back to, and what to change."""
    if alert.clean_step is None:
        # Alerts of versions before the field say it in their suggestion, or not at all.
        return alert.suggestion
    clean = f"The last clean audit was at step {alert.clean_step}"
    if alert.checkpoint is None:
        back = f"{clean}; no checkpoint from then or before was kept (save_steps, save_total_limit)"
    else:
        back = f"{clean}: go back to {alert.checkpoint}"
    knob = alert.knob or (alert.remedy or alert.suggestion)
    return f"{back}. {knob.rstrip('.')}."


def _log(standing: Standing | None, log: Sequence[LogRow]) -> str:
    """What the trainer said of itself at the step of the last audit, or the last time before it."""
    if standing is None:
        return ""
    step = standing.record.step
    said = {}
    for column, words, share in (
        ("loss", "loss", False),
        ("rewards/margins", "reward margin", False),
        ("rewards/accuracies", "reward accuracy", True),
    ):
        logged = next((each for each in reversed(log) if each.step <= step and column in each.logs), None)
        if logged is not None:
            value = logged.logs[column]
            said[words] = (
                logged.step,
                percent(value) if share else figure(value, signed=column == "rewards/margins"),
            )
    if not said:
        return ""
    last = max(at for at, _ in said.values())
    return (
        f"The training log at step {last}: " + ", ".join(f"{words} {value}" for words, (_, value) in said.items()) + "."
    )


def _facts(run: AuditRun, standing: Standing | None) -> str:
    failures = len(run.failures)
    broken = f"{failures} audit{'s' if failures != 1 else ''} broke" if failures else ""
    if standing is None:
        return broken or "No audit yet"
    record = standing.record
    heads = heads_of(run.records)
    full = len({head.step for head in heads if head.kind == "full"})
    steps = len({head.step for head in heads})
    there = record.provenance
    words = [
        f"{steps} step{'s' if steps != 1 else ''} audited, {full} in full; last at step {record.step}",
        broken,
        f"{there.pairs} {'held-out ' if there.probe_held_out else ''}probe pairs",
        f"reference: {record.reference_check.source}",
    ]
    return text(" · ".join(word for word in words if word))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


# --- alerts -----------------------------------------------------------------------------------------------------------


def alert_rows(heads: Sequence[Head], standing: Standing | None) -> list[dict[str, Any]]:
    """One row for each cause of alerts (for each rule, in records that name no cause): open ones first, the worst at the top.

    Args:
        heads: of the present course of one probe set, by step.

    Returns:
        Of each ``level`` (its highest), ``rule``, ``cause`` in words, ``since``, ``cleared`` (a step; None: still open),
        ``times`` that it was opened, ``message``, ``suggestion``, ``checkpoint``, ``command``, ``value``, ``limit`` and
        ``agreeing``, the rules that say the same.
    """
    lives: dict[str, list[Alert]] = {}
    for head in heads:
        for alert in head.alerts:
            if alert.rule not in RETIRED:
                lives.setdefault(alert.cause or alert.rule, []).append(alert)
    still = {alert.cause or alert.rule for alert in standing.alerts} if standing is not None else set()
    steps = [head.step for head in heads]
    rows = [_alert_row(name, life, name in still, steps) for name, life in lives.items()]
    return sorted(rows, key=lambda row: (row["cleared"] is not None, _ORDER[row["level"]], row["since"]))


def _alert_row(name: str, life: Sequence[Alert], is_open: bool, steps: Sequence[int]) -> dict[str, Any]:
    seen = [alert for alert in life if alert.event != "resolved"] or list(life)
    last = seen[-1]
    opened = {alert.step if alert.since is None else alert.since for alert in seen}
    resolved = [alert.step for alert in life if alert.event == "resolved" and alert.step >= last.step]
    # Of versions that told of no end, it is over at the first step that it is not said at.
    later = [step for step in steps if step > last.step] or [steps[-1]]
    cleared = None if is_open else (resolved[-1] if resolved else later[0])
    with_cause = [alert for alert in seen if alert.cause]
    return {
        "level": min((alert.level for alert in seen), key=_ORDER.__getitem__),
        "rule": text(last.rule),
        "cause": text(CAUSES.get(name, "")),
        "since": min(opened) if not with_cause else max(opened),
        "cleared": cleared,
        "times": len(opened) if with_cause else 1,
        "message": text(last.message),
        "suggestion": "" if cleared is not None else text(last.suggestion),
        "checkpoint": None if last.checkpoint is None else text(last.checkpoint),
        "command": None if last.command is None or cleared is not None else text(last.command),
        "value": number(last.value),
        "limit": number(last.threshold),
        "agreeing": [text(signal) for signal in last.signals],
    }


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
