"""Intervals of weighted sums of shares of the same pairs: differences of accuracies, say (METHODS §2)."""

from __future__ import annotations

import math

import numpy as np

from align_audit.measures.interval import Interval
from align_audit.measures.resampling import Groups
from align_audit.measures.statistics import share_interval

Array = np.ndarray

_NO_SPREAD = 1e-9
"""Below it deviations are rounding: a sum of hits over a group that differs from its expectation does so by 1/N or more."""


def combined_share_interval(
    hits: Array, weights: Array, confidence: float = 0.95, groups: Array | None = None
) -> Interval:
    """Σⱼ weightⱼ · shareⱼ with an interval, the shares being of the same pairs.

    Each share has an interval of its own (:func:`~align_audit.measures.statistics.share_interval`). How far the sum may lie
    below is the length of the vector of how far its terms may, with the correlations of the hits between them (Zou & Donner
    2008, doi:10.1002/sim.3095; of a difference of two it is method 10 of Newcombe 1998, Statistics in Medicine 17, 2635–2650).
    The bootstrap gives no finite bound where a single pair tells two models apart.

    Of pairs that belong together the correlations are those of their sums. A share that is the same in every group (all hit, or
    none) has no correlation that hits could tell: it counts as 1 with shares of the same sign, so that a mean of two shares
    never has a narrower interval than both, and as 0 with those of the other sign.

    Args:
        hits: ``[N, J]``, 1 where it holds, 0 where not, NaN where that is not known.
        weights: ``[J]``.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        mean in [Σ of negative weights, Σ of positive ones], as the bounds are; NaN, with a reason, as of a single share.

    Raises:
        ValueError: wrong shapes, or a hit that is neither 0, 1 nor NaN.

    Example:
        >>> hits = np.column_stack([np.ones(64), np.arange(64) >= 3])
        >>> interval = combined_share_interval(hits, np.array([-1.0, 1.0]))
        >>> [round(float(x), 3) for x in (interval.mean, interval.low, interval.high)]
        [-0.047, -0.129, 0.019]
    """
    hits, weights = np.asarray(hits, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if hits.ndim != 2 or weights.shape != (hits.shape[1],):
        raise ValueError(
            f"expected hits [N, J] and J weights; found shapes {list(hits.shape)} and {list(weights.shape)}"
        )
    shares = [share_interval(column, confidence, groups) for column in hits.T]
    unknown = next((share.reason for share in shares if share.reason is not None), None)
    mean = float(sum(weight * share.mean for weight, share in zip(weights, shares, strict=True)))
    if unknown is not None:
        return Interval(mean, math.nan, math.nan, unknown)
    means = np.array([share.mean for share in shares])
    ends = weights * np.array([[share.low for share in shares], [share.high for share in shares]])
    signed = np.sign(weights)
    together = _correlations(hits, np.outer(signed, signed), Groups.of(groups, len(hits)))
    below, above = weights * means - ends.min(axis=0), ends.max(axis=0) - weights * means
    low, high = mean - _length(below, together), mean + _length(above, together)
    return Interval(mean, max(low, float(weights[weights < 0].sum())), min(high, float(weights[weights > 0].sum())))


def _correlations(hits: Array, signs: Array, groups: Groups) -> Array:
    """φ of each two columns over groups, times the sign of the product of their weights ``[J, J]``."""
    deviations = groups.sums(hits - hits.mean(axis=0))
    spread = np.sqrt(np.square(deviations).sum(axis=0))
    varies = spread > _NO_SPREAD
    unit = deviations / np.where(varies, spread, 1.0)
    correlations: Array = np.where(np.outer(varies, varies), unit.T @ unit * signs, np.maximum(signs, 0.0))
    np.fill_diagonal(correlations, 1.0)
    return correlations


def _length(parts: Array, correlations: Array) -> float:
    return math.sqrt(max(float(parts @ correlations @ parts), 0.0))
