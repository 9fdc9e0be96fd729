"""The updates that planting is made of: a step of wanted size along a direction, and noise that prefers nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from align_audit.lab.planting.parts import Part


def size_step(
    shift_at: Callable[[float], float], wanted: float, first: float, tolerance: float = 0.05
) -> tuple[float, float]:
    """The step t > 0 at which ``shift_at(t)`` is ``wanted``, to ``tolerance`` of it, by secants from 0 and ``first``.

    Returns:
        The step, and the shift there.

    Raises:
        ValueError: no such step was found, as where the margin stops rising along the direction.

    Example:
        >>> size_step(lambda t: 2 * t, wanted=3.0, first=1.0)
        (1.5, 3.0)
    """
    low, high = (0.0, 0.0), (float("inf"), float("inf"))
    step, seen = first, []
    for _ in range(12):
        reached = shift_at(step)
        seen.append((step, reached))
        if abs(reached - wanted) <= tolerance * abs(wanted):
            return step, reached
        if reached < low[1] and step > low[0]:
            break  # past the top
        if reached < wanted:
            low = (step, reached)
        else:
            high = (step, reached)
        if high[0] == float("inf"):
            # Not far enough yet: as far as the slope so far says, within reason.
            slope = reached / step
            step *= min(max(wanted / (slope * step), 1.2), 3.0) if slope > 0 else 3.0
        else:
            # Between the two; never closer to either than a tenth of the way, so that it ends.
            share = (wanted - low[1]) / (high[1] - low[1])
            step = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
    tried = ", ".join(f"{reached:.3g} at {step:.3g}" for step, reached in seen[-4:])
    raise ValueError(
        f"no step along this direction shifts the mean margin by {wanted:.3g} nats (lately: {tried}); "
        "ask for a smaller shift, or for more layers"
    )


def whitening(second: Tensor, ridge: float = 1e-2) -> Tensor:
    """C^{−1/2} [d, d] of second moments C [d, d], float64, with ``ridge`` times the mean eigenvalue added to each.

    Example:
        >>> whitening(torch.tensor([[4.0]]), ridge=0.0).item()
        0.5
    """
    values, vectors = torch.linalg.eigh(second)
    root: Tensor = (vectors / (values.clamp_min(0.0) + ridge * values.mean()).sqrt()) @ vectors.T
    return root


def norm(tensors: Sequence[Tensor]) -> float:
    """√ of the sum of all squares, in float64."""
    return float(np.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors)))


def relative_updates(
    parts: Sequence[Part], weights: Mapping[str, Tensor], base_weights: Mapping[str, Tensor]
) -> list[float]:
    """‖ΔW‖/‖W‖ of each part, W the weights of the base."""
    return [
        norm([new - old for new, old in zip(part.views(weights), part.views(base_weights), strict=True)])
        / norm(part.views(base_weights))
        for part in parts
    ]


def noise_update(
    part: Part,
    weights: Mapping[str, Tensor],
    share: float,
    seed: Sequence[int],
    gradient: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """A random update of ``part``, one tensor a slice, whose norm is ``share`` of the part's own.

    Every slice is moved in proportion to its own norm; where ``gradient`` is given, the update is then projected
    orthogonal to the part's gradient (as one vector), so that to first order the margin stays.
    """
    generator = np.random.default_rng(list(seed))
    views = part.views(weights)
    noise = []
    for weight in views:
        draw = torch.from_numpy(generator.standard_normal(tuple(weight.shape))).to(weight.device)
        noise.append(draw * (norm([weight]) / norm([draw])))
    if gradient is not None:
        slope = [tensor.double() for tensor in part.views(gradient)]
        along = sum(float((n * g).sum()) for n, g in zip(noise, slope, strict=True))
        square = norm(slope) ** 2
        if square > 0:
            noise = [n - (along / square) * g for n, g in zip(noise, slope, strict=True)]
    size = norm(noise)
    scale = share * norm(views) / size if size > 0 else 0.0
    return [(scale * n).to(weight.dtype) for n, weight in zip(noise, views, strict=True)]


@torch.no_grad()
def add_update(weights: Mapping[str, Tensor], part: Part, update: Sequence[Tensor], scale: float = 1.0) -> None:
    """Adds ``scale`` times the update to the part's slices of ``weights``, in place."""
    for view, change in zip(part.views(weights), update, strict=True):
        view.add_(change, alpha=scale)
