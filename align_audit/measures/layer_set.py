"""Which layers stand out by what they contribute to the margin shift, and how surely (METHODS §1, §3; ours)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from align_audit.measures.interval import Interval
from align_audit.measures.resampling import Groups, resampled_means, standard_errors, widened_tail
from align_audit.measures.statistics import Method, mean_intervals

Array = np.ndarray

CLEAR = math.e
"""A layer that stands out contributes at least so many times what each of the others does: one unit of a natural logarithm."""
MARGIN = 2.0
"""Standard errors of a mean that a layer is compared as at least: a smaller one is not told from nothing."""
FLOOR = 0.01
"""A layer is compared as at least this share of the largest: how small a small one is does not matter."""


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
    """L, nats; 0 where the transplant or the gain does not lie above 0 with its whole interval, the upper bound then being
    what it could be."""
    reason: str | None = None


def standing_clear(height: Array, contributes: Array | None = None) -> tuple[int, ...]:
    """The layers each of which contributes at least ``CLEAR`` times what any other layer could, at most half of them.

    With w sorted, largest first, the k largest for the largest k ≤ ⌊L/2⌋ with w_k ≥ ``CLEAR`` · w_{k+1} and all k of them
    contributing. The last such step and not the widest one: where one layer does ten times the work of a second, and that
    three times the work of all others, both stand out.

    Args:
        height: ``[L]``, what each layer is compared as, positive.
        contributes: bool ``[L]``: what it contributes is more than spread; None: all do.

    Returns:
        layers, ascending; empty where there is no such step.

    Example:
        >>> standing_clear(np.array([0.1, 1.0, 0.08, 0.3, 0.05, 0.05]))
        (1, 3)
        >>> standing_clear(np.array([0.5, 0.5, 0.4]))
        ()
    """
    order = np.argsort(-height, kind="stable")
    sorted_height = height[order]
    all_contribute = np.cumprod(np.ones(len(height)) if contributes is None else contributes[order]).astype(bool)
    steps = np.flatnonzero((sorted_height[:-1] >= CLEAR * sorted_height[1:]) & all_contribute[:-1])
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


def least_means(values: Array, groups: Array | None = None) -> Array:
    """What the mean of each layer is compared as at least: ``MARGIN`` standard errors, and ``FLOOR`` of the largest mean.

    Args:
        values: ``[N, L]``, of at least 2 groups, nats.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        ``[L]``, nats, ≥ 0.

    Example:
        >>> least_means(np.array([[3.0, 0.0], [5.0, 0.0]])).tolist()
        [2.0, 0.04]
    """
    least: Array = np.maximum(MARGIN * standard_errors(values, groups), FLOOR * max(values.mean(axis=0).max(), 0.0))
    return least


def layer_set(
    transplants: Array,
    gains: Array,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Array | None = None,
    method: Method = "percentile",
) -> LayerSet:
    """The layers that stand out of the contributions to the margin shift.

    A layer contributes what its update does alone (t) and on top of those below (g), √(t · g), where the interval of either
    lies above 0; spread is no contribution. What does not is still compared as what it could be, :func:`least_means`: a layer
    stands out only of what is known to be small. Every bootstrap resample of the groups finds its own set; ``stability`` is the
    share that finds the same one. The separation, min over the set / max over the others, is resampled for the set of all
    pairs, and its interval is the percentile one. Choosing the set by the same pairs makes the separation look too good where
    resamples disagree on it, which is what the stability shows.

    Args:
        transplants: ``[N, L]``, block transplants in the direction of the mean margin shift, nats.
        gains: ``[N, L]``, effect_ℓ − effect_{ℓ−1} in that direction, nats; the transplant where a gain was not measured.
        groups: ``[N]``, which pairs belong together; None: none do.
        method: of the intervals that decide whether a layer contributes.

    Raises:
        ValueError: wrong shape.

    Example:
        >>> pairs = np.tile([0.0, 2.0, 0.1, 0.1], (8, 1))
        >>> stands = layer_set(pairs, pairs, resamples=50)
        >>> stands.layers, stands.stability, round(stands.separation.low, 6)
        ((1,), 1.0, 20.0)
    """
    alone, added = np.asarray(transplants, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if alone.ndim != 2 or alone.shape != added.shape or not alone.size:
        raise ValueError(
            f"expected transplants and gains [N, L] of one shape; found {list(alone.shape)} and {list(added.shape)}"
        )
    pairs, layers = alone.shape
    if not (np.isfinite(alone).all() and np.isfinite(added).all()):
        return _none_clear(layers, "a block transplant or a gain is not finite")
    together = Groups.of(groups, pairs)
    few = together.too_few()
    if few is not None:
        return _none_clear(layers, few)
    contributes = _above_zero(alone, resamples, confidence, seed, groups, method)
    contributes &= _above_zero(added, resamples, confidence, seed, groups, method)
    t, g = alone.mean(axis=0), added.mean(axis=0)
    drawn = resampled_means(np.hstack([alone, added]), np.hstack([t, g]), resamples, seed, groups)
    drawn_t, drawn_g = drawn[:, :layers], drawn[:, layers:]
    least, nothing = (least_means(alone, groups), least_means(added, groups)), (np.zeros(layers), np.zeros(layers))
    height, resampled = contributions(t, g, least), contributions(drawn_t, drawn_g, least)
    tail = widened_tail(together.count, confidence)
    product, resampled_product = contributions(t, g, nothing), contributions(drawn_t, drawn_g, nothing)
    contribution = _contribution_intervals(product, resampled_product, resampled, contributes, tail)
    chosen = standing_clear(height, contributes)
    if not chosen:
        return _none_clear(layers, _why_none(contributes), contribution)
    return _apart(chosen, height, resampled, contributes, contribution, tail)


def _none_clear(layers: int, reason: str, contribution: list[Interval] | None = None) -> LayerSet:
    """No layer, for that reason, which ``contribution`` has too where it is not given."""
    unknown = Interval.unknown(reason)
    return LayerSet((), unknown, math.nan, np.full(layers, math.nan), contribution or [unknown] * layers, reason)


def _why_none(contributes: Array) -> str:
    """Why no layer stands clear, where none does."""
    if len(contributes) < 2:
        return "one layer cannot stand out of others"
    if not contributes.any():
        return "no layer moves the margin in the direction of the shift, alone and on top of those below"
    return f"no layer stands out by contributing at least {CLEAR:.1f} times what any other could"


def _contribution_intervals(
    product: Array, resampled_product: Array, resampled: Array, contributes: Array, tail: float
) -> list[Interval]:
    """L of :attr:`LayerSet.contribution`: what a layer's own means give; where it does not contribute, at most what it is
    compared as."""
    low, high = np.quantile(resampled_product, [tail, 1 - tail], axis=0)
    could_be = np.quantile(resampled, 1 - tail, axis=0)
    return [
        Interval(float(product[layer]), float(low[layer]), float(high[layer]))
        if contributes[layer]
        else Interval(0.0, 0.0, float(could_be[layer]))
        for layer in range(len(product))
    ]


def _apart(
    chosen: tuple[int, ...],
    height: Array,
    resampled: Array,
    contributes: Array,
    contribution: list[Interval],
    tail: float,
) -> LayerSet:
    """How far the ``chosen`` layers stand from the others, and how often the resamples choose them too."""
    inside = np.zeros(len(height), dtype=bool)
    inside[list(chosen)] = True
    separation = resampled[:, inside].min(axis=1) / resampled[:, ~inside].max(axis=1)
    low, high = np.quantile(separation, [tail, 1 - tail])
    sets = [standing_clear(row, contributes) for row in resampled]
    frequency = np.zeros(len(height))
    for stands in sets:
        frequency[list(stands)] += 1
    return LayerSet(
        chosen,
        Interval(float(height[inside].min() / height[~inside].max()), float(low), float(high)),
        sum(stands == chosen for stands in sets) / len(sets),
        frequency / len(sets),
        contribution,
    )


def _above_zero(
    values: Array, resamples: int, confidence: float, seed: int, groups: Array | None, method: Method
) -> Array:
    """bool ``[L]``: the mean's whole interval lies above 0."""
    intervals = mean_intervals(values, resamples, confidence, method, seed=seed, groups=groups)
    return np.array([interval.low > 0.0 for interval in intervals])
