"""Groups of probe pairs that are independent of each other, and resamples of them (METHODS, notation and §2).

Pairs that share a prompt form one group. Groups are what is resampled and left out, so that pairs which say the same thing
twice do not narrow an interval. Every random draw comes from a local generator made from ``seed``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

Array = np.ndarray

LEAST_GROUPS = 8
"""Fewest groups that an interval is made of: percentile intervals of 2, 4 and 8 pairs cover 50, 80 and 87 %, not 95."""
BOOTSTRAP_FROM = 32
"""Fewest groups whose resampled means make a percentile interval; of fewer, intervals are Student's and studentized."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each of n pairs belongs to.

    Attributes:
        labels: int64 ``[n]``, 0 … ``count`` − 1.
        count: G, how many groups there are.
        sizes: float64 ``[G]``, pairs in each.
    """

    labels: Array
    count: int
    sizes: Array

    @classmethod
    def of(cls, groups: Array | None, pairs: int) -> Groups:
        """Groups named by anything that can be compared, ``[pairs]``; None: each pair is one of its own.

        Raises:
            ValueError: another number of names than pairs.

        Example:
            >>> Groups.of(np.array([7, 3, 7]), 3).sizes.tolist()
            [1.0, 2.0]
        """
        if groups is None:
            return cls(np.arange(pairs), pairs, np.ones(pairs))
        groups = np.asarray(groups)
        if groups.shape != (pairs,):
            raise ValueError(f"expected a group for each of {pairs} pairs, shape [{pairs}]; found {list(groups.shape)}")
        labels = np.unique(groups, return_inverse=True)[1].reshape(-1)
        sizes = np.bincount(labels).astype(np.float64) if pairs else np.empty(0)
        return cls(labels.astype(np.int64), len(sizes), sizes)

    @property
    def alone(self) -> bool:
        """Whether every pair is a group of its own."""
        return self.count == len(self.labels)

    def sums(self, values: Array) -> Array:
        """Σ of the rows of each group: ``[G, C]`` from ``[n, C]``."""
        if self.alone:
            return values[np.argsort(self.labels, kind="stable")]
        sums = np.zeros((self.count, values.shape[1]))
        np.add.at(sums, self.labels, values)
        return sums

    def total(self, values: Array) -> Array:
        """``[n, …]``: the sum of ``values`` over the group that each pair belongs to."""
        sums: Array = self.sums(values.reshape(len(values), -1))[self.labels].reshape(values.shape)
        return sums

    def rows(self, chosen: Array) -> Array:
        """Places of all pairs of the ``chosen`` groups, a group that is chosen twice twice."""
        order: Array = np.argsort(self.labels, kind="stable")
        if self.alone:
            places: Array = order[chosen]
            return places
        ends = np.cumsum(self.sizes.astype(np.int64))
        starts = ends - self.sizes.astype(np.int64)
        return np.concatenate([order[starts[group] : ends[group]] for group in chosen.tolist()])

    def design_effect(self, values: Array) -> Array:
        """How much more the sums of deviations ``[n, C]`` over groups vary than those of single pairs, ``[C]``, at least 1."""
        if self.alone:
            return np.ones(values.shape[1])
        alone, together = np.square(values).sum(axis=0), np.square(self.sums(values)).sum(axis=0)
        effect: Array = np.maximum(together / np.where(alone > 0.0, alone, 1.0), 1.0)
        return effect

    def met(self, chosen: Array) -> Array:
        """In how many groups there is a chosen pair: ``[C]`` from bool ``[n, C]``."""
        return np.asarray((self.sums(chosen.astype(np.float64)) > 0).sum(axis=0))

    def too_few(self) -> str | None:
        """Why no interval is made of them, if so."""
        if self.count >= LEAST_GROUPS:
            return None
        shared = "" if self.alone else f" in {len(self.labels)} pairs (those that share a prompt are one)"
        return f"an interval needs at least {LEAST_GROUPS} independent pairs, found {self.count}{shared}"


def resample_indices(n: int, resamples: int, seed: int) -> Array:
    """Bootstrap draws of ``n`` groups with replacement.

    Returns:
        int64 ``[resamples, n]``, entries in [0, n). The same for the same arguments, whatever else drew numbers before.

    Raises:
        ValueError: ``n`` or ``resamples`` is below 1.

    Example:
        >>> resample_indices(4, 2, seed=0).tolist()
        [[3, 2, 2, 1], [1, 0, 0, 0]]
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"expected at least 1 group and 1 resample, found n={n}, resamples={resamples}")
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def column_means(values: Array) -> Array:
    """Column means ``[C]``, exactly the common value where all values of a column are equal; NaN without rows."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    equal = (values == values[0]).all(axis=0)
    means: Array = np.where(equal, values[0], values.mean(axis=0))
    return means


def resample_counts(groups: int, resamples: int, seed: int) -> Array:
    """How often each group is in each resample: float64 ``[resamples, groups]``, of :func:`resample_indices`."""
    indices = resample_indices(groups, resamples, seed)
    flat = (indices + groups * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)


def resampled_means(values: Array, means: Array, resamples: int, seed: int, groups: Array | None = None) -> Array:
    """Column means of bootstrap resamples of groups ``[resamples, C]``, as one product with the counts of every group.

    A resample holds as many groups as there are, each with all its pairs; its mean is over those pairs.

    Args:
        values: ``[N, C]``, N ≥ 1.
        means: ``[C]``, of :func:`column_means`, which a column of equal values keeps in every resample, exactly.
        groups: ``[N]``, which pairs belong together; None: none do.
    """
    together = Groups.of(groups, len(values))
    counts = resample_counts(together.count, resamples, seed)
    resampled: Array = counts @ together.sums(values) / (counts @ together.sizes)[:, None]
    equal = (values == values[0]).all(axis=0)
    resampled[:, equal] = means[equal]
    return resampled


def leave_one_out_means(values: Array, means: Array, groups: Array | None = None) -> Array:
    """Column means without each group in turn, ``[G, C]``, G ≥ 2.

    Around the mean, so that columns of equal values stay exactly equal.

    Example:
        >>> leave_one_out_means(np.array([[1.0], [2.0], [6.0]]), np.array([3.0])).ravel().tolist()
        [4.0, 3.5, 1.5]
    """
    together = Groups.of(groups, len(values))
    sizes = together.sizes[:, None]
    return np.asarray(means - together.sums(values - means) / (len(values) - sizes))


def standard_errors(values: Array, groups: Array | None = None) -> Array:
    """The jackknife's standard error of each column mean, ``[C]``, a group left out at a time; of single pairs s/√N.

    Args:
        values: ``[N, C]``, of at least 2 groups.
    """
    without = leave_one_out_means(values, column_means(values), groups)
    squares = np.square(without - without.mean(axis=0)).sum(axis=0)
    errors: Array = np.sqrt((len(without) - 1) / len(without) * squares)
    return errors


def influences(without: Array) -> Array:
    """How much each group moves each statistic, ``[G, K]`` from its values without each group in turn; columns have mean 0.

    Of a mean over single pairs it is the pair's distance from it.

    Example:
        >>> influences(np.array([[4.0], [3.5], [1.5]])).ravel().tolist()
        [-2.0, -1.0, 3.0]
    """
    moved: Array = (len(without) - 1) * (without.mean(axis=0) - without)
    return moved


def studentized(influence: Array, resamples: int, seed: int) -> Array:
    """t of bootstrap resamples of G groups: their mean influence over its own standard error, ``[resamples, K]``.

    Args:
        influence: ``[G, K]``, of :func:`influences`.

    A resample of equal groups has no spread (none above a millionth of the largest influence, which rounding gives as well):
    its t is infinite, with the sign of their influence.
    """
    groups = len(influence)
    counts = resample_counts(groups, resamples, seed)
    scale = np.abs(influence).max(axis=0)
    unit = influence / np.where(scale > 0.0, scale, 1.0)
    means = counts @ unit / groups
    spread = np.maximum(counts @ unit**2 / groups - means**2, 0.0) / (groups - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means == 0.0, 0.0, means / np.sqrt(np.where(spread > 1e-12, spread, 0.0)))


def widened_tail(groups: int, confidence: float) -> float:
    """The share of resamples on either side of a percentile interval, below (1 − confidence)/2.

    Resamples vary by (G − 1)/G of what they should, and not as Student's distribution does: Φ(−√(G/(G−1)) · t) makes up for
    both (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Example:
        >>> round(widened_tail(32, 0.95), 4)
        0.0191
    """
    return float(ndtr(math.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, (1 - confidence) / 2)))
