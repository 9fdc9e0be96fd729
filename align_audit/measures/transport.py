"""Transport: the Fisher–Rao distance between the logit-lens distributions of neighbouring layers (METHODS §5).

Source: SPINAL (arXiv 2601.06238).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Elements of one float64 working tensor; rows are taken in chunks of at most this many logits."""


def fisher_rao_distance(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Fisher–Rao distance between softmax(logits_p) and softmax(logits_q), row by row.

    d(p, q) = 2·arccos BC(p, q) = 4·arcsin(½·‖√p − √q‖₂), with BC(p, q) = Σ_v √(p_v·q_v).

    The second form is used, in float64. Where the logits of a row are close, √p − √q is built from their differences
    (√q·expm1(½·Δ log-prob)), so that the *relative* error stays small however close the distributions are.

    Args:
        logits_p, logits_q: ``[n, V]``, any floating dtypes, same device; −inf means probability 0.

    Returns:
        float64 ``[n]``, radians in [0, π]; exactly 0 where the logits are identical, π where the supports are disjoint.
        NaN for a row that is no distribution: NaN, +inf, or nothing but −inf. On the device of the logits, or on the
        CPU where that device has no float64.

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
    rows = max(1, _CHUNK // logits_p.shape[1])
    with torch.no_grad():
        parts = [_distance(p, q) for p, q in zip(logits_p.split(rows), logits_q.split(rows), strict=True)]
    return torch.cat(parts)


def _distance(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    if logits_p.device.type == "mps":  # no float64 there
        logits_p, logits_q = logits_p.cpu(), logits_q.cpu()
    p, q = logits_p.double(), logits_q.double()
    log_q = torch.log_softmax(q, dim=-1)
    half = torch.exp(0.5 * log_q)

    # log p − log q up to a constant, which is then fixed by Σp = 1: Σ q·exp(delta) = 1.
    delta = p - q
    delta = delta - delta.gather(-1, q.argmax(dim=-1, keepdim=True))
    delta = delta.masked_fill((p == -math.inf) & (q == -math.inf), 0.0)
    close = delta.abs().amax(dim=-1) <= 1.0
    delta = delta - torch.log1p((half.square() * torch.expm1(delta)).sum(dim=-1, keepdim=True))
    near = (half * torch.expm1(0.5 * delta)).norm(dim=-1)

    far = (torch.exp(0.5 * torch.log_softmax(p, dim=-1)) - half).norm(dim=-1)
    return (4.0 * torch.asin(0.5 * torch.where(close, near, far))).clamp(max=math.pi)
