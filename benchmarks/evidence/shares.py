"""Shares found, as the benchmarks print them."""

from __future__ import annotations

from scipy.stats import binomtest


def share(found: int, count: int) -> str:
    """Found of all, with Wilson's 95 % interval (from two on); "none" of none.

    Example:
        >>> share(19, 20)
        ' 19 of  20   95.0%  [76.4%, 99.1%]'
    """
    if count == 0:
        return "none"
    words = f"{found:3d} of {count:3d}  {found / count:6.1%}"
    if count == 1:
        return words
    interval = binomtest(found, count).proportion_ci(method="wilson")
    return f"{words}  [{interval.low:.1%}, {interval.high:.1%}]"
