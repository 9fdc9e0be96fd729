"""A mean over many token rows from some of them: its sampling error, and how many rows it takes.

The rows are drawn without replacement, by a hash that knows nothing of what is measured on them
(:func:`~align_audit.measures.draws.prefix_keys`), so their mean is an unbiased estimate of the mean over all of them, with
the error below *whatever* rows of one sequence have in common: what is random is which rows are drawn. (How far other pairs
would give another mean is another question, which intervals over pairs answer.)

Source: Cochran, *Sampling Techniques*, 3rd ed. (1977), §2.3–2.6 for the error and its finite population correction, §4.4–4.7
for the size of a sample.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def sampling_error(values: Array, population: int) -> Array:
    """Standard error of the mean of each column, as an estimate of its mean over the population: s/√n · √(1 − n/N).

    Args:
        values: ``[n, k]``, of n rows drawn without replacement.
        population: N ≥ n, how many rows there are.

    Returns:
        float64 ``[k]`` ≥ 0, in the unit of the values. Exactly 0 where all N were drawn; NaN for no row, for 1 row of several,
        and for a column with a value that is not finite. Of equal values it is 0 but for rounding: what varies in none of the
        rows drawn may vary in some that were not.

    Raises:
        ValueError: not ``[n, k]``, or fewer rows in the population than were drawn.

    Example:
        >>> sampling_error(np.array([[1.0], [3.0]]), population=4).tolist()  # √2/√2 · √½
        [0.7071067811865476]
        >>> sampling_error(np.array([[1.0], [3.0]]), population=2).tolist()
        [0.0]
    """
    values = _checked(values, population)
    n = len(values)
    if n == population > 0:
        return np.where(np.isfinite(values).all(axis=0), 0.0, np.nan)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    with np.errstate(invalid="ignore"):
        error: Array = values.std(axis=0, ddof=1) * math.sqrt((1.0 - n / population) / n)
    return error


def rows_needed(values: Array, population: int, share: float) -> int:
    """How many rows give the mean of every column a standard error of at most a share of it, going by those drawn so far.

    n = n₀ / (1 + n₀/N), n₀ = (s / (share · |mean|))², the largest over the columns, rounded up.

    Args:
        values: ``[n, k]``, of the n ≥ 2 rows drawn so far.
        population: N ≥ n.
        share: in (0, 1).

    Returns:
        1 … N. A column with a value that is not finite asks for nothing, as its mean is not known from any number of rows;
        nor does one of equal values. One of mean 0 whose values are not equal asks for all.

    Raises:
        ValueError: as :func:`sampling_error`; fewer than 2 rows; a share outside of (0, 1).

    Example:
        >>> rows_needed(np.array([[1.0], [3.0], [1.0], [3.0]]), population=1000, share=0.1)  # (1.155 / 0.2)² = 33.3
        33
    """
    values = _checked(values, population)
    if len(values) < 2 or not 0.0 < share < 1.0:
        raise ValueError(f"expected at least 2 rows and a share in (0, 1); found {len(values)} and {share}")
    needed = 1.0
    for column in values[:, np.isfinite(values).all(axis=0)].T:
        spread, allowed = float(column.std(ddof=1)), share * abs(float(column.mean()))
        if (column == column[0]).all():
            continue
        needed = max(needed, _size(spread, allowed, population))
    return min(population, math.ceil(needed))


def rows_that_give(means: Array, errors: Array, drawn: int, of: int, population: int, share: float) -> int | None:
    """:func:`rows_needed`, of another population whose rows vary as much, from what was said of those drawn from one.

    Args:
        means: ``[k]``, of the columns.
        errors: ``[k]``, their standard errors (:func:`sampling_error`).
        drawn: n ≥ 2, the rows they are of.
        of: how many there were to draw from.
        population: of the other one, at least 1.
        share: in (0, 1).

    Returns:
        1 … ``population``; None where all rows were drawn, whose errors say nothing of how they vary.

    Example:
        >>> rows_that_give(np.array([2.0]), np.array([0.5]), drawn=4, of=1000, population=1000, share=0.1)
        25
    """
    if drawn >= of:
        return None
    finite = np.isfinite(means) & np.isfinite(errors)
    spreads = errors[finite] * math.sqrt(drawn / (1.0 - drawn / of))
    sizes = [
        _size(float(spread), share * abs(float(mean)), population)
        for mean, spread in zip(means[finite], spreads, strict=True)
        if spread > 0.0
    ]
    return min(population, math.ceil(max(sizes, default=1.0)))


def _size(spread: float, allowed: float, population: int) -> float:
    """How many rows give a mean that standard error."""
    if allowed == 0.0:
        return float(population)
    infinite = (spread / allowed) ** 2
    return infinite / (1.0 + infinite / population)


def _checked(values: Array, population: int) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) > population:
        raise ValueError(
            f"expected values [n, k] of at most {population} rows, as many as there are; found {list(values.shape)}"
        )
    return values
