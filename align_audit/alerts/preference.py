"""Is the preference learned, and does it carry over? Margins and accuracies on the probe pairs."""

from __future__ import annotations

import math

from align_audit.alerts.behaviour import few
from align_audit.alerts.history import History, Sign, beyond, level_of
from align_audit.options.rules import BY_NAME
from align_audit.record.numbers import decimals
from align_audit.record.stored_records import heads_of

_INSIDE = 0.25
"""Share of a shift's interval that lies below 0 at least where 0 is not merely its end: learning is slow there, no more."""
_OF_PREFERENCE = ("rewards/margins", "rewards/accuracies")
"""Columns that trainers of a preference log, one of them at least."""
_LABELS = (
    "Look at the training pairs: are chosen and rejected the right way round, and of the kind that the probes are?"
)


def margin_reversed(history: History) -> Sign | None:
    """The margin shift on the probes lies below 0, or has fallen far below its best."""
    shift, rule = history.record.margins.shift, BY_NAME["margin_reversed"]
    if shift.high < 0:
        message = (
            f"The margin shift on the probe pairs is {decimals(shift.mean)} nats, with its whole interval below 0: training "
            "teaches the policy to prefer what was rejected."
        )
        return Sign(rule, "error", shift.mean, message, _LABELS, limit=0.0)
    gains = [head for head in history.heads if head.shift.low > 0]
    if not gains:
        return None
    best = max(gains, key=lambda head: head.shift.mean)
    at = history.limit("shift_of_best") * best.shift.mean
    if not (shift.mean < at and shift.high < best.shift.low):
        return None
    message = (
        f"The margin shift on the probe pairs is {decimals(shift.mean)} nats, down from {decimals(best.shift.mean)} at step "
        f"{best.step}: "
        "what is being learned now works against what was."
    )
    return Sign(rule, "warning", shift.mean, message, _LABELS, limit=at, baseline=best.shift.mean)


def accuracy_falling(history: History) -> Sign | None:
    """Preference accuracy on the probes has fallen from its best."""
    accuracy = history.record.margins.accuracy
    seen = [head for head in history.heads if math.isfinite(head.accuracy.mean)]
    if not seen:
        return None
    best = max(seen, key=lambda head: head.accuracy.mean)
    fall = best.accuracy.mean - accuracy.mean
    limit = beyond(history, fall, "accuracy_drop_warning", "accuracy_drop_error")
    if limit is None or not accuracy.high < best.accuracy.low:
        return None
    message = (
        f"Preference accuracy on the probes is {accuracy.mean:.0%}, down from {best.accuracy.mean:.0%} at step "
        f"{best.step}: what is still being learned does not carry over to these pairs."
    )
    return Sign(
        BY_NAME["accuracy_falling"],
        level_of(limit),
        accuracy.mean,
        message,
        f"Stop earlier (accuracy was best at step {best.step}), or look at what the latest training pairs teach",
        baseline=best.accuracy.mean,
        limit=best.accuracy.mean - history.limit(limit.option),
    )


def never_started(history: History) -> Sign | None:
    """After a share of the run the policy is still its reference."""
    record, rule = history.record, BY_NAME["never_started"]
    if record.reference_check.last_sync_step is not None and _has_moved(history):
        return None  # what is compared is the policy with itself of a few steps ago
    suggestion = (
        "Check that something trains: requires_grad of the adapter, the learning rate after warm-up, and that policy and "
        "reference are not one object"
    )
    if record.step > 0 and record.reference_check.same_weights:
        message = (
            f"After {record.step} steps the policy computes what its reference does, bit by bit: nothing was learned."
        )
        return Sign(rule, "error" if history.begun else "warning", 0.0, message, suggestion)
    kl, shift = record.margins.kl, record.margins.shift
    at = history.limit("never_started_kl")
    nothing = shift.low <= 0 <= shift.high or (math.isnan(shift.low) and abs(shift.mean) < at)
    if not (record.step > 0 and history.begun and kl.mean < at and nothing):
        return None
    message = (
        f"After {record.step} steps the policy says what its reference says: KL is {kl.mean:.1g} nats per token, below {at:g}, "
        f"and the margin shift of {shift.mean:.2g} nats is none."
    )
    return Sign(rule, "warning", kl.mean, message, suggestion, limit=at, few=few(history, shift))


def _has_moved(history: History) -> bool:
    """Was the policy away from its reference at an audit before, whichever reference that was?"""
    at = history.limit("never_started_kl")
    return any(head.step > 0 and head.kl.mean >= at for head in heads_of(history.earlier))


def nothing_learned(history: History) -> Sign | None:
    """Half-way through the run the policy has moved, and the probes do not show what it learns.

    Two things say that: the margin shift cannot be told from 0, which lies well inside of its interval, and preference accuracy
    is beyond doubt no better than ``nothing_learned_accuracy``. The first alone says as much of few pairs that waver. A policy
    that leaves its language, or has lost what it had learned, is for other rules; what is measured against a reference that is
    synchronized is what was learned since; and a trainer that logs no rewards of pairs (SFT, say) teaches no preference.
    """
    record, config, option = history.record, history.config, "nothing_learned_accuracy"
    kl, shift, accuracy = record.margins.kl, record.margins.shift, record.margins.accuracy
    moved = kl.mean >= history.limit("never_started_kl") and not record.reference_check.same_weights
    fall = -record.margins.chosen_logp_change_per_token.mean
    leaving = kl.mean > config.kl_warning or fall > config.chosen_drop_warning
    was_better = any(head.shift.low > shift.high or head.accuracy.low > accuracy.high for head in history.heads)
    if not (history.half_way and moved) or leaving or was_better or record.reference_check.last_sync_step is not None:
        return None
    if history.log.rows and all(history.log.latest(column) is None for column in _OF_PREFERENCE):
        return None
    inside = _INSIDE * (config.hysteresis if option in history.eased else 1.0) * (shift.high - shift.low)
    if not (shift.low + inside < 0 < shift.high and beyond(history, accuracy.high, option)):
        return None
    message = (
        f"After {record.step} steps the policy has moved, by a KL of {kl.mean:.2g} nats per token, but the margin shift on "
        f"the probe pairs is {shift.mean:.2g} nats, in an interval from {shift.low:.2g} to {shift.high:.2g}, and "
        f"{accuracy.mean:.0%} of them moved the right way: nothing of the preference carries over to these pairs."
    )
    suggestion = (
        "Look at the training pairs: are labels more than noise, and is what they prefer what the probes prefer? If they are "
        "right, train longer or at a higher learning rate"
    )
    return Sign(BY_NAME["nothing_learned"], "warning", accuracy.mean, message, suggestion, limit=history.limit(option))
