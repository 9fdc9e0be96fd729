"""How many pairs have to be exact, where a control variate has a proxy of all of them.

What is estimated from them then: :mod:`align_audit.measures.control_variate`.
"""

from __future__ import annotations

import math

from scipy.special import ndtri

from align_audit.measures.exact_sample import MINIMUM_EXACT


def exact_pairs_needed(correlation: float, pairs: int, equivalent: float) -> int:
    """Least number of exact pairs whose combined estimate has the variance of ``equivalent`` plain exact pairs.

    n = (1 − ρ²) / (1/equivalent − ρ²/pairs), rounded up, from ``MINIMUM_EXACT`` to ``pairs``. It takes the slope as
    known; fitting it costs variance: with normal effects a quarter at n = 8 and ρ = 0.5 (there nothing is gained), 4 % at
    n = 16, more where the relation bends. Ask for a little more when n is small.

    Args:
        correlation: ρ of exact and proxy, in [−1, 1]; NaN counts as 0 (no gain known).
        pairs: N, those that have a proxy.
        equivalent: exact pairs to match, positive; may exceed ``pairs``.

    Returns:
        n in [min(8, pairs), pairs]. Where ``pairs`` ≤ ``equivalent`` · ρ² no n suffices (even n = pairs has the variance
        of ``pairs``), and where the formula asks for more than there are: ``pairs``, never infinity.

    Raises:
        ValueError: ρ outside [−1, 1], ``pairs`` below 1, ``equivalent`` not positive.

    Example:
        (1 − 0.81) / (1/48 − 0.81/96) = 15.3.

        >>> exact_pairs_needed(0.9, pairs=96, equivalent=48)
        16
    """
    if abs(correlation) > 1.0:
        raise ValueError(f"expected a correlation in [-1, 1], found {correlation}")
    if pairs < 1 or not equivalent > 0.0:
        raise ValueError(f"expected at least 1 pair and a positive equivalent; found {pairs} and {equivalent}")
    square = 0.0 if math.isnan(correlation) else correlation**2
    room = 1 / equivalent - square / pairs
    if room <= 0.0 or (1 - square) / room >= pairs:
        return pairs
    # A hair below, so that rounding does not ask for one pair more than the formula.
    return min(max(math.ceil((1 - square) / room - 1e-9), MINIMUM_EXACT), pairs)


def exact_pairs_needed_safely(correlation: float, pilot: int, pairs: int, equivalent: float, level: float = 0.9) -> int:
    """:func:`exact_pairs_needed` for a correlation estimated on ``pilot`` exact pairs: at its lower confidence bound.

    ρ_low = max(0, tanh(artanh|r| − z / √(pilot − 3))), z the ``level`` quantile of the normal distribution: a one-sided bound
    by Fisher's z (1921), right for roughly normal pairs. With probability ``level`` the returned n suffices; the price is
    more exact pairs than needed on average. Fewer than 4 pilot pairs tell nothing: ρ_low = 0. Where a pilot chooses n and
    then counts among the n pairs, the estimate is unbiased only approximately: by up to a tenth of a standard error
    with skewed effects (``benchmarks/evidence/control_variate.py``). A correlation from an earlier audit has no such cost.

    Raises:
        ValueError: as :func:`exact_pairs_needed`, or ``level`` outside (0, 1), or a negative ``pilot``.

    Example:
        r = 0.9 on 12 pairs is at least 0.78 with 90 % confidence.

        >>> exact_pairs_needed_safely(0.9, pilot=12, pairs=96, equivalent=48)
        28
    """
    if not 0.0 < level < 1.0 or pilot < 0:
        raise ValueError(f"expected a level between 0 and 1 and a pilot of 0 or more pairs; found {level} and {pilot}")
    if abs(correlation) > 1.0:
        raise ValueError(f"expected a correlation in [-1, 1], found {correlation}")
    if pilot < 4 or math.isnan(correlation):
        return exact_pairs_needed(0.0, pairs, equivalent)
    size = min(abs(correlation), 1 - 1e-15)
    low = math.tanh(math.atanh(size) - float(ndtri(level)) / math.sqrt(pilot - 3))
    return exact_pairs_needed(min(max(0.0, low), size), pairs, equivalent)
