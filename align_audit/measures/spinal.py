"""SPINAL's scores, made of contraction α_ℓ, transport 𝓛_ℓ and gradient norms per layer (METHODS §5).

Source: SPINAL (arXiv 2601.06238) for the parts; their weights and normalizations are not in its abstract and are fixed
in METHODS. Notation: π the policy, ρ the reference, L layers, S the terminal block, ℓ 0-based; α has L values and 𝓛 has
L − 1 (from layer ℓ to layer ℓ + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from align_audit.measures.interval import Value

Array = np.ndarray


def terminal_layers(L: int, fraction: float | None = None) -> tuple[int, ...]:
    """The terminal block S: the last max(⌈L/3⌉, min(4, L)) layers, or the last ⌈fraction·L⌉.

    Args:
        L: number of decoder layers.
        fraction: a depth fraction in (0, 1] instead of the default; at least one layer is taken.

    Returns:
        0-based layers, ascending, the last one L − 1.

    Raises:
        ValueError: ``L`` below 1 or ``fraction`` outside (0, 1].

    Example:
        SPINAL's layers 21 to 30 of 30, counted from 0.

        >>> terminal_layers(30)
        (20, 21, 22, 23, 24, 25, 26, 27, 28, 29)
    """
    if L < 1:
        raise ValueError(f"expected at least 1 layer, found L={L}")
    if fraction is None:
        size = max(-(-L // 3), min(4, L))
    elif 0.0 < fraction <= 1.0:
        # The decimal that was written, not its binary neighbour: 0.07 of 100 layers is 7, not 8.
        size = math.ceil(Fraction(str(fraction)) * L)
    else:
        raise ValueError(f"expected a depth fraction in (0, 1], found {fraction}")
    return tuple(range(L - size, L))


def delta_align(
    alpha_pi: Array, alpha_rho: Array, transport_pi: Array, transport_rho: Array, terminal: Sequence[int]
) -> Value:
    """δ = mean_{ℓ∈S} (α^π_ℓ − α^ρ_ℓ) − mean_{ℓ∈S, ℓ<L−1} (𝓛^π_ℓ − 𝓛^ρ_ℓ): contraction gained less transport gained.

    Args:
        alpha_pi, alpha_rho: ``[L]``.
        transport_pi, transport_rho: ``[L − 1]``, radians.
        terminal: S, from :func:`terminal_layers`.

    Returns:
        Any real number; exactly 0 for identical models. NaN with a reason where a value over S is NaN, or where no
        layer of S lies below the last.

    Raises:
        ValueError: wrong shapes, or ``terminal`` is not a run of layers.

    Example:
        >>> delta_align(np.array([1.0, 1.5]), np.array([1.0, 1.0]), np.array([0.2]), np.array([0.3]), (0, 1)).value
        0.35
    """
    alpha_pi, transport_pi = _path(alpha_pi, transport_pi, "policy")
    alpha_rho, transport_rho = _path(alpha_rho, transport_rho, "reference")
    block, inner = _block(terminal, len(alpha_pi), len(alpha_rho))
    if not inner:
        return Value.unknown("the terminal block has no layer below the last, hence no transport")
    for name, values, layers in (
        ("contraction", alpha_pi - alpha_rho, block),
        ("transport", transport_pi - transport_rho, inner),
    ):
        missing = [layer for layer in layers if not math.isfinite(values[layer])]
        if missing:
            return Value.unknown(f"{name} is unknown at layers {missing} of the terminal block")
    return Value(float((alpha_pi - alpha_rho)[block].mean() - (transport_pi - transport_rho)[inner].mean()))


def coherence(alpha: Array, transport: Array, alpha_ref: Array, transport_ref: Array, terminal: Sequence[int]) -> Value:
    """Straightness of the terminal path: 1 / (1 + κ), κ the mean norm of its second differences.

    The path is (α_ℓ / s_α, 𝓛_ℓ / s_𝓛) over ℓ∈S, ℓ<L−1; s_α and s_𝓛 are the population standard deviations of the
    reference's α over its L layers and of its 𝓛 over its L − 1.

    Args:
        alpha, alpha_ref: ``[L]``. For the reference's own coherence give its values twice.
        transport, transport_ref: ``[L − 1]``, radians.
        terminal: S, from :func:`terminal_layers`.

    Returns:
        In (0, 1]; 1 for a path that advances by equal steps. NaN with a reason: fewer than three points, an unknown
        value on the path or among the reference's, or a standard deviation of zero.

    Raises:
        ValueError: wrong shapes, or ``terminal`` is not a run of layers.

    Example:
        >>> line, bend = np.arange(5.0), np.array([0.0, 1.0, 2.0, 2.0])
        >>> round(coherence(line, line[:4], line, line[:4], range(1, 5)).value, 3)
        1.0
        >>> round(coherence(line, bend, line, line[:4], range(1, 5)).value, 3)
        0.528
    """
    alpha, transport = _path(alpha, transport, "model")
    alpha_ref, transport_ref = _path(alpha_ref, transport_ref, "reference")
    _, inner = _block(terminal, len(alpha), len(alpha_ref))
    if len(inner) < 3:
        return Value.unknown(
            f"a second difference needs 3 points; the terminal block has {len(inner)} layers below the last"
        )
    points = []
    for name, values, reference in (("contraction", alpha, alpha_ref), ("transport", transport, transport_ref)):
        missing = np.flatnonzero(~np.isfinite(reference)).tolist()
        if missing:
            return Value.unknown(f"the reference's {name} is unknown at layers {missing}, hence its spread too")
        missing = [layer for layer in inner if not math.isfinite(values[layer])]
        if missing:
            return Value.unknown(f"{name} is unknown at layers {missing} of the terminal block")
        spread = float(reference.std())
        if spread <= 8 * np.finfo(np.float64).eps * float(np.abs(reference).max()):
            return Value.unknown(f"the reference's {name} is the same at every layer, so it gives no scale")
        points.append(values[inner] / spread)
    turns = np.diff(np.stack(points, axis=-1), n=2, axis=0)
    return Value(float(1.0 / (1.0 + np.linalg.norm(turns, axis=-1).mean())))


def gradient_share(norms: Array, terminal: Sequence[int]) -> Array:
    """Share of each pair's activation gradients that falls on the terminal block: Σ_{ℓ∈S} g_{iℓ} / Σ_ℓ g_{iℓ}.

    Args:
        norms: g, ``[N, L]``, g_{iℓ} = ‖∂m_i/∂h_ℓ‖_F ≥ 0, in nats per unit of activation.
        terminal: S, from :func:`terminal_layers`.

    Returns:
        float64 ``[N]`` in [0, 1]; NaN for a pair with a norm that is not finite or whose norms are all zero. The mean
        over pairs is ``gradient_concentration``.

    Raises:
        ValueError: wrong shape, a negative norm, or ``terminal`` is not a run of layers.

    Example:
        >>> gradient_share(np.array([[1.0, 1.0, 2.0]]), (1, 2)).tolist()
        [0.75]
    """
    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 2:
        raise ValueError(f"expected gradient norms of shape [N, L]; found shape {list(norms.shape)}")
    if (norms < 0).any():
        raise ValueError(f"expected norms of at least 0; found {float(np.nanmin(norms))}")
    block, _ = _block(terminal, norms.shape[1], norms.shape[1])
    largest = norms.max(axis=1, keepdims=True)
    usable = np.isfinite(largest) & (largest > 0)
    scaled = np.divide(norms, largest, out=np.full_like(norms, np.nan), where=usable)
    shares: Array = scaled[:, block].sum(axis=1) / scaled.sum(axis=1)
    return shares


def spinal_score(
    delta: float, coherence: float, concentration: float, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Value:
    """a·delta_align + b·coherence + c·gradient_concentration: a summary of three parts, not evidence.

    Args:
        weights: (a, b, c). A part of weight 0 does not enter, even where it is unknown.

    Returns:
        Any real number; NaN with a reason where a part that enters is unknown.

    Raises:
        ValueError: not three finite weights.

    Example:
        >>> spinal_score(0.25, 0.5, 0.5, weights=(1.0, 1.0, 0.5)).value
        1.0
    """
    if len(weights) != 3 or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"expected three finite weights, found {weights}")
    parts = {"delta_align": delta, "coherence": coherence, "gradient_concentration": concentration}
    entering = [(name, part, weight) for (name, part), weight in zip(parts.items(), weights, strict=True) if weight]
    unknown = [name for name, part, _ in entering if not math.isfinite(part)]
    if unknown:
        return Value.unknown(f"unknown: {', '.join(unknown)}")
    return Value(float(sum(weight * part for _, part, weight in entering)))


def _path(alpha: Array, transport: Array, whose: str) -> tuple[Array, Array]:
    alpha, transport = np.asarray(alpha, dtype=np.float64), np.asarray(transport, dtype=np.float64)
    if alpha.ndim != 1 or transport.shape != (len(alpha) - 1,):
        raise ValueError(
            f"{whose}: expected contraction [L] and transport [L - 1]; "
            f"found {list(alpha.shape)} and {list(transport.shape)}"
        )
    return alpha, transport


def _block(terminal: Sequence[int], L: int, L_reference: int) -> tuple[list[int], list[int]]:
    """S, and its layers below the last."""
    if L_reference != L:
        raise ValueError(f"expected as many layers in both models; found {L} and {L_reference}")
    block = list(terminal)
    if not block or block != list(range(block[0], block[-1] + 1)) or block[0] < 0 or block[-1] >= L:
        raise ValueError(f"expected a terminal block of successive layers below {L}, found {block}")
    return block, [layer for layer in block if layer < L - 1]
