"""Transport: the Fisher–Rao distance between the logit-lens distributions of neighbouring layers (METHODS §5).

Source: SPINAL (arXiv 2601.06238). Three ways in, one arithmetic: :func:`fisher_rao_distance` of two tensors, in float64;
:func:`transport_distances` of a walk up the layers, in the precision of the logits; :class:`TransportAccumulator`, which
gathers such walks block by block.

The arithmetic. With r = √p (‖r‖ = 1), BC(p, q) = cos(d/2) is the cosine between r_p and r_q, and d = 4·arcsin(½‖r_p − r_q‖).
The difference of the roots is taken per row in the form that keeps the *relative* error small:

- far, ‖r_p − r_q‖ ≥ ¼: as it stands;
- near, in float32: r_q − r_p = (r_p + r_q)·tanh(¼·Δ log-prob), which comes from differences of logits. Rounding in the
  normalizers shifts all Δ by a constant δ; that changes ‖r_q − r_p‖² by at most ½|δ| of itself to first order, and by ¼δ² to
  second, for which rows that are very near go to float64;
- near, in float64, which float32 rows fall back on: tan(d/2) = std_p(u) / mean_p(u), u = √(q/p) up to a constant factor.
  (BC = E_p[u], E_p[u²] = 1 for the normalized u, so sin²(d/2) = 1 − BC² is the variance of u.) Here a constant in Δ has no
  variance at all.

Roots are made from logits where they are needed, in a chunk of rows that a cache holds, and never kept: on a CPU reading
and writing memory takes longer than another exponential.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_BYTES = {"cpu": 1 << 21}
_CHUNK_BYTES_ELSEWHERE = 1 << 26
"""Size of one working tensor, by device type: rows are taken in chunks, so that the passes over a chunk meet it in a CPU's
cache; on an accelerator every pass is a launch, and there are some seventy a chunk."""

_NEAR = 0.25
"""Rows with ‖√p − √q‖ below this take the near form, which takes twice as long. Each root is right to 2 or 3 roundings in
norm (2·10⁻⁷ in float32), so the far form's relative error is below 2·10⁻⁶ from here on, whatever way they point."""

_SHIFT = 8.0
_TINY = 1e-3
_PEAKED = 1e-5
"""In float32 the near form is taken where its rounding stays below 2·10⁻⁶ of the distance: ‖√p − √q‖ is above 10⁻³, so that
a normalizer's rounding is small against it; neither distribution is a point mass within 2·10⁻⁵, because then a distance
is made of tokens so improbable that the rounding of their logits shows. Other rows are computed in float64. Where the
normalizers differ by more than 8 times ‖√p − √q‖, the differences of logits alone are taken in float64."""


@dataclass(frozen=True, eq=False)
class _Lens:
    """The distributions of n rows: p = exp(x − top) / norm².

    Attributes:
        logits: ``[n, V]`` as they came (not copied).
        top: ``[n, 1]``, the largest logit, in the working dtype.
        norm: float64 ``[n, 1]``, of exp(½(x − top)); 1 for a point mass.
        log_norm: float64 ``[n, 1]``, log Σ_v exp(logit_v).
    """

    logits: Tensor
    top: Tensor
    norm: Tensor
    log_norm: Tensor

    def rows(self, rows: slice | Tensor) -> _Lens:
        return _Lens(self.logits[rows], self.top[rows], self.norm[rows], self.log_norm[rows])

    def wide(self) -> Tensor:
        """The logits in the working dtype."""
        return self.logits.to(self.top.dtype)


def fisher_rao_distance(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Fisher–Rao distance between softmax(logits_p) and softmax(logits_q), row by row, in float64.

    d(p, q) = 2·arccos BC(p, q), with BC(p, q) = Σ_v √(p_v·q_v), in the forms above, which keep the *relative* error
    small however close the distributions are.

    Args:
        logits_p, logits_q: ``[n, V]``, any floating dtypes, same device; −inf means probability 0.

    Returns:
        float64 ``[n]``, radians in [0, π]; exactly 0 where the logits are identical, π where the supports are disjoint.
        NaN for a row that is no distribution: NaN, +inf, or nothing but −inf. On the device of the logits, or on the
        CPU where that device has no float64. Relative error below 10⁻¹¹ at every distance
        (``test_relative_accuracy_at_every_size``).

    Raises:
        ValueError: shapes differ or are not ``[n, V]`` with V ≥ 1, or the logits are not floating.

    Example:
        BC of (1/2, 1/2) and (1, 0) is √½, hence 2·arccos √½ = π/2.

        >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
        >>> round(fisher_rao_distance(p, q).item(), 6)
        1.570796
    """
    if logits_p.shape != logits_q.shape or logits_p.dim() != 2 or logits_p.shape[1] < 1:
        raise ValueError(
            f"expected two tensors of one shape [n, V]; found {list(logits_p.shape)} and {list(logits_q.shape)}"
        )
    if not (logits_p.is_floating_point() and logits_q.is_floating_point()):
        raise ValueError(f"expected floating-point logits; found {logits_p.dtype} and {logits_q.dtype}")
    wide = torch.promote_types(logits_p.dtype, logits_q.dtype)
    return _walk((logits_p.to(wide), logits_q.to(wide)), torch.float64)[:, 0]


def transport_distances(layers: Iterable[Tensor]) -> Tensor:
    """𝓛 of every row and step of one walk up the layers: distance of p_ℓ and p_{ℓ+1}, ℓ = 0 … L−2.

    The logits are taken from the iterable one layer at a time and two layers are held, so give a generator that makes
    them: memory is 2 tensors ``[n, V]``, whatever L. A layer's logits must not be written to before the next but one is
    asked for.

    Args:
        layers: L ≥ 1 tensors ``[n, V]``, bottom to top, floating, of one shape and dtype; −inf means probability 0. float64
            logits are worked on in float64, others in float32.

    Returns:
        float64 ``[n, L − 1]``, radians in [0, π], on the logits' device (on the CPU where that has no float64); exactly 0
        where two layers' logits are identical; NaN where a layer's row is no distribution.
        Relative error, against exact arithmetic on the same logits, at every distance: a few 2⁻⁵² in float64; in float32
        below 5·10⁻⁷ on random logits (``test_float32_walk_meets_one_millionth``), and at worst below 2·10⁻⁶, where
        nearly all of a distance lies in a tail of tokens that round alike (``test_float32_walk_in_a_tail``).

    Raises:
        ValueError: no layer, or layers that do not fit each other.

    Example:
        >>> layers = [torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf]])]
        >>> [round(distance, 6) for distance in transport_distances(layers)[0].tolist()]
        [1.570796, 0.0]
    """
    return _walk(layers)


class TransportAccumulator:
    """Gathers :func:`transport_distances` over blocks of rows; one walk an ``update``.

    Example:
        >>> gathered = TransportAccumulator()
        >>> gathered.update([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])])
        >>> gathered.update([torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]])])
        >>> gathered.freeze().round(decimals=6).tolist()
        [[1.570796], [0.0]]
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, layers: Iterable[Tensor]) -> None:
        """Walk one block of rows.

        Raises:
            ValueError: as :func:`transport_distances`, or another number of layers than before.
        """
        part = transport_distances(layers).cpu()
        if self._parts and part.shape[1] != self._parts[0].shape[1]:
            raise ValueError(f"expected {self._parts[0].shape[1] + 1} layers as before; found {part.shape[1] + 1}")
        self._parts.append(part)

    def freeze(self) -> Tensor:
        """Distances float64 ``[rows, L − 1]`` on the CPU, in the order of the updates.

        Raises:
            ValueError: nothing has been walked yet, so L is unknown.
        """
        if not self._parts:
            raise ValueError("expected at least one update before freeze(), found none")
        return torch.cat(self._parts)


def _walk(layers: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """:func:`transport_distances`, worked on in ``dtype``; None: float64 for float64 logits, else float32."""
    below: _Lens | None = None
    steps: list[Tensor] = []
    for logits in layers:
        if logits.dim() != 2 or logits.shape[1] < 1:
            raise ValueError(f"expected logits [n, V]; found {list(logits.shape)}")
        if not logits.is_floating_point():
            raise ValueError(f"expected floating-point logits; found {logits.dtype}")
        if below is not None and (logits.shape, logits.dtype) != (below.logits.shape, below.logits.dtype):
            raise ValueError(
                f"expected logits {list(below.logits.shape)} {below.logits.dtype} as of the layer below; found "
                f"{list(logits.shape)} {logits.dtype}"
            )
        logits = logits.detach()
        if logits.device.type == "mps":  # no float64 there
            logits = logits.cpu()
        dtype = dtype or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            below, distances = _step(below, logits, dtype)
        if distances is not None:
            steps.append(distances)
    if below is None:
        raise ValueError("expected the logits of at least one layer; found none")
    if not steps:
        return torch.empty(len(below.logits), 0, dtype=torch.float64, device=below.logits.device)
    return torch.stack(steps, dim=1)


def _step(below: _Lens | None, logits: Tensor, dtype: torch.dtype) -> tuple[_Lens, Tensor | None]:
    """The next layer's distributions, and how far they are from those before: float64 ``[n]``."""
    size = max(1, _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES_ELSEWHERE) // (dtype.itemsize * logits.shape[1]))
    space = torch.empty(3, min(size, len(logits)), logits.shape[1], dtype=dtype, device=logits.device)
    column = torch.empty(3, len(logits), 1, dtype=torch.float64, device=logits.device)
    now = _Lens(logits, column[0].to(dtype), column[1], column[2])
    distances = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for first in range(0, len(logits), size):
        rows = slice(first, min(first + size, len(logits)))
        root, other_root, spare = space[:, : rows.stop - first]
        lens = now.rows(rows)
        x = lens.wide()
        torch.amax(x, dim=-1, keepdim=True, out=lens.top)
        lens.norm.copy_(_norm(_root(x, lens.top, root), spare)[:, None])
        torch.add(lens.top.double(), lens.norm.log(), alpha=2.0, out=lens.log_norm)
        if below is not None:
            distances[rows] = _distance(below.rows(rows), lens, root, other_root, spare)
    return now, None if below is None else distances


def _distance(p: _Lens, q: _Lens, root_q: Tensor, root_p: Tensor, spare: Tensor) -> Tensor:
    """d of a chunk's rows, float64 ``[n]``.

    Args:
        root_q: q's roots times its norm; is overwritten.
        root_p, spare: to work in.
    """
    root_p = _root(p.wide(), p.top, root_p).mul_((q.norm / p.norm).to(root_p.dtype))
    scale = q.norm[:, 0]  # both roots are so many times too long
    gap = _norm(torch.sub(root_q, root_p, out=spare), spare) / scale
    distance = (4.0 * torch.asin(0.5 * gap)).clamp(max=math.pi)
    close = gap < _NEAR
    count = int(close.sum())
    if not count:
        return distance
    # Copying the rows that are close takes longer than computing some that are not, whose results are thrown away.
    near: slice | Tensor = slice(None) if 2 * count >= len(gap) else close.nonzero()[:, 0]
    p, q, root_p, root_q, close = p.rows(near), q.rows(near), root_p[near], root_q[near], close[near]
    if root_p.dtype == torch.float64:
        refined = _near(p, q, root_p / scale[near, None], root_q / scale[near, None], distance[near])
    else:
        refined = _near_single(p, q, root_p, root_q, spare[: len(root_p)], gap[near], close)
    distance[near] = torch.where(close, refined, distance[near])
    return distance


def _near(p: _Lens, q: _Lens, root_p: Tensor, root_q: Tensor, far: Tensor) -> Tensor:
    """d = 2·arctan(std_p(u)/mean_p(u)), u = √(q/p), in float64; ``far`` stands where that is 0/0 or overflows."""
    step = q.wide() - p.wide() - (q.log_norm - p.log_norm)
    distance = _angle(step, root_p)
    doubtful = (~distance.isfinite()).nonzero()[:, 0]
    if len(doubtful):
        # −inf on both sides: a token that is in neither distribution.
        roots = root_p[doubtful]
        step = step[doubtful].masked_fill_((roots == 0.0) & (root_q[doubtful] == 0.0), 0.0)
        careful = _angle(step, roots)
        distance[doubtful] = torch.where(careful.isfinite(), careful, far[doubtful])
    return distance


def _angle(step: Tensor, roots: Tensor) -> Tensor:
    """2·arctan(std/mean) of u = exp(½·step) under p = roots²: float64 [n]."""
    grown = torch.expm1(0.5 * step)
    mean = (roots.square() * grown).sum(dim=-1)
    # Centred before it is squared: what is common to all tokens may be larger than what differs.
    spread = (grown.sub_(mean[:, None]).mul_(roots)).square_().sum(dim=-1).sqrt()
    return 2.0 * torch.atan2(spread, 1.0 + mean)


def _near_single(
    p: _Lens, q: _Lens, root_p: Tensor, root_q: Tensor, step: Tensor, gap: Tensor, close: Tensor
) -> Tensor:
    """d = 4·arcsin(½‖(√p + √q)·tanh(¼·Δ)‖) in float32, where float32 is enough; else in float64.

    Args:
        root_p, root_q: times the norm of q; overwritten, as is ``step``.
        gap: ‖√p − √q‖ of the rows, nearly the norm wanted.
        close: rows whose distance will be used.
    """
    shift = q.log_norm - p.log_norm
    if bool((close & (shift[:, 0].abs() > _SHIFT * gap)).any()):
        # A shift common to all tokens is large against what differs: the difference of two float32 is exact in float64.
        step.copy_(q.logits.double().sub_(p.logits).sub_(shift))
        step.mul_(0.25)
    else:
        torch.sub(q.wide(), p.wide(), out=step)
        torch.add((-0.25 * shift).float(), step, alpha=0.25, out=step)
    step.tanh_().mul_(root_q.add_(root_p))
    distance = 4.0 * torch.asin(0.5 * _norm(step, step) / q.norm[:, 0])
    spread = torch.minimum(p.norm, q.norm)[:, 0] >= 1.0 + _PEAKED
    enough = distance.isfinite() & (gap > _TINY) & spread
    again = (close & ~enough).nonzero()[:, 0]
    if len(again):
        distance[again] = fisher_rao_distance(p.logits[again], q.logits[again])
    return distance


def _root(x: Tensor, top: Tensor, space: Tensor) -> Tensor:
    """exp(½(x − top)), in ``space``: √p up to a factor of the row."""
    return torch.add(-0.5 * top, x, alpha=0.5, out=space).exp_()  # halving is exact


def _norm(rows: Tensor, space: Tensor) -> Tensor:
    """Euclidean norms of rows, float64 [n]. (Summed in pairs: ``vector_norm`` loses ten times as much in float32.)"""
    return torch.mul(rows, rows, out=space).sum(dim=-1).double().sqrt()
