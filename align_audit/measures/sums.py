"""Sums of many values into few places, that give the same bits every time."""

from __future__ import annotations

import torch


def sum_into(places: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Σ of the ``values`` that share a place.

    Args:
        places: int64 ``[n]``, each in 0 … ``count`` − 1.
        values: ``[n]``; differentiable.

    Returns:
        float64 ``[count]``, 0 where no value went. NaN and ±inf stay in their own place.

    ``index_add_`` adds atomically on an accelerator, so that its last bits differ from run to run: two equal models would
    differ by 1e-16, where "exactly 0" is what tells them apart. Accumulating ``index_put`` sorts the places first.

    Example:
        >>> sum_into(torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 4.0]), 3).tolist()
        [2.0, 5.0, 0.0]
    """
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    if values.device.type == "cpu":
        return sums.index_add(0, places, values.double())
    return sums.index_put((places,), values.double(), accumulate=True)
