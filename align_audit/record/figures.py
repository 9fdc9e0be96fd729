"""The figures by which runs are compared: each as a number of a record, and as a function of the values of its pairs.

``health``: how far the policy has gone, ``where``: where it was changed, the latter of full audits only. The values of pairs
lie beside the log (``step-N/arrays.safetensors``). Where two audits are of the same pairs, they give a difference its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from align_audit.record.audit_record import AuditRecord
from align_audit.record.numbers import Number, is_unknown, walk, why_unknown
from align_audit.record.stored_records import EQUAL_MODELS
from align_audit.record.units import Unit

Array = np.ndarray
Arrays = Mapping[str, Array]

NO_MEAN = "it is no mean over pairs, so that their values give no interval"


@dataclass(frozen=True, eq=False)
class Sample:
    """A number as a function of values of pairs.

    Attributes:
        columns: float64 ``[N, C]``.
        statistic: column means ``[..., C]`` → the number ``[...]``.
        share_weights: ``[C]``, where each column holds 1 or 0 and the number is the weighted sum of their means; else None.
    """

    columns: Array
    statistic: Callable[[Array], Array]
    share_weights: Array | None = None

    @property
    def value(self) -> float:
        """The number itself; NaN without pairs."""
        if not len(self.columns):
            return math.nan
        with np.errstate(all="ignore"):
            return float(self.statistic(self.columns.mean(axis=0)))


def weighted(samples: Sequence[Sample], weights: Sequence[float]) -> Sample:
    """The weighted sum of numbers of the same pairs, in the same order.

    Example:
        >>> pairs = Sample(np.array([[1.0], [3.0]]), lambda means: means[..., 0])
        >>> weighted([pairs, pairs], [1.0, -0.5]).value
        1.0
    """
    ends = np.cumsum([sample.columns.shape[1] for sample in samples]).tolist()
    starts = [0, *ends[:-1]]

    def statistic(means: Array) -> Array:
        parts = zip(samples, weights, starts, ends, strict=True)
        total: Array = np.sum(
            [weight * sample.statistic(means[..., start:end]) for sample, weight, start, end in parts], axis=0
        )
        return total

    columns = np.concatenate([sample.columns for sample in samples], axis=1)
    shares = [
        weight * sample.share_weights
        for sample, weight in zip(samples, weights, strict=True)
        if sample.share_weights is not None
    ]
    return Sample(columns, statistic, np.concatenate(shares) if len(shares) == len(samples) else None)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: as its curve is called.
        group: of health audits too, or of full ones alone.
        read: the number in a record, with its interval; NaN or None with a reason where it is not known.
        sample: what gives it from the arrays beside a record; None: no mean over pairs does. It raises ``KeyError`` where an
            array is missing.
        continuous: whether a value between two audits means anything.
        estimated: whether the number in a record may have an interval.
    """

    name: str
    group: Literal["health", "where"]
    unit: Unit
    read: Callable[[AuditRecord], Number]
    sample: Callable[[AuditRecord, Arrays], Sample] | None = None
    continuous: bool = True
    estimated: bool = True


def beta_of(record: AuditRecord) -> float | None:
    """β of the run, where the record knows it."""
    return record.provenance.beta


# --- numbers of a record ----------------------------------------------------------------------------------------------


def _number(record: AuditRecord, path: str, sequences: bool = False) -> Number:
    """The number of this path; one of a sequence only where ``sequences`` are walked too, which takes long in large records."""
    walked = (item for item in walk(record, sequences) if isinstance(item, Number))
    number = next((item for item in walked if item.path == path), None)
    return Number(path, "", None, reason=why_unknown(record, path)) if number is None else number


def _at(path: str) -> Callable[[AuditRecord], Number]:
    return lambda record: _number(record, path)


def _reward_margin(record: AuditRecord) -> Number:
    shift, beta = _number(record, "margins.shift"), beta_of(record)
    if beta is None or shift.value is None:
        return Number("reward_margin", "", None, reason="β is not in the record")
    low, high = (None if end is None else beta * end for end in (shift.low, shift.high))
    return Number("reward_margin", "", beta * shift.value, low, high, shift.reason)


def _entropy_ratio(record: AuditRecord) -> Number:
    policy, reference = _number(record, "margins.entropy"), _number(record, "margins.reference_entropy")
    if is_unknown(policy.value) or is_unknown(reference.value):
        return Number("entropy_ratio", "", None, reason=policy.reason or reference.reason)
    assert policy.value is not None and reference.value is not None
    if not reference.value > 0:
        return Number("entropy_ratio", "", None, reason="the reference's entropy is 0")
    return Number("entropy_ratio", "", policy.value / reference.value)


def _reward_accuracy(record: AuditRecord) -> Number:
    """Of equal models no margin has grown, which is no accuracy of 0."""
    if record.reference_check.same_weights:
        return Number("margins.accuracy", "share", None, reason=EQUAL_MODELS)
    return _number(record, "margins.accuracy")


def _peak_share(record: AuditRecord) -> Number:
    peak = None if record.patching is None else record.patching.peak_layer
    if peak is None:
        return Number("peak_share", "share", None, reason=why_unknown(record, "patching.peak_layer"))
    return _number(record, f"patching.layer_gain.{peak}", sequences=True)


# --- and of its pairs -------------------------------------------------------------------------------------------------


def _first(means: Array) -> Array:
    return means[..., 0]


def _over_last(means: Array) -> Array:
    return np.asarray(means[..., 0] / means[..., 1])


def _column(name: str, record: AuditRecord, arrays: Arrays) -> Sample:
    return Sample(_column_of(arrays, name)[:, None], _first)


def _column_of(arrays: Arrays, name: str) -> Array:
    return np.asarray(arrays[f"per_pair.{name}"], dtype=np.float64)


def _shifts(arrays: Arrays) -> Array:
    with np.errstate(invalid="ignore"):
        policy = _column_of(arrays, "chosen_logp") - _column_of(arrays, "rejected_logp")
        shift: Array = policy - (
            _column_of(arrays, "reference_chosen_logp") - _column_of(arrays, "reference_rejected_logp")
        )
    return shift


def _margin_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    beta = beta_of(record)
    return Sample(_shifts(arrays)[:, None] * (math.nan if beta is None else beta), _first)


def _shift_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    return Sample(_shifts(arrays)[:, None], _first)


def _chosen_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    with np.errstate(invalid="ignore"):
        change = _column_of(arrays, "chosen_logp") - _column_of(arrays, "reference_chosen_logp")
    return Sample((change / _column_of(arrays, "chosen_tokens"))[:, None], _first)


def _accuracy_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    shift = _shifts(arrays)
    return Sample(np.where(np.isfinite(shift), shift > 0, np.nan)[:, None], _first, np.ones(1))


def _entropy_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    return Sample(np.column_stack([_column_of(arrays, "entropy"), _column_of(arrays, "reference_entropy")]), _over_last)


def _share_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    peak = None if record.patching is None else record.patching.peak_layer
    if peak is None:
        raise KeyError("peak_layer")
    effect = _column_of(arrays, "effect")  # [N, L + 1], the first of what enters layer 0
    return Sample(np.column_stack([effect[:, peak + 1] - effect[:, peak], _shifts(arrays)]), _over_last)


def _additivity_sample(record: AuditRecord, arrays: Arrays) -> Sample:
    return Sample(np.column_stack([_column_of(arrays, "transplant").sum(axis=1), _shifts(arrays)]), _over_last)


REWARD_MARGIN = Figure("reward_margin", "health", "", _reward_margin, _margin_sample)
MARGIN_SHIFT = Figure("margin_shift", "health", "nats", _at("margins.shift"), _shift_sample)
"""What stands for the reward margin where β is not known."""

FIGURES: tuple[Figure, ...] = (
    Figure(
        "chosen_logp_change_per_token", "health", "nats per token", _at("margins.chosen_logp_change_per_token"), _chosen_sample
    ),
    Figure("kl", "health", "nats per token", _at("margins.kl"), partial(_column, "kl")),
    Figure("next_token_accuracy", "health", "share", _at("margins.token_accuracy"), partial(_column, "token_accuracy")),
    Figure("reward_accuracy", "health", "share", _reward_accuracy, _accuracy_sample),
    Figure("entropy_ratio", "health", "", _entropy_ratio, _entropy_sample, estimated=False),
    Figure("peak_layer", "where", "layer", _at("patching.peak_layer"), continuous=False, estimated=False),
    Figure("peak_share", "where", "share", _peak_share, _share_sample),
    Figure("additivity", "where", "share", _at("patching.additivity"), _additivity_sample),
    Figure("delta_align", "where", "", _at("spinal.delta_align"), estimated=False),
)  # fmt: skip
"""Those that every screen shows first, but for the status, which is a word."""

BY_NAME = {figure.name: figure for figure in (*FIGURES, REWARD_MARGIN, MARGIN_SHIFT)}
