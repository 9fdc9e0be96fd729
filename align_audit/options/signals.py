"""What a rule of the user's own may read: single numbers of a record, and columns of the trainer's log."""

from __future__ import annotations

import re
from typing import NamedTuple

RECORD_SIGNALS: tuple[str, ...] = (
    *(
        f"margins.{name}"
        for name in (
            "reference", "policy", "shift", "accuracy", "ranking_accuracy", "chosen_logp_change", "rejected_logp_change",
            "chosen_logp_change_per_token", "rejected_logp_change_per_token", "kl", "entropy", "reference_entropy",
            "token_accuracy", "reference_token_accuracy",
        )
    ),
    *(
        f"generations.{name}"
        for name in (
            "repetition", "reference_repetition", "length", "reference_length", "ended", "reference_ended", "surprise",
            "reference_surprise",
        )
    ),
    *(
        f"patching.{name}"
        for name in ("embedding_gain", "head_gain", "embedding_transplant", "head_transplant", "additivity", "peak_layer")
    ),
    *(f"localization.{name}" for name in ("lasso_lambda", "cv_r2", "center_of_mass", "entropy")),
    *(
        f"spinal.{name}"
        for name in ("delta_align", "coherence", "reference_coherence", "gradient_concentration", "score")
    ),
    "controls.split_half.value", "controls.permuted_targets.value", "reference_check.precomputed_margin_difference",
    "cost.seconds", "cost.peak_memory", "cost.forward_equivalents",
)  # fmt: skip
"""Dotted paths of single numbers, as :mod:`align_audit.record.numbers` gives them."""

LAYER_SIGNALS: tuple[str, ...] = (
    "patching.effect", "patching.recovery", "patching.layer_gain", "patching.block_transplant",
    "localization.selection_frequency", "spinal.policy.contraction", "spinal.policy.transport",
)  # fmt: skip
"""Sequences over layers, of which a rule names one place: ``patching.layer_gain.3``."""

TO_THE_NEXT_LAYER = "spinal.policy.transport"
"""The one of them that the last layer has no place in."""

LOG_SIGNALS: tuple[str, ...] = (
    "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip
"""What TRL's DPOTrainer logs; each also with ``eval_`` or ``eval_<name>_`` in front, of an evaluation."""

SIGNALS: tuple[str, ...] = (*RECORD_SIGNALS, *LOG_SIGNALS, *(f"eval_{name}" for name in LOG_SIGNALS))

_LAYER = re.compile(rf"({'|'.join(map(re.escape, LAYER_SIGNALS))})\.(\d+)")
_LOG = re.compile(rf"(eval_(\w+_)?)?({'|'.join(map(re.escape, LOG_SIGNALS))})")


def is_log_signal(signal: str) -> bool:
    """Is this a column of the trainer's log?"""
    return _LOG.fullmatch(signal) is not None


def is_signal(signal: str) -> bool:
    """Is there such a number in a record, or such a column in the trainer's log?"""
    return signal in RECORD_SIGNALS or _LAYER.fullmatch(signal) is not None or is_log_signal(signal)


class OfLayer(NamedTuple):
    """A place in a sequence over layers."""

    sequence: str
    layer: int


def layer_of(signal: str) -> OfLayer | None:
    """The layer that a signal is of; None: it is of none.

    Example:
        >>> layer_of("patching.layer_gain.3"), layer_of("margins.kl")
        (OfLayer(sequence='patching.layer_gain', layer=3), None)
    """
    match = _LAYER.fullmatch(signal)
    return None if match is None else OfLayer(match[1], int(match[2]))
