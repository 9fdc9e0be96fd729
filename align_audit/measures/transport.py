"""Transport: the Fisher–Rao distance between the logit-lens distributions of neighbouring layers (METHODS §5).

Source: SPINAL (arXiv 2601.06238). Three ways in, one arithmetic: :func:`fisher_rao_distance` of two tensors, in float64;
:func:`transport_distances` of a walk up the layers, which keeps what one layer leaves to the next and works in the
precision of the logits; :class:`TransportAccumulator`, which gathers such walks block by block.

The arithmetic. With r = √p (‖r‖ = 1), BC(p, q) = cos(d/2) is the cosine between r_p and r_q. Two forms, chosen per row:

- far, ‖r_p − r_q‖ ≥ ½:  d = 4·arcsin(½‖r_p − r_q‖), from two roots that are there anyway;
- near:  tan(d/2) = std_p(u) / mean_p(u), u = √(q/p) up to a constant factor. (BC = E_p[u], E_p[u²] = 1 for the
  normalized u, so sin²(d/2) = 1 − BC² is the variance of u.) As u − 1 = expm1(½·Δ log-prob) comes from differences of
  logits, the *relative* error stays small however close the distributions are. Rounding in the normalizers shifts all
  Δ by a constant, and a constant has no variance.
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
cache; on an accelerator every pass is a launch, and there are two dozen a chunk."""

_NEAR = 0.5
"""Rows with ‖√p − √q‖ below this take the near form. The roots are right to 2 or 3 roundings in norm (2·10⁻⁷ in float32),
so the far form's relative error is below 10⁻⁶ from here on, whatever way the rounding errors point."""

_LARGEST_STEP = math.expm1(4.0)
_SHIFT = 8.0
_TINY = 1e-4
_PEAKED = 1e-5
"""In float32 the near form is taken where its rounding stays below 10⁻⁶ of the distance: no log-probability grows by
more than 8; ‖√p − √q‖ is above 10⁻⁴, so that a normalizer's rounding is small against it; neither distribution is a
point mass within 2·10⁻⁵, because then a distance is made of tokens so improbable that the rounding of their logits
shows. Other rows are computed in float64. Where the normalizers differ by more than 8 times ‖√p − √q‖, the differences
of logits alone are taken in float64."""


@dataclass(frozen=True, eq=False)
class LensState:
    """What a layer's distributions leave to the next layer's distance: n rows, V tokens.

    Attributes:
        logits: ``[n, V]`` as they came (not copied).
        roots: ``[n, V]``, √p, in the working dtype.
        log_norm: float64 ``[n, 1]``, log Σ_v exp(logit_v).
        peaked: bool ``[n]``, nearly all probability lies on one token.
    """

    logits: Tensor
    roots: Tensor
    log_norm: Tensor
    peaked: Tensor


def lens_state(logits: Tensor, dtype: torch.dtype | None = None, *, roots: Tensor | None = None) -> LensState:
    """Roots and normalizers of softmax(logits), row by row: one exponential an entry.

    Args:
        logits: ``[n, V]`` floating; −inf means probability 0. A row that is no distribution (NaN, +inf, or nothing but
            −inf) becomes NaN. Must not be written to while the state is in use.
        dtype: to work in, float32 or float64. None: float64 for float64 logits, else float32.
        roots: ``[n, V]`` of that dtype, to be overwritten with the state's: memory fresh from the system costs more than
            what is written into it.

    Returns:
        The state, on the device of the logits.

    Raises:
        ValueError: not ``[n, V]`` with V ≥ 1, or not floating.

    Example:
        >>> lens_state(torch.tensor([[0.0, 0.0, 0.0, 0.0]])).roots.tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """
    _check(logits)
    dtype = dtype or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        logits = logits.detach()
        if roots is None:
            roots = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        scratch = torch.empty_like(roots[: _rows(roots, dtype)])
        log_norm = torch.empty(len(logits), 1, dtype=torch.float64, device=logits.device)
        peaked = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
        for rows in _slices(logits, dtype):
            x, root = logits[rows].to(dtype), roots[rows]
            top = x.amax(dim=-1, keepdim=True)
            torch.add(-0.5 * top, x, alpha=0.5, out=root).exp_()  # halving is exact
            norm = _norm(root, scratch[: len(root)])[:, None]
            root.mul_(norm.reciprocal().to(dtype))
            log_norm[rows] = top.double() + 2.0 * norm.log()
            peaked[rows] = norm[:, 0] < 1.0 + _PEAKED
    return LensState(logits, roots, log_norm, peaked)


def lens_distance(p: LensState, q: LensState) -> Tensor:
    """Fisher–Rao distance between the distributions of two states, row by row, in their working dtype.

    Args:
        p, q: states of one shape, working dtype and device.

    Returns:
        float64 ``[n]``, radians in [0, π]; exactly 0 where the logits are identical. NaN where a row is no distribution.
        Relative error: a few 2⁻⁵² in float64; in float32 below 10⁻⁶ of the value in exact arithmetic on the same logits
        at every distance (``test_float32_walk_meets_one_millionth``; largest error seen there: 6·10⁻⁷).

    Raises:
        ValueError: the states do not fit each other.

    Example:
        >>> p, q = lens_state(torch.tensor([[0.0, 0.0]])), lens_state(torch.tensor([[0.0, -torch.inf]]))
        >>> round(lens_distance(p, q).item(), 6)
        1.570796
    """
    if p.roots.shape != q.roots.shape or p.roots.dtype != q.roots.dtype:
        raise ValueError(
            f"expected two states of one shape and dtype; found {list(p.roots.shape)} {p.roots.dtype} and "
            f"{list(q.roots.shape)} {q.roots.dtype}"
        )
    dtype = p.roots.dtype
    out = torch.empty(len(p.roots), dtype=torch.float64, device=p.roots.device)
    with torch.no_grad():
        scratch = p.roots.new_empty(2, min(len(p.roots), _rows(p.roots, dtype)), p.roots.shape[1])
        for rows in _slices(p.roots, dtype):
            space = scratch[:, : rows.stop - rows.start]
            gap = _norm(torch.sub(q.roots[rows], p.roots[rows], out=space[0]), space[1])
            out[rows] = (4.0 * torch.asin(0.5 * gap)).clamp(max=math.pi)
            where = (gap < _NEAR).nonzero()[:, 0]
            if not len(where):
                continue
            near: slice | Tensor = rows if len(where) == len(gap) else where + rows.start
            ours, theirs = _take(p, near), _take(q, near)
            if dtype == torch.float64:
                out[near] = _near(ours, theirs, out[near])
            else:
                out[near] = _near_single(ours, theirs, gap[where], space[:, : len(where)])
    return out


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
    if logits_p.device.type == "mps":  # no float64 there
        logits_p, logits_q = logits_p.cpu(), logits_q.cpu()
    parts = [
        lens_distance(lens_state(p, torch.float64), lens_state(q, torch.float64))
        for p, q in zip(_chunks(logits_p, torch.float64), _chunks(logits_q, torch.float64), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=logits_p.device)


def transport_distances(layers: Iterable[Tensor]) -> Tensor:
    """𝓛 of every row and step of one walk up the layers: distance of p_ℓ and p_{ℓ+1}, ℓ = 0 … L−2.

    The logits are taken from the iterable one layer at a time and two layers are held, so give a generator that makes
    them: memory is 5 tensors ``[n, V]`` of the working dtype, whatever L.

    Args:
        layers: L ≥ 1 tensors ``[n, V]``, bottom to top, floating, of one shape; float64 logits are worked on in
            float64, others in float32 (see :func:`lens_distance` for the error).

    Returns:
        float64 ``[n, L − 1]``, radians in [0, π], NaN where a layer's row is no distribution, on the logits' device (on
        the CPU where that has no float64).

    Raises:
        ValueError: no layer, or layers that do not fit each other.

    Example:
        >>> layers = [torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf]])]
        >>> [round(distance, 6) for distance in transport_distances(layers)[0].tolist()]
        [1.570796, 0.0]
    """
    before: LensState | None = None
    free: Tensor | None = None
    steps: list[Tensor] = []
    shape: torch.Size | None = None
    for logits in layers:
        _check(logits)
        if shape is not None and logits.shape != shape:
            raise ValueError(f"expected logits {list(shape)} as of the layer below; found {list(logits.shape)}")
        shape = logits.shape
        state = lens_state(logits.cpu() if logits.device.type == "mps" else logits, roots=free)
        if before is not None:
            steps.append(lens_distance(before, state))
            free = before.roots
        before = state
    if before is None:
        raise ValueError("expected the logits of at least one layer; found none")
    if not steps:
        return torch.empty(len(before.roots), 0, dtype=torch.float64, device=before.roots.device)
    return torch.stack(steps, dim=1)


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


def _near(p: LensState, q: LensState, far: Tensor) -> Tensor:
    """d = 2·arctan(std_p(u)/mean_p(u)), u = √(q/p), in float64; ``far`` stands where that is 0/0 or overflows."""
    step = q.logits.double() - p.logits.double() - (q.log_norm - p.log_norm)
    distance = _angle(step, p.roots)
    doubtful = (~distance.isfinite()).nonzero()[:, 0]
    if len(doubtful):
        # −inf on both sides: a token that is in neither distribution.
        roots = p.roots[doubtful]
        step = step[doubtful].masked_fill_((roots == 0.0) & (q.roots[doubtful] == 0.0), 0.0)
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


def _near_single(p: LensState, q: LensState, gap: Tensor, space: Tensor) -> Tensor:
    """The same in float32, for rows where float32 is enough; the others are computed in float64.

    Args:
        gap: ‖√p − √q‖ of the rows, nearly the standard deviation wanted.
        space: two working tensors of the rows' shape, ``[2, n, V]``.
    """
    step, weighted = space
    shift = q.log_norm - p.log_norm
    if bool((shift[:, 0].abs() > _SHIFT * gap).any()):
        # A shift common to all tokens is large against what differs: the difference of two float32 is exact in float64.
        step.copy_(q.logits.double().sub_(p.logits).sub_(shift))
        step.mul_(0.5)
    else:
        torch.sub(q.logits, p.logits, out=step)
        torch.add((-0.5 * shift).float(), step, alpha=0.5, out=step)
    grown = step.expm1_()
    largest = grown.amax(dim=-1)
    grown.mul_(p.roots)
    mean = torch.mul(grown, p.roots, out=weighted).sum(dim=-1).double()
    square = torch.mul(grown, grown, out=weighted).sum(dim=-1).double()
    # The mean is small against the spread (about its square), so this difference cancels nothing.
    distance = 2.0 * torch.atan2((square - mean.square()).clamp_min(0.0).sqrt(), 1.0 + mean)
    enough = distance.isfinite() & (largest <= _LARGEST_STEP) & (gap > _TINY) & ~(p.peaked | q.peaked)
    again = (~enough).nonzero()[:, 0]
    if len(again):
        distance[again] = fisher_rao_distance(p.logits[again], q.logits[again])
    return distance


def _norm(rows: Tensor, space: Tensor) -> Tensor:
    """Euclidean norms of rows, float64 [n]. (Summed in pairs: ``vector_norm`` loses ten times as much in float32.)"""
    return torch.mul(rows, rows, out=space).sum(dim=-1).double().sqrt()


def _take(state: LensState, rows: slice | Tensor) -> LensState:
    return LensState(state.logits[rows], state.roots[rows], state.log_norm[rows], state.peaked[rows])


def _rows(like: Tensor, dtype: torch.dtype) -> int:
    size = _CHUNK_BYTES.get(like.device.type, _CHUNK_BYTES_ELSEWHERE)
    return max(1, size // (dtype.itemsize * like.shape[1]))


def _chunks(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor[rows] for rows in _slices(tensor, dtype)]


def _slices(like: Tensor, dtype: torch.dtype) -> list[slice]:
    size = _rows(like, dtype)
    return [slice(first, min(first + size, len(like))) for first in range(0, len(like), size)]


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"expected logits [n, V]; found {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits; found {logits.dtype}")
