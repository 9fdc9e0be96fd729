"""Exact effects of some pairs and proxies of all of them, without their units: what a control variate is fitted to.

S are the n of N pairs that are exact. Values are taken around the first one and of order 1, so that no square or fourth
power overflows, and values that are equal but for rounding become exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

MINIMUM_EXACT = 8
"""Fewest exact pairs from which a slope is fitted; below, the plain mean."""

ROUNDING = 1e-12
"""A spread this small against the values, or a leave-one-out spread this small against the whole, counts as none."""


@dataclass(frozen=True, eq=False)
class ExactSample:
    """Exact values and proxies of N pairs at L layers, in working units: of order 1, around the first one."""

    measured: Array
    """bool ``[N, L]``: the pairs that are exact, S."""
    count: Array
    """``[L]``: how many they are, n."""
    infinite: Array
    """``[L]``: exact values that are infinite, or stand for one that is not finite."""
    not_finite: Array
    """``[L]``: pairs with a proxy that is not finite."""
    width: Array
    """``[L]``: slopes that are fitted, K or 1."""
    origin: Array
    """``[L]``, in the unit of the exact values."""
    scale: Array
    """``[L]``, in the unit of the exact values."""
    proxy_scale: Array
    """``[L, K]``, in the unit of the proxies."""
    proxies: Array
    """``[N, L, K]``; where one slope is fitted to K proxies, their average comes first and 0 after it."""
    exact_mean: Array
    """``[L]``, over S."""
    y: Array
    """``[N, L]``: exact − its mean over S; 0 outside of S."""
    d: Array
    """``[N, L, K]``: proxies − their means over S; 0 outside of S."""
    sxx: Array
    """``[L, K, K]``."""
    sxy: Array
    """``[L, K]``."""
    syy: Array
    """``[L]``."""
    proxy_spread: Array
    """``[L]``: Σ d² over the proxies too, the trace of Sxx."""

    @property
    def pairs(self) -> int:
        """N."""
        return len(self.measured)

    @property
    def divisor(self) -> Array:
        """``[L]``: n, and 1 where it is 0."""
        divisor: Array = np.maximum(self.count, 1)
        return divisor

    @property
    def sound(self) -> Array:
        """bool ``[L]``: the proxies are finite and vary over S, and the exact values are finite."""
        sound: Array = (self.proxy_spread > ROUNDING) & (self.not_finite == 0) & (self.infinite == 0)
        return sound

    @property
    def usable(self) -> Array:
        """bool ``[L]``: a slope is fitted, and used."""
        usable: Array = (self.count >= MINIMUM_EXACT) & self.sound
        return usable


def working_units(exact: Array, proxy: Array) -> ExactSample:
    """Exact values and proxies in working units, and their sums over S.

    Args:
        exact: ``[N, L]``, NaN where not measured.
        proxy: ``[N, L]``, or ``[N, L, K]`` for K of them; any unit.

    Raises:
        ValueError: wrong or different shapes, or no pairs.

    Example:
        >>> sample = working_units(np.array([[4.0], [6.0], [np.nan]]), np.array([[1.0], [2.0], [3.0]]))
        >>> sample.count.tolist(), sample.scale.tolist(), sample.y[:, 0].tolist()
        ([2], [2.0], [-0.5, 0.5, 0.0])
    """
    exact, proxies = np.asarray(exact, dtype=np.float64), np.asarray(proxy, dtype=np.float64)
    if exact.ndim != 2 or proxies.ndim not in (2, 3) or exact.shape != proxies.shape[:2] or not exact.shape[0]:
        raise ValueError(
            "expected exact values [N, L] with N at least 1, and proxies of the same shape or [N, L, K]; "
            f"found {list(exact.shape)} and {list(proxies.shape)}"
        )
    proxies = proxies.reshape(*exact.shape, -1)
    measured = ~np.isnan(exact)
    count = measured.sum(axis=0)
    infinite = np.isinf(exact).sum(axis=0)
    not_finite = (~np.isfinite(proxies)).any(axis=2).sum(axis=0)
    width = np.where(count >= MINIMUM_EXACT + 2 * (proxies.shape[2] - 1), proxies.shape[2], 1)

    e, origin, scale = _standardized(exact, measured & (infinite == 0))
    a, _, proxy_scale = _standardized(proxies, np.broadcast_to((not_finite == 0)[:, None], proxies.shape))
    if proxies.shape[2] > 1:
        a = _averaged(a, proxy_scale, width == 1)

    divisor, inside = np.maximum(count, 1), measured[:, :, None]
    exact_mean, proxy_mean = e.sum(axis=0) / divisor, (a * inside).sum(axis=0) / divisor[:, None]
    y, d = np.where(measured, e - exact_mean, 0.0), np.where(inside, a - proxy_mean, 0.0)
    # Sums and not products of matrices, whose last bits depend on how many layers there are.
    sxx, sxy = (d[:, :, :, None] * d[:, :, None, :]).sum(axis=0), (d * y[:, :, None]).sum(axis=0)
    return ExactSample(
        measured=measured,
        count=count,
        infinite=infinite,
        not_finite=not_finite,
        width=width,
        origin=origin,
        scale=scale,
        proxy_scale=proxy_scale,
        proxies=a,
        exact_mean=exact_mean,
        y=y,
        d=d,
        sxx=sxx,
        sxy=sxy,
        syy=(y * y).sum(axis=0),
        proxy_spread=np.trace(sxx, axis1=1, axis2=2),
    )


def _averaged(proxies: Array, scale: Array, where: Array) -> Array:
    """Working proxies with their average as the first, and 0 as the others, at the layers of ``where`` ``[L]``."""
    # Averaged in their own unit, each by its share of the largest scale.
    share = scale / scale.max(axis=1, keepdims=True)
    average = (proxies * share).mean(axis=2) / np.maximum(share.mean(axis=1), ROUNDING)
    averaged = np.where(where[:, None], 0.0, proxies)
    averaged[:, :, 0] = np.where(where, average, averaged[:, :, 0])
    return averaged


def _standardized(values: Array, measured: Array) -> tuple[Array, Array, Array]:
    """(values − origin) / scale with 0 where not known, origin ``[L]`` (the first known value), scale ``[L]`` > 0.

    Where the known values differ by rounding only they become 0 throughout.
    """
    first = np.take_along_axis(values, measured.argmax(axis=0)[None], axis=0)[0]
    origin = np.where(measured.any(axis=0), first, 0.0)
    moved = np.where(measured, values, origin) - origin
    scale = np.abs(moved).max(axis=0)
    varies = scale > ROUNDING * np.abs(origin)
    scale = np.where(varies, scale, 1.0)
    return np.where(varies, moved / scale, 0.0), origin, scale
