"""Contraction: the decay exponent of a layer's singular values, and which token rows enter it (METHODS §5).

Source: SPINAL (arXiv 2601.06238). H_ℓ ``[rows, d]`` holds the residual stream after layer ℓ at the sampled prediction
positions, not centred; σ_1 ≥ σ_2 ≥ … are its singular values. α is a slope of singular values: it is not
WeightWatcher's α, which is fitted to the density of eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Contraction:
    """The fitted exponent ``alpha`` with its R² and standard error over ranks ``first`` … ``last`` (1-based) of ``n``.

    What is NaN in it is explained by ``reason``.
    """

    alpha: float
    r2: float
    stderr: float
    n: int
    first: int
    last: int
    reason: str | None = None


def singular_values(H: Tensor) -> Array:
    """Singular values of H, largest first, from a float64 SVD of H itself.

    (The Gram matrix would be cheaper, but square roots of its eigenvalues lose half the digits: below 1e-8·σ_1 nothing
    is left, and the tail is what is fitted.)

    Args:
        H: ``[rows, d]``, any floating dtype. Computed on its device (on the CPU where that has no float64).

    Returns:
        float64 ``[min(rows, d)]`` ≥ 0, with an absolute error of a few σ_1·2⁻⁵². All NaN where H has an entry that is
        not finite or the SVD does not converge; :func:`contraction` turns that into a reason.

    Raises:
        ValueError: H is not a floating tensor ``[rows, d]`` with d ≥ 1.

    Example:
        >>> [round(float(sigma), 6) for sigma in singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))]
        [4.0, 3.0]
    """
    if H.dim() != 2 or H.shape[1] < 1 or not H.is_floating_point():
        raise ValueError(f"expected a floating tensor [rows, d]; found {list(H.shape)}, {H.dtype}")
    unknown = np.full(min(H.shape), np.nan)
    H = H.detach()
    if not torch.isfinite(H).all():
        return unknown
    try:
        sigma = torch.linalg.svdvals((H.cpu() if H.device.type == "mps" else H).double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return unknown
    return sigma.cpu().numpy()


def contraction(
    singular_values: Array,
    rows: int,
    columns: int,
    window: tuple[float, float] = (0.1, 0.9),
    min_values: int = 16,
) -> Contraction:
    """α = − d log σ_k / d log k, least squares over a window of ranks.

    n = min(rows, columns, numerical rank), where the numerical rank counts σ > σ_1 · max(rows, columns) · 2⁻⁵² (NumPy's
    convention in float64). The window is ranks k = ⌈window₀·n⌉ … ⌊window₁·n⌋, 1-based.

    Args:
        singular_values: ``[min(rows, columns)]``, in any order.
        rows, columns: shape of H.
        window: shares of n, ascending, in (0, 1].
        min_values: fewest singular values a fit is made of.

    Returns:
        α without unit, usually positive: σ_k ∝ k^(−α) gives α exactly. R² in [0, 1] (NaN for an exactly flat spectrum,
        whose α is 0) and the standard error of the slope (of least squares with independent errors, which neighbouring
        singular values do not have: a scale for comparison, not a test). All NaN with a reason where a singular value
        is not finite, or where the window holds fewer than ``min_values``.

    Raises:
        ValueError: another number of singular values than min(rows, columns), a negative one, or an invalid window or
            ``min_values``.

    Example:
        >>> fit = contraction(np.arange(1, 101) ** -0.7, rows=300, columns=100)
        >>> round(fit.alpha, 6), fit.n, fit.first, fit.last
        (0.7, 100, 10, 90)
    """
    sigma = np.asarray(singular_values, dtype=np.float64)
    if rows < 0 or columns < 1 or sigma.shape != (min(rows, columns),):
        raise ValueError(
            f"expected min(rows, columns) singular values for a [{rows}, {columns}] matrix; found {list(sigma.shape)}"
        )
    if (sigma < 0).any():
        raise ValueError(f"expected singular values of at least 0; found {float(np.nanmin(sigma))}")
    low, high = window
    if not 0.0 < low < high <= 1.0:
        raise ValueError(f"expected an ascending window of shares in (0, 1], such as (0.1, 0.9); found {window}")
    if min_values < 3:
        raise ValueError(f"expected min_values of at least 3 (a line and its error), found {min_values}")

    bad = int((~np.isfinite(sigma)).sum())
    if bad:
        return _unfitted(0, 0, 0, f"{bad} of {len(sigma)} singular values are not finite")
    sigma = np.sort(sigma)[::-1]
    floor = sigma[0] * max(rows, columns) * np.finfo(np.float64).eps if len(sigma) else 0.0
    n = int((sigma > floor).sum())
    # The decimals that were written, not their binary neighbours: ⌈0.07·100⌉ is 7, not 8.
    first, last = math.ceil(Fraction(str(low)) * n), math.floor(Fraction(str(high)) * n)
    m = last - first + 1 if n else 0
    if m < min_values:
        return _unfitted(
            n, first, last, f"the window has {m} singular values (of {n} above rounding); {min_values} are needed"
        )
    x, y = np.log(np.arange(first, last + 1)), np.log(sigma[first - 1 : last])
    x, y = x - x.mean(), y - y.mean()
    spread, total = float(x @ x), float(y @ y)
    slope = float(x @ y) / spread
    residual = y - slope * x
    unexplained = float(residual @ residual)
    stderr = math.sqrt(unexplained / (m - 2) / spread)
    if total == 0.0:
        return Contraction(0.0, math.nan, stderr, n, first, last, "the spectrum is flat: R² is 0/0")
    return Contraction(-slope, max(0.0, 1.0 - unexplained / total), stderr, n, first, last)


def below_rounding_floor(singular_values: Array, eps: float) -> int:
    """How many singular values the dtype of the activations cannot resolve: σ ≤ σ_1·eps.

    Args:
        singular_values: ``[n]``, in any order.
        eps: the dtype's epsilon, ``torch.finfo(dtype).eps``: 2⁻⁷ for bfloat16.

    Returns:
        0 … n; n where all are zero. Values that are not finite count as unresolved.

    Raises:
        ValueError: not one-dimensional, or ``eps`` not in (0, 1).

    Example:
        >>> below_rounding_floor(np.array([1.0, 0.1, 0.001]), eps=2**-7)
        1
    """
    sigma = np.asarray(singular_values, dtype=np.float64)
    if sigma.ndim != 1 or not 0.0 < eps < 1.0:
        raise ValueError(f"expected singular values [n] and eps in (0, 1); found {list(sigma.shape)} and {eps}")
    return int((~(sigma > sigma.max(initial=0.0) * eps)).sum())


def row_keys(pair_index: Array | int, side: Array | int, position: Array | int, seed: int) -> Array:
    """A pseudo-random key for every token row, from what the row *is*, not from when it is seen.

    (pair, side, position) are packed into 64 bits and mixed twice with the SplitMix64 finalizer (Steele et al. 2014),
    the seed entering between: a bijection, so different rows have different keys.

    Args:
        pair_index: 0 … 2³¹ − 1. The arguments broadcast against each other.
        side: 0 for chosen (and rows common to both), 1 for rejected.
        position: 0 … 2³² − 1.
        seed: 0 … 2⁶⁴ − 1.

    Returns:
        int64, spread evenly over its whole range (negative keys included).

    Raises:
        ValueError: an argument is no integer or outside its range.

    Example:
        >>> row_keys(np.array([0, 0, 1]), 0, np.array([0, 1, 0]), seed=0).tolist()
        [5197578548964807871, -2529857523242969672, -1506547071961215988]
    """
    given = {"pair_index": (pair_index, 1 << 31), "side": (side, 2), "position": (position, 1 << 32)}
    parts = []
    for name, (integers, limit) in given.items():
        values = np.asarray(integers)
        if values.dtype.kind not in "iu":
            raise ValueError(f"expected integers for {name}; found {values.dtype}")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(f"expected {name} in [0, {limit}); found {values.min()} … {values.max()}")
        parts.append(values.astype(np.uint64))
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed in [0, 2**64), found {seed}")
    pair, chosen_or_rejected, where = np.broadcast_arrays(*parts)
    packed = (pair << np.uint64(33)) | (chosen_or_rejected << np.uint64(32)) | where
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        return _mix(_mix(packed + _GOLDEN) + np.uint64(seed) * _GOLDEN).view(np.int64)


def keep_rows(keys: Array, max_rows: int) -> Array:
    """Mask of the ``max_rows`` rows with the smallest keys: the same rows in whatever order they come.

    Args:
        keys: integers ``[n]``, distinct (of equal ones the first are taken).
        max_rows: cap; all rows are kept where there are no more.

    Returns:
        bool ``[n]``.

    Raises:
        ValueError: wrong shape or dtype, or ``max_rows`` below 1.

    Example:
        >>> keep_rows(np.array([7, -2, 5]), max_rows=2).tolist()
        [False, True, True]
    """
    keys = _checked_keys(keys)
    if max_rows < 1:
        raise ValueError(f"expected max_rows of at least 1, found {max_rows}")
    mask = np.zeros(len(keys), dtype=bool)
    mask[np.argsort(keys, kind="stable")[:max_rows]] = True
    return mask


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Rows ``[m, L, d]`` with their ``keys`` ``[m]`` ascending; ``seen`` counts all rows they were drawn from."""

    keys: Array
    rows: Tensor
    seen: int


class RowSample:
    """Keeps the ``max_rows`` token rows with the smallest keys out of however many are shown to it.

    What is kept does not depend on the order or the size of the batches, and memory is bounded by ``max_rows``, however
    many updates come. Rows stay on the device and in the dtype of the first update.

    Example:
        >>> sample = RowSample(max_rows=2)
        >>> sample.update(np.array([5, 1]), torch.tensor([[[50.0]], [[10.0]]]))
        >>> sample.update(np.array([3]), torch.tensor([[[30.0]]]))
        >>> frozen = sample.freeze()
        >>> frozen.rows.flatten().tolist(), frozen.seen
        ([10.0, 30.0], 3)
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"expected max_rows of at least 1, found {max_rows}")
        self.max_rows = max_rows
        self._keys = np.zeros(0, dtype=np.int64)
        self._buffer: Tensor | None = None
        self._seen = 0

    def update(self, keys: Array, rows: Tensor) -> None:
        """Show a batch.

        Args:
            keys: int64 ``[n]``, from :func:`row_keys`, one per row and each shown once.
            rows: ``[n, L, d]``; what is kept is copied.

        Raises:
            ValueError: shapes do not fit each other or earlier updates, or a key occurs twice.
        """
        keys = _checked_keys(keys)
        if rows.dim() != 3 or len(rows) != len(keys):
            raise ValueError(f"expected rows [{len(keys)}, L, d], one per key; found {list(rows.shape)}")
        if self._buffer is not None and rows.shape[1:] != self._buffer.shape[1:]:
            raise ValueError(
                f"expected rows [n, {', '.join(map(str, self._buffer.shape[1:]))}] as before; found {list(rows.shape)}"
            )
        together = np.concatenate([self._keys, keys.astype(np.int64)])
        if len(np.unique(together)) < len(together):
            raise ValueError("expected every key once; found one that was shown before")
        held = len(self._keys)
        mask = keep_rows(together, self.max_rows)
        new = np.flatnonzero(mask[held:])
        size = int(mask.sum())
        # New rows go where rows were evicted, then behind the last.
        slots = np.concatenate([np.flatnonzero(~mask[:held]), np.arange(held, size)])[: len(new)]
        self._reserve(size, rows)
        if self._buffer is not None and len(new):
            taken = rows.detach()[torch.from_numpy(new).to(rows.device)]
            self._buffer[torch.from_numpy(slots).to(self._buffer.device)] = taken.to(self._buffer)
        kept = np.concatenate([self._keys, np.zeros(size - held, dtype=np.int64)])
        kept[slots] = keys[new]
        self._keys = kept
        self._seen += len(keys)

    def freeze(self) -> SampledRows:
        """A copy of what is kept, ordered by key.

        Raises:
            ValueError: nothing has been shown yet, so L and d are unknown.
        """
        if self._buffer is None:
            raise ValueError("expected at least one update before freeze(), found none")
        order = np.argsort(self._keys)
        return SampledRows(self._keys[order], self._buffer[torch.from_numpy(order).to(self._buffer.device)], self._seen)

    def _reserve(self, size: int, like: Tensor) -> None:
        """Grow the buffer by doubling, never beyond ``max_rows``."""
        capacity = 0 if self._buffer is None else len(self._buffer)
        if self._buffer is not None and size <= capacity:
            return
        grown = min(self.max_rows, max(size, 2 * capacity))
        if self._buffer is None:
            self._buffer = torch.empty(grown, *like.shape[1:], dtype=like.dtype, device=like.device)
        else:
            buffer = self._buffer.new_empty(grown, *self._buffer.shape[1:])
            buffer[:capacity] = self._buffer
            self._buffer = buffer


def _unfitted(n: int, first: int, last: int, reason: str) -> Contraction:
    return Contraction(math.nan, math.nan, math.nan, n, first, last, reason)


def _checked_keys(keys: Array) -> Array:
    keys = np.asarray(keys)
    if keys.ndim != 1 or keys.dtype.kind not in "iu":
        raise ValueError(f"expected integer keys [n]; found shape {list(keys.shape)}, {keys.dtype}")
    return keys


def _mix(z: Array) -> Array:
    """SplitMix64's finalizer: a bijection of 64-bit words (arithmetic modulo 2⁶⁴)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
