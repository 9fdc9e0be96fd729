"""What the trainer's own log says, at every step and for nothing: reasons to look at once, and signs beside those of an audit.

These rules read ``View.log`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from align_audit.alerts.behaviour import SLOW_DOWN
from align_audit.alerts.curves import are_apart, mean, upper_bound
from align_audit.alerts.history import Sign, View, beyond
from align_audit.options.rules import BY_NAME

STOP = "Look at what tells chosen from rejected in the training pairs; stop here"
STOP_OR_RAISE_BETA = f"{STOP}, or raise beta"
_LN_2 = math.log(2)
_SPIKES = 2
"""Rows of the window that have to spike: a single one is what gradient clipping is for."""
_OVERFLOWS = 3
"""Gradient norms in a row that have to overflow: with fp16 single ones do, and their step is left out."""
_ROWS = 3
"""Rows that an interval over the window takes at least."""
_USUAL = 32
"""Rows before the window that say which gradient norm is usual, and of how many at least there have to be half."""


def _steps(view: View) -> int:
    return int(view.config.log_window)


def log_not_finite(view: View) -> Sign | None:
    """The loss, or three gradient norms in a row, are NaN or infinite; or the loss is exactly 0 with a gradient
    of NaN, or of 0 where no margin was learned.

    transformers' ``logging_nan_inf_filter`` writes a NaN loss as the mean of the others, 0 where there are none: the gradient
    norm tells.
    """
    loss, norm, norms = view.log.latest("loss"), view.log.latest("grad_norm"), view.log.last("grad_norm", _OVERFLOWS)
    rule = BY_NAME["log_not_finite"]
    suggestion = (
        "Stop and restart from the last checkpoint with finite weights, with a lower learning rate, gradient clipping "
        "(max_grad_norm), or bf16 instead of fp16"
    )
    if loss is not None and not math.isfinite(loss):
        return Sign(rule, "error", loss, f"The trainer's log has a loss of {loss}.", suggestion)
    if len(norms) == _OVERFLOWS and not any(map(math.isfinite, norms)):
        message = f"In the trainer's log the last {_OVERFLOWS} gradient norms are {', '.join(map(str, norms))}."
        return Sign(rule, "error", norms[-1], message, suggestion)
    # A loss that is used up is 0 too (hinge: exactly), with a margin that says so. One that was filtered has no such margin.
    margin = view.log.beside("loss", "rewards/margins")
    used_up = margin is not None and math.isfinite(margin) and margin > 0
    if loss == 0.0 and norm is not None and ((norm == 0.0 and not used_up) or math.isnan(norm)):
        message = (
            f"The trainer's log has a loss of exactly 0 and a gradient norm of {norm}: nothing is computed any more."
        )
        return Sign(rule, "error", 0.0, message, suggestion)
    return None


def _against_start(
    view: View, name: str, options: tuple[str, ...], words: Callable[[float, float], str], suggestion: str
) -> Sign | None:
    """A column against its start, by the ratio of the two; of an evaluation where there is one.

    Where few pairs make a step, rows of training waver (log-probabilities by half and more, as answers differ in length), and
    so do means of a window of them: the ratio lies beyond its limit by more than that, or an alert that went by it is open.
    """
    rule = BY_NAME[name]
    for column in rule.reads:
        apart = view.log.against_start(column, _steps(view), least=_ROWS)
        if apart is None:
            continue
        now, start = map(mean, apart)
        limit = beyond(view, now / start, *options) if start and math.isfinite(now) and math.isfinite(start) else None
        if limit is not None and (limit.option in view.eased or are_apart(*apart, view.limit(limit.option))):
            at = view.limit(limit.option) * start
            return Sign(rule, "warning", now, words(now, start), suggestion, limit=at, baseline=start)
    return None


def log_chosen_falling(view: View) -> Sign | None:
    """The log-probabilities of chosen completions fall against their start."""

    def words(now: float, start: float) -> str:
        return f"In the trainer's log the chosen log-probability is {now:.1f} nats; it started at {start:.1f}."

    return _against_start(view, "log_chosen_falling", ("log_chosen_ratio",), words, SLOW_DOWN)


def log_entropy(view: View) -> Sign | None:
    """Entropy leaves its start, in the trainer's log."""

    def words(now: float, start: float) -> str:
        return f"In the trainer's log the entropy is {now:.2f} nats; it started at {start:.2f}."

    return _against_start(view, "log_entropy", ("log_entropy_low", "log_entropy_high"), words, SLOW_DOWN)


def log_token_accuracy(view: View) -> Sign | None:
    """Next-token accuracy falls against its start, in the trainer's log."""

    def words(now: float, start: float) -> str:
        return f"In the trainer's log next-token accuracy is {now:.1%}; it started at {start:.1%}."

    return _against_start(view, "log_token_accuracy", ("log_token_accuracy_ratio",), words, SLOW_DOWN)


def log_gradient_spike(view: View) -> Sign | None:
    """The gradient norm spikes twice within the window (of two rows at least), against the median before it."""
    window = view.log.window_rows("grad_norm", _steps(view), least=_SPIKES)
    if window is None:
        return None
    (first, _), (last, _) = window[0], window[-1]
    usual = view.log.recent("grad_norm", until=first - 1)[-_USUAL:]
    if len(usual) < _USUAL // 2 or not median(usual) > 0:
        return None
    at = view.limit("log_spike_ratio") * median(usual)
    spikes = [norm for _, norm in window if norm > at]
    if len(spikes) < _SPIKES:
        return None
    message = (
        f"In the trainer's log the gradient norm rose above {at:.3g} in {len(spikes)} of {len(window)} rows of steps {first} "
        f"to {last}, up to {max(spikes):.3g}; its median before is {median(usual):.3g}."
    )
    suggestion = (
        "Lower the learning rate, clip gradients harder (max_grad_norm), or look at the training pairs of those steps"
    )
    return Sign(
        BY_NAME["log_gradient_spike"], "warning", max(spikes), message, suggestion, limit=at, baseline=median(usual)
    )


def log_accuracy(view: View) -> Sign | None:
    """The training pairs are ranked worse than by chance over the window (of three rows at least).

    A run that has learned nothing yet ranks them as by chance, and so below it half of the time. Before something should have
    been learned all of the interval of the reward margins has to lie below 0 (where none are logged, accuracy's below its
    limit); means do for a window that lies behind that, and while the alert is open.
    """
    steps, option = _steps(view), "log_accuracy_low"
    rows = view.log.window_rows("rewards/accuracies", steps, least=_ROWS)
    margins = view.log.window("rewards/margins", steps, least=_ROWS)
    if rows is None or (margins is not None and not mean(margins) < 0):
        return None
    ranked, span = [value for _, value in rows], max(steps, rows[-1][0] - rows[0][0] + 1)
    accuracy, at = mean(ranked), view.limit(option)
    if not beyond(view, accuracy, option):
        return None
    reliable = upper_bound(ranked) < at if margins is None else upper_bound(margins) < 0
    if not reliable and rows[0][0] < view.begun_at and option not in view.eased:
        return None
    message = f"In the trainer's log {accuracy:.0%} of the pairs of the last {span} steps are ranked right"
    # The limit may be another one, or eased.
    message += ": less than chance." if accuracy < 0.5 else ", by a margin below 0."
    suggestion = "Look at the training pairs of these steps: are chosen and rejected the right way round?"
    return Sign(BY_NAME["log_accuracy"], "warning", accuracy, message, suggestion, limit=at)


def log_stuck(view: View) -> Sign | None:
    """The loss stays at ln 2 with no reward margin although the run has begun, or gradients are exactly 0."""
    steps, rule = _steps(view), BY_NAME["log_stuck"]
    losses, norms = view.log.window("loss", steps), view.log.window("grad_norm", steps)
    margins = view.log.window("rewards/margins", steps)
    suggestion = (
        "Check that something trains: requires_grad of the adapter, the learning rate after warm-up, and that policy and "
        "reference are not one object"
    )
    at = view.limit("log_stuck_margin")
    # Where the loss is used up its gradient is as good as 0, and something was learned.
    moved = margins is not None and abs(mean(margins)) > at
    if norms is not None and all(norm == 0.0 for norm in norms) and not moved:
        message = (
            f"In the trainer's log the gradient norm is exactly 0 over the last {steps} steps: nothing is trained."
        )
        return Sign(rule, "warning", 0.0, message, suggestion)
    if losses is None or margins is None or not view.begun or moved or not math.isfinite(sum(losses) + sum(margins)):
        return None
    if not beyond(view, max(abs(loss - _LN_2) for loss in losses), "log_stuck_margin"):
        return None
    message = (
        f"In the trainer's log the loss has stayed at {mean(losses):.4f} over the last {steps} steps, ln 2, with a reward "
        f"margin of {mean(margins):.1g}: the policy has not left its reference."
    )
    return Sign(rule, "warning", mean(losses), message, suggestion, limit=_LN_2 - at, baseline=_LN_2)


def log_saturated(view: View) -> Sign | None:
    """Every training pair of the window is ranked right, at a loss of nothing."""
    steps = _steps(view)
    losses, ranked = view.log.window("loss", steps), view.log.window("rewards/accuracies", steps)
    if losses is None or ranked is None or not mean(ranked) >= 1.0 - 1.0 / 64:
        return None
    # A loss of exactly 0 may be a NaN that was filtered: that is another rule's.
    if not beyond(view, mean(losses), "log_saturated_loss") or log_not_finite(view) is not None:
        return None
    message = (
        f"In the trainer's log the loss is {mean(losses):.2g} over the last {steps} steps and {mean(ranked):.0%} of the "
        "pairs are ranked right: these pairs are too easy to teach more, or differ by something trivial."
    )
    at = view.limit("log_saturated_loss")
    return Sign(BY_NAME["log_saturated"], "warning", mean(losses), message, STOP_OR_RAISE_BETA, limit=at)
