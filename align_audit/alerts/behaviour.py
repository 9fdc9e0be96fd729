"""Is the policy leaving its language? What both models say of the probe pairs, per token and against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

from align_audit.alerts.history import History, Sign, beyond, least, level_of, most
from align_audit.errors import counted
from align_audit.options.rules import BY_NAME
from align_audit.record.audit_record import Margins
from align_audit.record.estimate import Estimate
from align_audit.record.numbers import decimals

LOWER_THE_RATE = "Lower the learning rate (a factor of 3 to 10)"
SLOW_DOWN = f'{LOWER_THE_RATE}, raise beta, or add an SFT term on the chosen completions (loss_type=["sigmoid", "sft"])'


def few(history: History, value: Estimate) -> str | None:
    """How many pairs there are, where a number has no interval."""
    return counted(history.record.provenance.pairs, "pair") if math.isnan(value.low) else None


def chosen_logp_falling(history: History) -> Sign | None:
    """Likelihood displacement: the chosen completions become less likely while the margin rises."""
    config, margins = history.config, history.record.margins
    change = margins.chosen_logp_change_per_token
    why = f"The chosen completions lose {-change.mean:.2f} nats per token against the reference, "
    shift = margins.shift
    if least(shift) > 0:
        beta = history.record.provenance.beta
        reward = "" if beta is None else f" (a reward margin of {beta * shift.mean:+.2f})"
        why += (
            f"while the margin rises by {shift.mean:.1f} nats{reward}: the loss is met by making both completions "
            "unlikely, and the probability goes to text that is in neither."
        )
    elif not math.isfinite(shift.mean):
        why += "and whether the margin rises is not known."
    elif shift.mean > 0:
        why += "and the margin does not rise beyond doubt."
    else:
        why += "and the margin does not rise."
    rule, pairs = BY_NAME["chosen_logp_falling"], few(history, change)
    limit = beyond(history, -most(change), "chosen_drop_warning", "chosen_drop_error")
    if limit is not None:
        at = -history.limit(limit.option)
        return Sign(rule, level_of(limit), change.mean, why, SLOW_DOWN, limit=at, few=pairs)
    baseline = history.baseline(lambda record: record.margins.chosen_logp_change_per_token.mean)
    if baseline is None:
        return None
    # Chosen completions that are still likelier than under the reference are not displaced, whatever the baseline.
    at = min(3 * baseline, baseline - config.chosen_drop_warning / 2, 0.0)
    if not most(change) < at:
        return None
    why += f" At this run's first healthy audits the change was {baseline:+.2f}."
    return Sign(rule, "warning", change.mean, why, SLOW_DOWN, limit=at, baseline=baseline, few=pairs)


def kl_out_of_bounds(history: History) -> Sign | None:
    """The policy's next-token distribution has moved too far from the reference's.

    What is learned moves it too. A policy that keeps the likelihood of the chosen completions, as one that is trained with an
    SFT term does, may have learned that much; beyond the limit of a warning it is then no more than a witness.
    """
    kl = history.record.margins.kl
    limit = beyond(history, least(kl), "kl_warning", "kl_error")
    if limit is None:
        return None
    at = history.limit(limit.option)
    kept = history.record.margins.keeps_chosen(history.config.kl_chosen_drop)
    witness = limit.level == "warning" and kept and "kl_warning" not in history.eased
    message = (
        f"KL(policy ‖ reference) is {decimals(kl.mean)} nats per token, above {at:g}. Preference training that works moves far "
        "less; this much means the policy is becoming another model."
    )
    rule, pairs = BY_NAME["kl_out_of_bounds"], few(history, kl)
    return Sign(rule, level_of(limit), kl.mean, message, SLOW_DOWN, limit=at, few=pairs, witness=witness)


def entropy_out_of_bounds(history: History) -> Sign | None:
    """Next-token entropy collapses (repetition) or explodes (noise), against the reference's."""
    margins = history.record.margins
    policy, reference = margins.entropy, margins.reference_entropy
    if not (math.isfinite(policy.mean) and reference.mean > 0):
        return None
    limit = beyond(history, most(policy) / reference.mean, "entropy_ratio_low", "entropy_ratio_low_error")
    words = "has collapsed: the policy is certain of every next token and will repeat itself"
    if limit is None:
        limit = beyond(history, least(policy) / reference.mean, "entropy_ratio_high", "entropy_ratio_high_error")
        words = "has exploded: the policy is close to choosing tokens at random"
    if limit is None:
        return None
    return Sign(
        BY_NAME["entropy_out_of_bounds"],
        level_of(limit),
        policy.mean,
        f"Next-token entropy {words}. {policy.mean:.2f} nats per token against the reference's {reference.mean:.2f}.",
        SLOW_DOWN,
        limit=history.limit(limit.option) * reference.mean,
        baseline=reference.mean,
        few=few(history, policy),
    )


def token_accuracy_collapsed(history: History) -> Sign | None:
    """The policy no longer predicts the chosen completions' tokens that its reference predicts."""
    margins = history.record.margins
    policy, reference = margins.token_accuracy, margins.reference_token_accuracy
    start = least(reference)
    if not start > 0:
        return None
    limit = beyond(history, most(policy) / start, "token_accuracy_ratio_warning", "token_accuracy_ratio_error")
    if limit is None:
        return None
    message = (
        f"Next-token accuracy on the chosen completions is {policy.mean:.1%}; the reference has {reference.mean:.1%}. "
        "The policy has lost its language, which loss, reward accuracy and margins do not show."
    )
    return Sign(
        BY_NAME["token_accuracy_collapsed"],
        level_of(limit),
        policy.mean,
        message,
        SLOW_DOWN,
        limit=history.limit(limit.option) * reference.mean,
        baseline=reference.mean,
        few=few(history, policy),
    )


_JUMPS: tuple[tuple[str, Callable[[Margins], float], float, str], ...] = (
    ("KL(policy ‖ reference)", lambda margins: margins.kl.mean, 1.0, "kl_warning"),
    (
        "the change of the chosen log-probability",
        lambda margins: margins.chosen_logp_change_per_token.mean,
        -1.0,
        "chosen_drop_warning",
    ),
)
"""What is watched for jumps: in words, the number, the direction that is bad, and the limit that says what is much."""


def sudden_change(history: History) -> Sign | None:
    """A measure moves between two looks far faster than between any before: a fault at a known step.

    The rates of change of the healthy looks before (per step: looks are not equally far apart) are the run's own baseline, by
    median and median absolute deviation. The jump may lie at the look before: the measure still stands far from where it was.
    What KL alone shows counts no more than KL itself.
    """
    seen = list(_jumps(history))
    return next((sign for sign in seen if not sign.witness), seen[0] if seen else None)


def _jumps(history: History) -> Iterator[Sign]:
    """One sign of each measure that has jumped; of KL a witness, where :func:`kl_out_of_bounds` would be one."""
    config, record = history.config, history.record
    # A step at which everything was measured after a look is one look.
    last_of_step = {look.step: look for look in history.healthy[-2 * (2 * config.baseline_audits + 4) :]}
    healthy = list(last_of_step.values())[-(2 * config.baseline_audits + 4) :]
    for usual in (healthy, healthy[:-1]):
        if len(usual) < config.baseline_audits + 1:
            continue
        last, gap = usual[-1], record.step - usual[-1].step
        for words, number, direction, option in _JUMPS:
            rates = [
                direction * (number(after.margins) - number(earlier.margins)) / (after.step - earlier.step)
                for earlier, after in pairwise(usual)
                if after.step > earlier.step
            ]
            rates = [rate for rate in rates if math.isfinite(rate)]
            if not rates:
                continue
            usually = median(rates)
            spread = 1.4826 * median(abs(rate - usually) for rate in rates)
            floor = config.jump_share * getattr(config, option)
            at = max(floor, (usually + history.limit("jump_deviations") * spread) * gap)
            start, here = number(last.margins), number(record.margins)
            if direction * (here - start) > at:
                eased = {"kl_warning", "jump_deviations"} & history.eased
                kept = option == "kl_warning" and not least(record.margins.kl) > config.kl_error
                yield Sign(
                    BY_NAME["sudden_change"],
                    "warning",
                    here,
                    f"Since step {last.step} {words} went from {start:+.2f} to {here:+.2f} nats per token; at the pace of the "
                    f"looks before it would have moved by {direction * usually * gap:+.3f}.",
                    f"Look at what came into training after step {last.step}: data, learning rate, a resumed optimizer",
                    limit=start + direction * at,
                    baseline=start,
                    witness=kept and not eased and record.margins.keeps_chosen(config.kl_chosen_drop),
                )
