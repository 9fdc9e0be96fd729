"""Which layers stand out of a profile of block transplants, and how surely (METHODS §1, §3; ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from align_audit.measures.statistics import Interval, resample_indices

Array = np.ndarray

FLOOR = 0.05
"""Layers below this share of the largest mean count as this much: how small a small layer is does not matter."""


@dataclass(frozen=True, eq=False)
class LayerSet:
    """The layers above the widest gap of a profile; ``layers`` is empty, with a ``reason``, where there is none."""

    layers: tuple[int, ...]
    """Ascending."""
    separation: Interval
    """Nats by which the least of them lies above the largest of the others, with its interval."""
    stability: float
    """In [0, 1]: share of bootstrap resamples of the pairs that give the same set."""
    selection_frequency: Array
    """``[L]``, in [0, 1]: share of resamples in which the layer belongs to the set."""
    reason: str | None = None


def widest_gap(profile: Array) -> tuple[int, ...]:
    """The layers above the widest gap of a profile, at most half of them.

    With w sorted, largest first, and w₊ = max(w, ``FLOOR`` · w₁), the set is the k largest layers, k = 1 … ⌊L/2⌋ maximizing
    w₊ₖ / w₊ₖ₊₁. A ratio, not a difference: two layers of which one does a third of the other's work belong together when
    all others do a tenth of that. The smaller set where two gaps are equal.

    Args:
        profile: ``[L]``, means of block transplants in nats.

    Returns:
        layers, ascending; empty where no layer is positive, one is not finite, there is one layer, or there is no gap.

    Example:
        >>> widest_gap(np.array([0.1, 1.0, 0.08, 0.4, 0.05, -0.2]))
        (1, 3)
        >>> widest_gap(np.array([0.5, 0.5, 0.5]))
        ()
    """
    profile = np.asarray(profile, dtype=np.float64)
    if len(profile) < 2 or not np.isfinite(profile).all() or not profile.max() > 0.0:
        return ()
    order = np.argsort(-profile, kind="stable")
    height = np.maximum(profile[order] / profile.max(), FLOOR)
    gaps = (height[:-1] / height[1:])[: len(profile) // 2]
    if not gaps.max() > 1.0:
        return ()
    return tuple(sorted(order[: int(np.argmax(gaps)) + 1].tolist()))


def layer_set(transplants: Array, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> LayerSet:
    """The layers that stand out of the block transplants: those above the widest gap of the means.

    Every bootstrap resample of the pairs finds its own set; ``stability`` is the share that finds the same one. The
    separation, min over the set − max over the others, is resampled for the set of all pairs, and its interval is the
    percentile one. Choosing the set by the same pairs makes the separation look too good where resamples disagree on
    it, which is what the stability shows.

    Args:
        transplants: ``[N, L]``, block transplants per pair, nats.

    Raises:
        ValueError: wrong shape.

    Example:
        >>> pairs = np.tile([0.0, 2.0, 0.1, 0.1], (8, 1))
        >>> found = layer_set(pairs, resamples=50)
        >>> found.layers, found.stability, found.separation.low
        ((1,), 1.0, 1.9)
    """
    values = np.asarray(transplants, dtype=np.float64)
    if values.ndim != 2 or not values.shape[0] or not values.shape[1]:
        raise ValueError(f"expected block transplants [N, L]; found shape {list(values.shape)}")
    pairs, layers = values.shape

    def nothing(reason: str) -> LayerSet:
        return LayerSet((), Interval.unknown(reason), math.nan, np.full(layers, math.nan), reason)

    if layers < 2:
        return nothing("one layer cannot stand out of others")
    if not np.isfinite(values).all():
        return nothing("a block transplant is not finite")
    if pairs < 2:
        return nothing("an interval needs at least 2 pairs, found 1")
    means = values.mean(axis=0)
    chosen = widest_gap(means)
    if not chosen:
        return nothing("no block transplant is positive" if not means.max() > 0 else "all block transplants are equal")
    inside = np.zeros(layers, dtype=bool)
    inside[list(chosen)] = True
    resampled = values[resample_indices(pairs, resamples, seed)].mean(axis=1)
    apart = resampled[:, inside].min(axis=1) - resampled[:, ~inside].max(axis=1)
    low, high = np.quantile(apart, [(1 - confidence) / 2, (1 + confidence) / 2])
    sets = [widest_gap(row) for row in resampled]
    frequency = np.zeros(layers)
    for found in sets:
        frequency[list(found)] += 1
    return LayerSet(
        chosen,
        Interval(float(means[inside].min() - means[~inside].max()), float(low), float(high)),
        sum(found == chosen for found in sets) / resamples,
        frequency / resamples,
    )
