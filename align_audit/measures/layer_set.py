"""Which layers stand out by what they contribute to the margin shift, and how surely (METHODS §1, §3; ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from align_audit.measures.statistics import Interval, resample_indices

Array = np.ndarray

CLEAR = math.e
"""A layer that stands out contributes at least so many times what each of the others does: one unit of a natural logarithm."""
MARGIN = 2.0
"""Standard errors of a mean that it counts as at least: a smaller one is not told from nothing."""
FLOOR = 0.01
"""A layer counts as at least this share of the largest: how small a small one is does not matter."""


@dataclass(frozen=True, eq=False)
class LayerSet:
    """The layers that stand clear of the others; ``layers`` is empty, with a ``reason``, where there are none."""

    layers: tuple[int, ...]
    """Ascending."""
    separation: Interval
    """How many times the largest of the others the least of them contributes, with its interval."""
    stability: float
    """In [0, 1]: share of bootstrap resamples of the pairs that give the same set."""
    selection_frequency: Array
    """``[L]``, in [0, 1]: share of resamples in which the layer belongs to the set."""
    contribution: list[Interval]
    """L, nats, at least the margin of error."""
    reason: str | None = None


def standing_clear(contribution: Array) -> tuple[int, ...]:
    """The layers each of which contributes at least ``CLEAR`` times what any other layer does, at most half of them.

    With w sorted, largest first, the k largest for the largest k ≤ ⌊L/2⌋ with w_k ≥ ``CLEAR`` · w_{k+1}. The last such step
    and not the widest one: where one layer does ten times the work of a second, and that three times the work of all others,
    both stand out.

    Args:
        contribution: ``[L]``, positive.

    Returns:
        layers, ascending; empty where there is no such step.

    Example:
        >>> standing_clear(np.array([0.1, 1.0, 0.08, 0.3, 0.05, 0.05]))
        (1, 3)
        >>> standing_clear(np.array([0.5, 0.5, 0.4]))
        ()
    """
    order = np.argsort(-contribution, kind="stable")
    height = contribution[order]
    steps = np.flatnonzero(height[:-1] >= CLEAR * height[1:])
    steps = steps[steps < len(height) // 2]
    return tuple(sorted(order[: steps[-1] + 1].tolist())) if len(steps) else ()


def contributions(transplants: Array, gains: Array, least: tuple[Array, Array]) -> Array:
    """What each layer's update contributes: the geometric mean of what it does alone and what it adds to those below.

    w_ℓ = √(t_ℓ · g_ℓ), t and g the mean block transplant and mean gain, each at least its margin of error and ``FLOOR`` of
    the largest (:func:`least_means`). Alone, a layer that needs what another has learned looks small; on top of those below,
    one that repeats them does. Where updates act separately both are the same.

    Args:
        transplants, gains: ``[..., L]``, means over pairs, nats.
        least: what these count as at least, ``[L]`` each, nats.

    Returns:
        ``[..., L]``, nats.

    Example:
        >>> contributions(np.array([4.0, 1.0]), np.array([4.0, 0.0]), (np.zeros(2), np.full(2, 0.04))).tolist()
        [4.0, 0.2]
    """
    means: Array = np.sqrt(np.maximum(transplants, least[0]) * np.maximum(gains, least[1]))
    return means


def least_means(values: Array) -> Array:
    """What the mean of each layer counts as at least: ``MARGIN`` standard errors, and ``FLOOR`` of the largest mean.

    Args:
        values: ``[N, L]``, N ≥ 2, nats.

    Returns:
        ``[L]``, nats, ≥ 0.

    Example:
        >>> least_means(np.array([[3.0, 0.0], [5.0, 0.0]])).tolist()
        [2.0, 0.04]
    """
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    floors: Array = np.maximum(MARGIN * error, FLOOR * max(values.mean(axis=0).max(), 0.0))
    return floors


def layer_set(
    transplants: Array, gains: Array, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> LayerSet:
    """The layers that stand out of the contributions to the margin shift.

    Every bootstrap resample of the pairs finds its own set; ``stability`` is the share that finds the same one. The
    separation, min over the set / max over the others, is resampled for the set of all pairs, and its interval is the
    percentile one. Choosing the set by the same pairs makes the separation look too good where resamples disagree on
    it, which is what the stability shows.

    Args:
        transplants: ``[N, L]``, block transplants, nats.
        gains: ``[N, L]``, effect_ℓ − effect_{ℓ−1}, nats; the transplant where a gain was not measured.

    Raises:
        ValueError: wrong shape.

    Example:
        >>> pairs = np.tile([0.0, 2.0, 0.1, 0.1], (8, 1))
        >>> found = layer_set(pairs, pairs, resamples=50)
        >>> found.layers, found.stability, round(found.separation.low, 6)
        ((1,), 1.0, 20.0)
    """
    alone, added = np.asarray(transplants, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if alone.ndim != 2 or alone.shape != added.shape or not alone.size:
        raise ValueError(
            f"expected transplants and gains [N, L] of one shape; found {list(alone.shape)} and {list(added.shape)}"
        )
    pairs, layers = alone.shape

    def nothing(reason: str, contribution: list[Interval] | None = None) -> LayerSet:
        unknown = Interval.unknown(reason)
        return LayerSet((), unknown, math.nan, np.full(layers, math.nan), contribution or [unknown] * layers, reason)

    if not (np.isfinite(alone).all() and np.isfinite(added).all()):
        return nothing("a block transplant or a gain is not finite")
    if pairs < 2:
        return nothing("an interval needs at least 2 pairs, found 1")
    least = (least_means(alone), least_means(added))
    draws = resample_indices(pairs, resamples, seed)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    found = contributions(alone.mean(axis=0), added.mean(axis=0), least)
    resampled = contributions(alone[draws].mean(axis=1), added[draws].mean(axis=1), least)
    bounds = np.quantile(resampled, quantiles, axis=0)
    each = [Interval(float(mean), float(low), float(high)) for mean, low, high in zip(found, *bounds, strict=True)]
    if layers < 2:
        return nothing("one layer cannot stand out of others", each)
    if not (alone.mean(axis=0).max() > 0.0 and added.mean(axis=0).max() > 0.0):
        return nothing("no layer raises the margin", each)
    chosen = standing_clear(found)
    if not chosen:
        return nothing(f"no layer stands out by contributing at least {CLEAR:.1f} times what any other does", each)
    inside = np.zeros(layers, dtype=bool)
    inside[list(chosen)] = True
    apart = resampled[:, inside].min(axis=1) / resampled[:, ~inside].max(axis=1)
    low, high = np.quantile(apart, quantiles)
    sets = [standing_clear(row) for row in resampled]
    frequency = np.zeros(layers)
    for one in sets:
        frequency[list(one)] += 1
    return LayerSet(
        chosen,
        Interval(float(found[inside].min() / found[~inside].max()), float(low), float(high)),
        sum(one == chosen for one in sets) / resamples,
        frequency / resamples,
        each,
    )
