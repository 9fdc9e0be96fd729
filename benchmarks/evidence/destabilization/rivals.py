"""What people do with the trainer's own log: each rule alone, and their union with limits tuned on the tuning split.

A rule is a function of the log so far and of how lax it is; it says whether it would speak at the newest row. At a laxness
of 1 limits are as people write them, at 2 twice as far from what is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

from align_audit.record.training_log import LogRow
from destabilization.rules import Alarms, Level, RuleSet, alarms, of_log
from destabilization.stored import StoredRun

WINDOW = 16
SHORT = 8
PATIENCE = 2
LOG_2 = math.log(2)

Rule = Callable[[Sequence[LogRow], float], bool]


def series(log: Sequence[LogRow], name: str) -> list[float]:
    """The values of one metric so far."""
    return [row.logs[name] for row in log if name in row.logs]


def not_finite(log: Sequence[LogRow], laxness: float) -> bool:
    """Loss or gradient norm is NaN or infinite."""
    newest = log[-1].logs
    return any(not math.isfinite(newest[name]) for name in ("loss", "grad_norm", "eval_loss") if name in newest)


def loss_spike(log: Sequence[LogRow], laxness: float) -> bool:
    """The loss lies above 1.5 times its running median, twice in a row."""
    return _above_median(series(log, "loss"), 1 + 0.5 * laxness)


def gradient_spike(log: Sequence[LogRow], laxness: float) -> bool:
    """The gradient norm lies above 5 times its running median, twice in a row."""
    return _above_median(series(log, "grad_norm"), 1 + 4 * laxness)


def _above_median(values: Sequence[float], factor: float) -> bool:
    past, last = values[-WINDOW - PATIENCE : -PATIENCE], values[-PATIENCE:]
    return len(past) >= SHORT and all(value > factor * median(past) for value in last)


def accuracy_low(log: Sequence[LogRow], laxness: float) -> bool:
    """Reward accuracy over 16 steps is below one half."""
    values = series(log, "rewards/accuracies")[-WINDOW:]
    return len(values) == WINDOW and fmean(values) < 0.6 - 0.1 * laxness


def margin_drop(log: Sequence[LogRow], laxness: float) -> bool:
    """The mean reward margin over 8 steps has fallen by half from its best."""
    values = series(log, "rewards/margins")
    means = [fmean(values[end - SHORT : end]) for end in range(SHORT, len(values) + 1)]
    return bool(means) and max(means) > 0.01 and means[-1] < max(means) * (1 - 0.5 * laxness)


def chosen_floor(log: Sequence[LogRow], laxness: float) -> bool:
    """The log-probability of chosen completions over 8 steps is 1.3 times as low as over the first 4."""
    values = series(log, "logps/chosen")
    return len(values) >= 2 * SHORT and fmean(values[-SHORT:]) < fmean(values[:4]) * (1 + 0.3 * laxness)


def entropy_range(log: Sequence[LogRow], laxness: float) -> bool:
    """The entropy over 8 steps is outside 0.5 to 1.5 times that of the first 4."""
    values = series(log, "entropy")
    if len(values) < 2 * SHORT:
        return False
    ratio = fmean(values[-SHORT:]) / max(fmean(values[:4]), 1e-9)
    return not 1 - 0.5 * laxness <= ratio <= 1 + 0.5 * laxness


def eval_loss_rises(log: Sequence[LogRow], laxness: float) -> bool:
    """Early stopping: the eval loss has not beaten its best at two evaluations in a row."""
    values, patience = series(log, "eval_loss"), max(1, round(PATIENCE * laxness))
    return len(values) > patience and min(values[-patience:]) >= min(values[:-patience])


def eval_chosen_floor(log: Sequence[LogRow], laxness: float) -> bool:
    """The eval set's chosen log-probability is 1.3 times as low as at the start."""
    values = series(log, "eval_logps/chosen")
    return len(values) > 1 and values[-1] < values[0] * (1 + 0.3 * laxness)


def eval_entropy_range(log: Sequence[LogRow], laxness: float) -> bool:
    """The eval set's entropy is outside 0.5 to 1.5 times that of the start."""
    values = series(log, "eval_entropy")
    return len(values) > 1 and not 1 - 0.5 * laxness <= values[-1] / max(values[0], 1e-9) <= 1 + 0.5 * laxness


def eval_token_accuracy(log: Sequence[LogRow], laxness: float) -> bool:
    """The eval set's token accuracy is below 0.7 of the start's."""
    values = series(log, "eval_mean_token_accuracy")
    return len(values) > 1 and values[-1] < values[0] * (1 - 0.3 * laxness)


def loss_stuck(log: Sequence[LogRow], laxness: float) -> bool:
    """The loss has been within 0.005 of ln 2 for 16 steps."""
    values = series(log, "loss")[-WINDOW:]
    return len(values) == WINDOW and max(abs(value - LOG_2) for value in values) < 0.005 / laxness


SINGLE: dict[str, Rule] = {
    "loss is NaN": not_finite,
    "loss spike": loss_spike,
    "gradient spike": gradient_spike,
    "accuracy below chance": accuracy_low,
    "margin drop": margin_drop,
    "chosen log-prob. floor": chosen_floor,
    "entropy range": entropy_range,
    "early stopping": eval_loss_rises,
    "eval chosen floor": eval_chosen_floor,
    "eval entropy range": eval_entropy_range,
    "eval token accuracy": eval_token_accuracy,
    "loss stuck at ln 2": loss_stuck,
}
"""DPOTrainer logs no KL, so there is no budget of it to watch."""

SIX = (
    "eval chosen floor", "eval entropy range", "eval token accuracy", "loss stuck at ln 2", "accuracy below chance",
    "loss is NaN",
)  # fmt: skip
"""The union that did best by hand in a pilot."""


def union(rules: Mapping[str, float]) -> Callable[[float], Alarms]:
    """Rules by name, each with a laxness of its own, which a common one multiplies. Each of them is an error."""

    def at(laxness: float) -> Alarms:
        def speaking(log: Sequence[LogRow]) -> list[tuple[str, Level]]:
            return [(name, "error") for name, factor in rules.items() if SINGLE[name](log, factor * laxness)]

        return of_log(speaking)

    return at


LAXNESS = tuple(round(2.0 ** (place / 4), 3) for place in range(-12, 13))
"""What is tried: an eighth to eight times the limits that people write."""


def tuned(healthy: Sequence[StoredRun], names: Sequence[str]) -> dict[str, float]:
    """Each rule as strict as it may be without a false alarm in any of these runs; rules that always have one are left out."""
    chosen = {}
    for name in names:
        rules = RuleSet(name, union({name: 1.0}))
        # Strictest first.
        for laxness in LAXNESS:
            if not any(alarms(run, rules, laxness) for run in healthy):
                chosen[name] = laxness
                break
    return chosen


def rival_rules(healthy_tuning: Sequence[StoredRun]) -> list[RuleSet]:
    """Every rule alone as people write it, the six, and all of them with limits tuned on these healthy runs."""
    every = tuned(healthy_tuning, tuple(SINGLE))
    six = {name: laxness for name, laxness in every.items() if name in SIX}
    return [
        *(RuleSet(name, union({name: 1.0})) for name in SINGLE),
        RuleSet("the six, as written", union(dict.fromkeys(SIX, 1.0))),
        RuleSet("the six, tuned", union(six)),
        RuleSet("all of the log, tuned", union(every)),
    ]
