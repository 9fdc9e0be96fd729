"""The numbers of an audit that might tell a run that is going wrong, by the measurement that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.training_log import LogRow

Signal = Callable[[AuditRecord], float]


def _ratio(value: Estimate, base: Estimate) -> float:
    return value.mean / base.mean if base.mean else math.nan


def _generated(name: str, *, ratio: bool = False) -> Signal:
    """Of the policy's continuations against the reference's."""

    def read(record: AuditRecord) -> float:
        if record.generations is None:
            return math.nan
        value = getattr(record.generations, name).mean
        base = getattr(record.generations, f"reference_{name}").mean
        if ratio:
            return value / base if base else math.nan
        return float(value - base)

    return read


def _patched(read: Callable[[AuditRecord], float]) -> Signal:
    return lambda record: math.nan if record.patching is None else read(record)


def _localized(name: str) -> Signal:
    return lambda record: math.nan if record.localization is None else float(getattr(record.localization, name))


def _spinal(name: str) -> Signal:
    def read(record: AuditRecord) -> float:
        if record.spinal is None:
            return math.nan
        value = getattr(record.spinal, name)
        return float(value.mean if isinstance(value, Estimate) else value)

    return read


def _terminal(name: str) -> Signal:
    """Mean over the terminal block of what the policy has more than the reference."""

    def read(record: AuditRecord) -> float:
        spinal = record.spinal
        if spinal is None:
            return math.nan
        policy, reference = getattr(spinal.policy, name), getattr(spinal.reference, name)
        places = [layer for layer in spinal.terminal_layers if layer < len(policy)]
        return fmean(policy[layer] - reference[layer] for layer in places) if places else math.nan

    return read


def _low_rank(read: Callable[[object], float]) -> Signal:
    """Mean over the layers and bases that were measured."""

    def mean(record: AuditRecord) -> float:
        curves = [curve for by_layer in record.low_rank.values() for curve in by_layer.values()]
        return fmean(map(read, curves)) if curves else math.nan

    return mean


BEHAVIOUR: dict[str, Signal] = {
    "chosen log-prob. per token": lambda record: record.margins.chosen_logp_change_per_token.mean,
    "rejected log-prob. per token": lambda record: record.margins.rejected_logp_change_per_token.mean,
    "KL per token": lambda record: record.margins.kl.mean,
    "entropy ratio": lambda record: _ratio(record.margins.entropy, record.margins.reference_entropy),
    "token accuracy ratio": lambda record: _ratio(
        record.margins.token_accuracy, record.margins.reference_token_accuracy
    ),
    "preference accuracy": lambda record: record.margins.accuracy.mean,
    "margin shift": lambda record: record.margins.shift.mean,
}
GENERATIONS: dict[str, Signal] = {
    "repetition": _generated("repetition"),
    "length ratio": _generated("length", ratio=True),
    "ended": _generated("ended"),
    "surprise": _generated("surprise"),
}
PATCHING: dict[str, Signal] = {
    "additivity": _patched(lambda record: record.patching.additivity.mean if record.patching else math.nan),
    "head gain": _patched(lambda record: record.patching.head_gain.mean if record.patching else math.nan),
    "embedding gain": _patched(lambda record: record.patching.embedding_gain.mean if record.patching else math.nan),
    "largest layer gain": _patched(
        lambda record: max(gain.mean for gain in record.patching.layer_gain) if record.patching else math.nan
    ),
    "peak layer": _patched(
        lambda record: math.nan if record.patching is None or record.patching.peak_layer is None
        else float(record.patching.peak_layer)
    ),
    "localization centre": _localized("center_of_mass"),
    "localization spread": _localized("entropy"),
    "localization R²": _localized("cv_r2"),
}  # fmt: skip
SPINAL: dict[str, Signal] = {
    "score": _spinal("score"),
    "delta align": _spinal("delta_align"),
    "coherence": _spinal("coherence"),
    "gradient concentration": _spinal("gradient_concentration"),
    "terminal contraction": _terminal("contraction"),
    "terminal transport": _terminal("transport"),
}
SUBSPACE: dict[str, Signal] = {
    "rank 95": _low_rank(lambda curve: min(curve.rank_95, 32.0)),  # type: ignore[attr-defined]
    "variance of the first direction": _low_rank(
        lambda curve: curve.explained_variance_ratio[0]  # type: ignore[attr-defined]
    ),
    "effect of the first direction": _low_rank(
        lambda curve: curve.effect_fraction[0].mean  # type: ignore[attr-defined]
    ),
}
FAMILIES: dict[str, dict[str, Signal]] = {
    "behaviour": BEHAVIOUR,
    "continuations": GENERATIONS,
    "patching": PATCHING,
    "SPINAL": SPINAL,
    "subspace": SUBSPACE,
}
OF_FULL_AUDITS = ("patching", "SPINAL", "subspace")
"""Families that a look does not measure."""

LOGGED = (
    "loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_logps/chosen", "eval_rewards/margins",
)  # fmt: skip
"""What the trainer logs: the floor that an audit has to beat."""


def logged(log: list[LogRow], name: str, step: int, window: int = 4) -> float:
    """The mean of a metric over its last rows up to a step, less its first one. An evaluation's last value stands alone."""
    values = [row.logs[name] for row in log if row.step <= step and name in row.logs]
    if not values:
        return math.nan
    last = values[-1:] if name.startswith("eval_") else values[-window:]
    return fmean(last) - values[0]
