"""What to do about an alert, with names: the last clean step, the checkpoint to go back to, the command, the knob."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from align_audit.alerts.behaviour import LOWER_THE_RATE, SLOW_DOWN
from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.trainer_log import STOP, STOP_OR_RAISE_BETA
from align_audit.options.rules import NO_WAY_BACK
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.open_alerts import cause_of, is_serious, since_of
from align_audit.record.stored_records import Head, heads_of
from align_audit.record.training_log import LogRow

_SLOWER = 5
"""By how much the learning rate is to be divided where the policy leaves its language."""
_RATE_IS_THE_KNOB = ("drift", "numbers")
_OF_ANY_LOSS = {SLOW_DOWN: LOWER_THE_RATE, STOP_OR_RAISE_BETA: STOP}
"""What is to be done, where the loss has no β and no other terms."""


def advise(
    alerts: Sequence[Alert],
    earlier: Sequence[AuditRecord],
    log: Sequence[LogRow] = (),
    *,
    checkpoints: Mapping[int, str] = MappingProxyType({}),
    output_dir: str | None = None,
    beta: float | None = None,
    learning_rate: float | None = None,
    in_training: bool = True,
) -> list[Alert]:
    """The alerts with what goes back to a clean state, and with the knob as it is and as it should be.

    Args:
        alerts: of one audit, as :func:`align_audit.alerts.detectors.judge` gives them.
        earlier: the records before it, of all probe sets.
        log: the trainer's.
        checkpoints: step → name of the folder (``checkpoint-40``), of the saved checkpoints that exist now.
        output_dir: where they lie, for the command.
        beta: of the trainer; None: not known.
        learning_rate: that the trainer was given, at its highest; None: the highest of those that it has logged, which a
            schedule lowers.
        in_training: whether these are audits of a training, whose reference it may have been given wrong; that of saved
            checkpoints was given to the audit alone.
    """
    heads, curves = heads_of(earlier), TrainerLog(log)
    rate = learning_rate or max(curves.recent("learning_rate"), default=0.0)
    return [
        alert
        if alert.event == "resolved" or (cause_of(alert) == "reference" and not in_training)
        else _advised(alert, heads, rate, checkpoints, output_dir, beta, other_loss=in_training and beta is None)
        for alert in alerts
    ]


def clean_step(heads: Sequence[Head], since: int) -> int | None:
    """The last step before ``since`` at which every audit was clean: it was judged, and no warning and no error was open. None:
    there is none."""
    return max((step for step, clean in _clean_by_step(heads, since).items() if clean), default=None)


def _clean_by_step(heads: Sequence[Head], since: int) -> dict[int, bool]:
    """Of each step before ``since``: was every audit clean?"""
    clean: dict[int, bool] = {}
    for head in heads:
        if head.step < since:
            # What no rule was asked about may be anything.
            alone = head.judged and not any(map(is_serious, head.alerts))
            clean[head.step] = clean.get(head.step, True) and alone
    return clean


def _begin_of(alert: Alert) -> int:
    """The first step that is not clean of it: where it opened, or where what opened it was seen first."""
    since = since_of(alert)
    return since if alert.seen_since is None else min(since, alert.seen_since)


def newest_checkpoint(checkpoints: Mapping[int, str], heads: Sequence[Head], step: int) -> str | None:
    """The newest of these folders that was saved at a step or before it, and not while anything was open: the last audit up to
    it was clean, or there was none by then. None: there is none."""
    clean = _clean_by_step(heads, step + 1)
    audited = sorted(clean)

    def is_clean(at: int) -> bool:
        audits = bisect_right(audited, at)
        return audits == 0 or clean[audited[audits - 1]]

    newest = max((at for at in checkpoints if at <= step and is_clean(at)), default=None)
    return None if newest is None else checkpoints[newest]


def _advised(
    alert: Alert,
    heads: Sequence[Head],
    rate: float,
    checkpoints: Mapping[int, str],
    output_dir: str | None,
    beta: float | None,
    other_loss: bool,
) -> Alert:
    clean = None if cause_of(alert) in NO_WAY_BACK else clean_step(heads, _begin_of(alert))
    checkpoint = None if clean is None else newest_checkpoint(checkpoints, heads, clean)
    command = None
    if checkpoint is not None:
        path = checkpoint if output_dir is None else f"{output_dir}/{checkpoint}"
        command = f"trainer.train(resume_from_checkpoint={path!r})"
    # What was said of an alert at an earlier look is said anew.
    remedy, knob = alert.remedy or alert.suggestion, _knob(alert, rate, beta)
    if other_loss:
        remedy = _OF_ANY_LOSS.get(remedy, remedy)
    words = [remedy, _back(alert, heads, clean, checkpoints), knob]
    return alert.model_copy(
        update={
            "clean_step": clean,
            "checkpoint": checkpoint,
            "command": command,
            "remedy": remedy,
            "knob": knob or None,
            "suggestion": ". ".join(word for word in words if word),
        }
    )


def _back(alert: Alert, heads: Sequence[Head], clean: int | None, checkpoints: Mapping[int, str]) -> str:
    """Where to go back to, or why nowhere. A warning costs no training yet: it says what to do should it become an error."""
    if cause_of(alert) in NO_WAY_BACK:
        return NO_WAY_BACK[cause_of(alert)]
    is_error = alert.level == "error"
    if clean is None:
        any_came = any(head.step < _begin_of(alert) and head.judged for head in heads)
        why = "No audit before it was clean" if any_came else "No audit came before it that could be clean"
        return f"{why}: start again" if is_error else f"{why}: should it become an error, start again"
    checkpoint = newest_checkpoint(checkpoints, heads, clean)
    if checkpoint is not None:
        if is_error:
            return f"The last clean audit was at step {clean}: go back to {checkpoint}"
        return f"Should it become an error, go back to {checkpoint}: the last clean audit was at step {clean}"
    if clean == 0:
        return (
            "The last clean audit was before training: start again from the model that it started from"
            if is_error
            else "Should it become an error, start again from the model that training started from, as only that was clean"
        )
    none_kept = f"the last clean audit was at step {clean}, and no checkpoint from then or before was kept"
    if checkpoints:
        oldest = min(checkpoints)
        none_kept += (
            f"; the oldest that exists is of step {oldest}" if oldest > clean else " but such as were not clean"
        )
    more = "save more often (save_steps, save_total_limit)"
    if is_error:
        return f"T{none_kept[1:]}: start again, and {more}"
    return f"Should it become an error, there is nothing to go back to, because {none_kept}: {more}"


def _knob(alert: Alert, rate: float, beta: float | None) -> str:
    """The learning rate as it was at its highest, and as it should be."""
    if cause_of(alert) not in _RATE_IS_THE_KNOB or not 0 < rate < math.inf:
        return ""
    words = f"Learning rate {rate:.2g} → {rate / _SLOWER:.2g} or lower"
    return (
        words if beta is None or cause_of(alert) != "drift" else f"{words}, or beta {beta:g} → {2 * beta:g} or higher"
    )
