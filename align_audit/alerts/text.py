"""Does the policy still write? Its greedy continuations, beside the reference's."""

from __future__ import annotations

import math

from align_audit.alerts.behaviour import SLOW_DOWN
from align_audit.alerts.history import History, Sign, beyond, least, level_of, most
from align_audit.errors import counted
from align_audit.options.rules import BY_NAME
from align_audit.record.audit_record import Generations
from align_audit.record.estimate import Estimate

_SHORTCUT = (
    "Compare the lengths of chosen and rejected completions: where they differ, length alone wins. Balance them, or use a loss "
    "that divides by length (ld_alpha, ipo)"
)


def _few(texts: Generations, value: Estimate) -> str | None:
    """How many prompts there are, where a number has no interval."""
    return counted(texts.prompts, "prompt") if math.isnan(value.low) else None


def repetition(history: History) -> Sign | None:
    """The policy's continuations repeat themselves, and the reference's do not."""
    texts = history.record.generations
    if texts is None:
        return None
    rise = least(texts.repetition) - texts.reference_repetition.mean
    limit = beyond(history, rise, "repetition_rise_warning", "repetition_rise_error")
    if limit is None:
        return None
    return Sign(
        BY_NAME["repetition"],
        level_of(limit),
        texts.repetition.mean,
        f"Of the 4-grams in {texts.prompts} continuations {texts.repetition.mean:.0%} stood in them before; in the reference's "
        f"{texts.reference_repetition.mean:.0%}.",
        SLOW_DOWN,
        limit=texts.reference_repetition.mean + history.limit(limit.option),
        baseline=texts.reference_repetition.mean,
        few=_few(texts, texts.repetition),
    )


def length_exploited(history: History) -> Sign | None:
    """Continuations are much longer or shorter than the reference's, or no longer come to an end."""
    texts = history.record.generations
    if texts is None:
        return None
    rule, reference = BY_NAME["length_exploited"], texts.reference_length.mean
    if reference > 0:
        limit = beyond(
            history, least(texts.length) / reference, "length_ratio_high", "length_ratio_high_error"
        ) or beyond(history, most(texts.length) / reference, "length_ratio_low", "length_ratio_low_error")
        if limit is not None:
            message = (
                f"Continuations have {texts.length.mean:.1f} tokens, the reference's {reference:.1f}: "
                "the loss is met by length."
            )
            return Sign(
                rule,
                level_of(limit),
                texts.length.mean,
                message,
                _SHORTCUT,
                limit=history.limit(limit.option) * reference,
                baseline=reference,
                few=_few(texts, texts.length),
            )
    fall = texts.reference_ended.mean - most(texts.ended)
    limit = beyond(history, fall, "ended_drop_warning", "ended_drop_error")
    if limit is None:
        return None
    return Sign(
        rule,
        level_of(limit),
        texts.ended.mean,
        f"{texts.ended.mean:.0%} of the continuations end within {texts.max_new_tokens} tokens, of the reference's "
        f"{texts.reference_ended.mean:.0%}.",
        _SHORTCUT,
        limit=texts.reference_ended.mean - history.limit(limit.option),
        baseline=texts.reference_ended.mean,
        few=_few(texts, texts.ended),
    )


def surprising_text(history: History) -> Sign | None:
    """The reference finds what the policy writes far odder than what it writes itself."""
    texts = history.record.generations
    if texts is None:
        return None
    rise = least(texts.surprise) - texts.reference_surprise.mean
    limit = beyond(history, rise, "surprise_rise_warning", "surprise_rise_error")
    if limit is None:
        return None
    return Sign(
        BY_NAME["surprising_text"],
        level_of(limit),
        texts.surprise.mean,
        f"The reference gives the policy's continuations {texts.surprise.mean:.2f} nats per token of surprise, its own "
        f"{texts.reference_surprise.mean:.2f}: the policy writes what it would not.",
        SLOW_DOWN,
        limit=texts.reference_surprise.mean + history.limit(limit.option),
        baseline=texts.reference_surprise.mean,
        few=_few(texts, texts.surprise),
    )
