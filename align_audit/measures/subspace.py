"""Low-rank subspaces of pooled token rows (METHODS §4).

Source: *Alignment is Localized* (arXiv 2510.16167, §4.3). A basis V_k ``[d, k]`` holds the first k right singular
vectors of the rows, from the eigenvectors of their Gram matrix Σ h hᵀ (not centred), so that the rows never need to be
held at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from align_audit.measures.interval import Value
from align_audit.measures.resampling import Groups, column_means, resampled_means, widened_tail


@dataclass(frozen=True, eq=False)
class Gram:
    """Σ h hᵀ over ``rows`` rows: ``matrix`` ``[d, d]``, float64, symmetric. Grams of disjoint rows add."""

    matrix: Tensor
    rows: int

    def __post_init__(self) -> None:
        if self.matrix.dim() != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"expected a Gram matrix [d, d]; found shape {list(self.matrix.shape)}")
        if self.matrix.dtype != torch.float64:
            raise ValueError(f"expected a Gram matrix in float64; found {self.matrix.dtype}")

    def __add__(self, other: Gram) -> Gram:
        if self.matrix.shape != other.matrix.shape:
            raise ValueError(
                f"expected Gram matrices of one size; found {list(self.matrix.shape)} and {list(other.matrix.shape)}"
            )
        return Gram(self.matrix + other.matrix.to(self.matrix.device), self.rows + other.rows)


class GramAccumulator:
    """Adds up Σ h hᵀ batch by batch in float64, on the device of the rows (the CPU where that has no float64).

    Example:
        >>> accumulator = GramAccumulator(2)
        >>> accumulator.update(torch.tensor([[1.0, 2.0]]))
        >>> accumulator.update(torch.tensor([[3.0, 0.0]]))
        >>> accumulator.freeze().matrix.tolist()
        [[10.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, d: int) -> None:
        if d < 1:
            raise ValueError(f"expected at least 1 column, found d={d}")
        self.d = d
        self._matrix: Tensor | None = None
        self._rows = 0

    @classmethod
    def of(cls, gram: Gram) -> Self:
        """One that has added up these rows already."""
        accumulator = cls(gram.matrix.shape[0])
        accumulator._matrix, accumulator._rows = gram.matrix.clone(), gram.rows
        return accumulator

    def update(self, rows: Tensor) -> None:
        """Add rows ``[n, d]`` of any floating dtype.

        Raises:
            ValueError: another shape, or not floating.
        """
        if rows.dim() != 2 or rows.shape[1] != self.d or not rows.is_floating_point():
            raise ValueError(f"expected floating rows [n, {self.d}]; found {list(rows.shape)}, {rows.dtype}")
        rows = rows.detach()
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        if self._matrix is None:
            self._matrix = torch.zeros(self.d, self.d, dtype=torch.float64, device=rows.device)
        self._matrix.addmm_(rows.T, rows.to(self._matrix.device))
        self._rows += len(rows)

    def freeze(self) -> Gram:
        """What has been added so far; later updates do not change it."""
        matrix = torch.zeros(self.d, self.d, dtype=torch.float64) if self._matrix is None else self._matrix
        return Gram((matrix + matrix.T) / 2, self._rows)


def top_basis(gram: Gram, k: int) -> Tensor:
    """V_k: the k leading right singular vectors of the rows, strongest first.

    The largest entry of each vector (the first of equals) is positive. Vectors beyond the rank of the rows are
    orthonormal but arbitrary: they carry no variance.

    Returns:
        float64 ``[d, k]``, orthonormal columns, on the device of ``gram``; all NaN where the Gram matrix is not finite
        or has no eigendecomposition.

    Raises:
        ValueError: ``k`` outside 1 … d.

    Example:
        >>> accumulator = GramAccumulator(2)
        >>> accumulator.update(torch.tensor([[3.0, 4.0], [-6.0, -8.0]]))
        >>> [round(x, 6) for x in top_basis(accumulator.freeze(), 1)[:, 0].tolist()]
        [0.6, 0.8]
    """
    d = len(gram.matrix)
    _check_rank(k, d)
    unknown = torch.full((d, k), math.nan, dtype=torch.float64, device=gram.matrix.device)
    if not torch.isfinite(gram.matrix).all():
        return unknown
    try:
        _, vectors = torch.linalg.eigh(gram.matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return unknown
    return _oriented(vectors[:, d - k :].flip(1))


def gram_rank(gram: Gram) -> int:
    """How many dimensions the rows span: eigenvalues above the largest times d units of float64 rounding.

    Basis vectors of :func:`top_basis` beyond it are arbitrary.

    Returns:
        0 … d; 0 where the Gram matrix is not finite.

    Example:
        >>> gram_rank(Gram(torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)), rows=5))
        2
    """
    if not torch.isfinite(gram.matrix).all():
        return 0
    try:
        values = torch.linalg.eigvalsh(gram.matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return 0
    return int((values > values[-1].clamp(min=0.0) * len(values) * torch.finfo(torch.float64).eps).sum())


def random_basis(d: int, k: int, seed: int) -> Tensor:
    """A uniformly random k-dimensional subspace of ℝ^d: the control for :func:`top_basis`.

    Returns:
        float64 ``[d, k]`` on the CPU, orthonormal columns; the same for the same arguments.

    Raises:
        ValueError: ``k`` outside 1 … d.

    Example:
        >>> V = random_basis(5, 2, seed=0)
        >>> (V.T @ V).round(decimals=6).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_rank(k, d)
    gaussian = np.random.default_rng(seed).standard_normal((d, k))
    return _oriented(torch.from_numpy(np.linalg.qr(gaussian)[0]))


def explained_variance_ratio(gram: Gram, V: Tensor, ranks: Sequence[int]) -> list[float]:
    """Share of the rows' energy inside the first k basis vectors: tr(V_kᵀ G V_k) / tr G, not centred.

    Args:
        gram: of the held-out rows.
        V: ``[d, K]``, orthonormal columns.
        ranks: each k ≤ K.

    Returns:
        One number in [0, 1] per rank, not falling with k; NaN where all rows are zero, or rows or basis are not finite.

    Raises:
        ValueError: shapes do not fit, or a rank outside 1 … K.

    Example:
        >>> gram = Gram(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)), rows=2)
        >>> explained_variance_ratio(gram, torch.eye(2, dtype=torch.float64), [1, 2])
        [0.75, 1.0]
    """
    d = len(gram.matrix)
    if V.dim() != 2 or len(V) != d:
        raise ValueError(f"expected a basis [{d}, K]; found shape {list(V.shape)}")
    for k in ranks:
        _check_rank(k, V.shape[1])
    basis = V.to(device=gram.matrix.device, dtype=torch.float64)
    energy = (basis * (gram.matrix @ basis)).sum(dim=0).clamp(min=0.0).cumsum(dim=0)
    total = float(gram.matrix.trace())
    if not (math.isfinite(total) and total > 0.0):
        return [math.nan] * len(ranks)
    # min() would turn NaN into 1.
    return [share if math.isnan(share) else min(share, 1.0) for share in (float(energy[k - 1]) / total for k in ranks)]


def principal_angles(U: Tensor, V: Tensor) -> np.ndarray:
    """Principal angles between two subspaces (``scipy.linalg.subspace_angles``), smallest first.

    Args:
        U, V: ``[d, k]`` and ``[d, l]``, columns spanning the subspaces.

    Returns:
        float64 ``[min(k, l)]``, radians in [0, π/2]; all NaN where a basis is not finite
        or its columns are linearly dependent.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x, xy = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> round(float(principal_angles(x, xy)[0]), 6)
        0.785398
    """
    if U.dim() != 2 or V.dim() != 2 or len(U) != len(V) or not U.shape[1] or not V.shape[1]:
        raise ValueError(f"expected bases [d, k] and [d, l]; found {list(U.shape)} and {list(V.shape)}")
    bases = [basis.detach().cpu().double().numpy() for basis in (U, V)]
    for basis in bases:
        if not np.isfinite(basis).all() or np.linalg.matrix_rank(basis) < basis.shape[1]:
            return np.full(min(U.shape[1], V.shape[1]), np.nan)
    return np.sort(subspace_angles(*bases))


def rank_95(ranks: Sequence[int], fractions: Sequence[float], threshold: float = 0.95) -> Value:
    """The least evaluated k from which *every* evaluated k has an effect fraction of at least ``threshold``.

    The curve need not be monotone: one dip below the threshold disqualifies all smaller k. An unknown (NaN) fraction
    counts as below.

    Args:
        ranks: ascending.
        fractions: effect(k) / effect(full), one per rank.

    Returns:
        One of the ranks; NaN with a reason where the largest rank does not reach the threshold.

    Raises:
        ValueError: lengths differ, or the ranks do not ascend.

    Example:
        >>> rank_95([1, 2, 4, 8], [0.97, 0.90, 0.96, 1.02]).value
        4.0
    """
    if len(ranks) != len(fractions) or not len(ranks) or any(b <= a for a, b in itertools.pairwise(ranks)):
        raise ValueError(
            f"expected ascending ranks with one fraction each; found ranks {list(ranks)}, fractions {list(fractions)}"
        )
    least = math.nan
    for k, fraction in zip(reversed(ranks), reversed(fractions), strict=True):
        if not fraction >= threshold:
            break
        least = float(k)
    if math.isnan(least):
        return Value.unknown(f"at the largest rank, {ranks[-1]}, the fraction is {fractions[-1]:.4g} < {threshold:g}")
    return Value(least)


def rank_95_interval(
    ranks: Sequence[int],
    fitted: np.ndarray,
    full: np.ndarray,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    threshold: float = 0.95,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Bootstrap interval of :func:`rank_95` over pairs: percentiles of the rank that every resample of the pairs gives.

    Args:
        fitted: ``[N, K]`` effects of the rank-k patches, per pair.
        full: ``[N]`` effects of the full patch.
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        (low, high), each one of ``ranks``, or infinity where that share of the resamples finds no evaluated rank enough.
        NaN twice with fewer than 8 groups or a value that is not finite.

    Raises:
        ValueError: shapes do not fit the ranks.

    Example:
        >>> full = np.array([1.0, 2.0, 3.0, 2.0] * 2)
        >>> rank_95_interval([1, 2], np.column_stack([0.5 * full, full]), full, resamples=20)
        (2.0, 2.0)
    """
    fitted, full = np.asarray(fitted, dtype=np.float64), np.asarray(full, dtype=np.float64)
    if fitted.ndim != 2 or fitted.shape != (len(full), len(ranks)):
        raise ValueError(
            f"expected effects [N, {len(ranks)}] and [N]; found {list(fitted.shape)} and {list(full.shape)}"
        )
    together = Groups.of(groups, len(full))
    if together.too_few() is not None or not (np.isfinite(fitted).all() and np.isfinite(full).all()):
        return math.nan, math.nan
    values = np.column_stack([fitted, full])
    means = resampled_means(values, column_means(values), resamples, seed, groups)
    with np.errstate(all="ignore"):
        fractions = means[:, :-1] / means[:, -1:]
    # From the largest rank downwards, how many in a row are enough (NaN is not).
    enough = np.cumprod((fractions >= threshold)[:, ::-1], axis=1).sum(axis=1)
    least = np.concatenate([[math.inf], np.asarray(ranks, dtype=np.float64)[::-1]])[enough]
    tail = widened_tail(together.count, confidence)
    low, high = np.quantile(least, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _check_rank(k: int, d: int) -> None:
    if not 1 <= k <= d:
        raise ValueError(f"expected a rank in 1 … {d}, found {k}")


def _oriented(vectors: Tensor) -> Tensor:
    """Flip columns so that the entry of largest magnitude (the first of equals) is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).contiguous()
