"""Contraction: the decay exponent of a layer's singular values (METHODS §5).

Source: SPINAL (arXiv 2601.06238). H_ℓ ``[rows, d]`` holds the residual stream after layer ℓ at the sampled prediction
positions (which rows these are: :func:`~align_audit.measures.draws.keep_rows`), not centred; σ_1 ≥ σ_2 ≥ … are its
singular values. α is a slope of singular values: it is not WeightWatcher's α, which is fitted to the density of
eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

MARGIN = 10.0
"""Rounding units by which an entry of a layer's output is wrong, at most: what was rounded on the way to it adds up. On small
models noise has 1 to 4 such units in bfloat16, 5 to 10 in float32 (``benchmarks/evidence/rounding_noise.py``)."""


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
    H = H.detach()
    sigma = _svdvals((H.cpu() if H.device.type == "mps" else H).double()) if torch.isfinite(H).all() else None
    return np.full(min(H.shape), np.nan) if sigma is None else np.asarray(sigma.cpu().numpy())


def _svdvals(wide: Tensor) -> Tensor | None:
    """Singular values of a float64 matrix; None where the SVD does not converge."""
    driver = None
    if (
        wide.is_cuda
        and torch.version.cuda
        and "magma" not in str(torch.backends.cuda.preferred_linalg_library()).lower()
    ):
        # Jacobi's method, the usual one there, is not meant for matrices as ill-conditioned as a layer's rows are.
        driver = "gesvd"
    try:
        sigma: Tensor = torch.linalg.svdvals(wide, driver=driver)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return sigma


def numerical_rank(H: Tensor, eps: float, singular_values: Array | None = None) -> int:
    """How many dimensions the rows span beyond what rounding alone would, at the precision they were computed in.

    Rounding is relative to each entry, so columns are scaled to one root mean square first (a few of a language model's are
    a hundred times larger than all others). Errors of ``MARGIN`` · eps of every entry, in any direction, then make singular
    values of up to about MARGIN · eps · ‖H‖_F / √min(rows, d): the rank counts those above.

    Args:
        H: ``[rows, d]``, any floating dtype.
        eps: of the dtype the model computes in, ``torch.finfo(dtype).eps``: 2⁻⁷ for bfloat16, 2⁻²³ for float32.
        singular_values: of H, where they are known: the rank of rows that lie clear of rounding is then told from them.

    Returns:
        0 … min(rows, d); 0 where H has an entry that is not finite.

    Raises:
        ValueError: H is not a floating tensor ``[rows, d]``, or ``eps`` not in (0, 1).

    Example:
        Two rows that are one but for rounding.

        >>> numerical_rank(torch.tensor([[1.0, 2.0], [1.0, 2.0 + 2**-22]]), eps=2**-23)
        1
    """
    if H.dim() != 2 or not H.is_floating_point() or not 0.0 < eps < 1.0:
        raise ValueError(
            f"expected a floating tensor [rows, d] and eps in (0, 1); found {list(H.shape)}, {H.dtype}, {eps}"
        )
    if not H.numel() or not torch.isfinite(H).all():
        return 0
    wide = (H.cpu() if H.device.type == "mps" else H).detach().double()
    scale = wide.square().mean(dim=0).sqrt()
    wide = torch.where(scale > 0, wide / scale, 0.0)
    if singular_values is not None and float(scale.max()) > 0.0:
        # Scaling divides no singular value by more than the largest column.
        least = float(singular_values.min()) / float(scale.max())
        if least > MARGIN * eps * float(wide.norm()) / math.sqrt(min(wide.shape)):
            return min(wide.shape)
    squares = torch.linalg.eigvalsh(wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide)
    least = (MARGIN * eps) ** 2 * float(squares.sum()) / len(squares)
    if least < 16 * len(squares) * 2.0**-52 * float(squares[-1]):
        # Squares have lost what is asked for: their own rounding is as large.
        sigma = _svdvals(wide)
        squares = squares if sigma is None else sigma.square()
    return int((squares > least).sum())


def contraction(
    singular_values: Array,
    rows: int,
    columns: int,
    rank: int | None = None,
    window: tuple[float, float] = (0.1, 0.9),
    min_values: int = 16,
) -> Contraction:
    """α = − d log σ_k / d log k, least squares over a window of ranks.

    n = min(rows, columns, rank). The window is ranks k = ⌈window₀·n⌉ … ⌊window₁·n⌋, 1-based.

    Args:
        singular_values: ``[min(rows, columns)]``, in any order.
        rows, columns: shape of H.
        rank: :func:`numerical_rank` of the rows, at the precision they were computed in. None: of rows that are exact to
            float64, whose σ ≤ σ_1 · max(rows, columns) · 2⁻⁵² are rounding.
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
    sigma = _checked(singular_values, rows, columns, window, min_values)
    bad = int((~np.isfinite(sigma)).sum())
    if bad:
        return _unfitted(0, 0, 0, f"{bad} of {len(sigma)} singular values are not finite")
    sigma = np.sort(sigma)[::-1]
    floor = sigma[0] * max(rows, columns) * np.finfo(np.float64).eps if len(sigma) else 0.0
    n = int((sigma > floor).sum())
    n = n if rank is None else min(n, rank)
    # The decimals that were written, not their binary neighbours: ⌈0.07·100⌉ is 7, not 8.
    first, last = math.ceil(Fraction(str(window[0])) * n), math.floor(Fraction(str(window[1])) * n)
    m = last - first + 1 if n else 0
    if m < min_values:
        few = f"the window has {m} singular values (of {n} above rounding); {min_values} are needed"
        return _unfitted(n, first, last, few)
    return _power_law(sigma, n, first, last)


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


def _checked(singular_values: Array, rows: int, columns: int, window: tuple[float, float], min_values: int) -> Array:
    """The singular values as float64, where :func:`contraction` can be asked for with these arguments."""
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
    return sigma


def _power_law(sigma: Array, n: int, first: int, last: int) -> Contraction:
    """The least-squares line of log σ_k on log k over ranks ``first`` … ``last``; ``sigma`` largest first."""
    x, y = np.log(np.arange(first, last + 1)), np.log(sigma[first - 1 : last])
    x, y = x - x.mean(), y - y.mean()
    spread, total = float(x @ x), float(y @ y)
    slope = float(x @ y) / spread
    residual = y - slope * x
    unexplained = float(residual @ residual)
    stderr = math.sqrt(unexplained / (len(x) - 2) / spread)
    if total == 0.0:
        return Contraction(0.0, math.nan, stderr, n, first, last, "the spectrum is flat: R² is 0/0")
    return Contraction(-slope, max(0.0, 1.0 - unexplained / total), stderr, n, first, last)


def _unfitted(n: int, first: int, last: int, reason: str) -> Contraction:
    return Contraction(math.nan, math.nan, math.nan, n, first, last, reason)
