"""Intervals of what runs are compared by, made of the values of pairs as audits make theirs."""

from __future__ import annotations

import numpy as np

from align_audit.measures.combined_shares import combined_share_interval
from align_audit.measures.statistics import statistic_intervals
from align_audit.record.estimate import Estimate
from align_audit.record.figures import Sample


def interval(sample: Sample, groups: np.ndarray | None) -> Estimate:
    """As audits make theirs, at 95 %: of shares from those of each, of the rest by resampling groups of pairs."""
    if sample.share_weights is not None:
        made = combined_share_interval(sample.columns, sample.share_weights, groups=groups)
    else:
        (made,) = statistic_intervals(sample.columns, lambda means: sample.statistic(means)[..., None], groups=groups)
    return Estimate(mean=made.mean, low=made.low, high=made.high, reason=made.reason)
