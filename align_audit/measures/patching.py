"""Layer-wise activation patching: how a stream is patched, and what per-pair effects say.

METHODS §1, §2; arXiv 2510.16167 §3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch

from align_audit.measures.interval import Interval
from align_audit.measures.significance import benjamini_hochberg, mean_p_values
from align_audit.measures.statistics import Method, mean_interval, mean_intervals, ratio_interval, statistic_intervals


def patched(base: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``base`` [R, T, d] with ``source`` where ``mask`` [R, T]; in the dtype of ``base``."""
    return torch.where(mask[..., None], source.to(base.dtype), base)


def noised(base: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """h_l(ρ) + u·‖h_l(π) − h_l(ρ)‖ per token where ``mask``: the shift's length in a random direction. [R, T, d]."""
    distance = (source.to(base.dtype) - base).norm(dim=-1, keepdim=True)
    return patched(base, base + directions.to(base.dtype) * distance, mask)


class Options(TypedDict):
    """How intervals are made; see ``statistics.mean_intervals``."""

    resamples: int
    confidence: float
    method: Method
    seed: int
    groups: np.ndarray | None


@dataclass(frozen=True)
class PatchSummary:
    """Intervals of everything METHODS §1 reports; effects and transplants in nats, the rest shares."""

    effect: list[Interval]
    effect_p_adjusted: list[float]
    recovery: list[Interval]
    layer_gain: list[Interval]
    block_transplant: list[Interval]
    embedding_gain: Interval
    head_gain: Interval
    embedding_transplant: Interval
    head_transplant: Interval
    additivity: Interval
    peak_layer: int | None
    peak_reason: str | None


def summarize_patching(
    effects: np.ndarray,
    transplants: np.ndarray,
    shift: np.ndarray,
    *,
    resamples: int,
    confidence: float,
    method: Method,
    seed: int,
    groups: np.ndarray | None = None,
) -> PatchSummary:
    """From per-pair numbers to recovery, gains, additivity and the peak layer.

    recovery_l = Σ_i effect_il / Σ_i Δ_i; layer_gain_l = recovery_l − recovery_{l−1}; head_gain = 1 − recovery_{L−1};
    additivity = Σ (all transplants) / Σ_i Δ_i; peak_layer = argmax_l of mean block_transplant along the mean shift.

    Args:
        effects: [N, L + 1]; column 0 patches h_{−1}.
        transplants: [N, L + 2]; column 0 the embedding, 1 … L the blocks, L + 1 the head.
        shift: [N] margin shifts Δ_i.
        groups: [N], which pairs belong together; None: none do.
    """
    layers = effects.shape[1] - 1
    if transplants.shape != (effects.shape[0], layers + 2) or shift.shape != (effects.shape[0],):
        raise ValueError(
            f"expected effects [N, L+1], transplants [N, L+2], shift [N]; found {effects.shape}, {transplants.shape}, "
            f"{shift.shape}"
        )
    options: Options = {
        "resamples": resamples, "confidence": confidence, "method": method, "seed": seed, "groups": groups,
    }  # fmt: skip
    means = mean_intervals(effects[:, 1:], **options)
    moved = mean_intervals(transplants, **options)
    shares = _shares(effects, transplants, shift, options)
    blocks = np.array([interval.mean for interval in moved[1:-1]])
    peak, reason = peak_layer(blocks, float(shift.mean()))
    return PatchSummary(
        effect=means,
        effect_p_adjusted=[
            float(p) for p in benjamini_hochberg(mean_p_values(effects[:, 1:], resamples, seed, groups))
        ],
        recovery=shares[1 : layers + 1],
        layer_gain=shares[layers + 1 : 2 * layers + 1],
        block_transplant=moved[1:-1],
        embedding_gain=shares[0],
        head_gain=shares[2 * layers + 1],
        embedding_transplant=moved[0],
        head_transplant=moved[-1],
        additivity=shares[2 * layers + 2],
        peak_layer=peak,
        peak_reason=reason,
    )


def _shares(effects: np.ndarray, transplants: np.ndarray, shift: np.ndarray, options: Options) -> list[Interval]:
    """Intervals of: recovery_{−1 … L−1}, layer_gain_{0 … L−1}, head_gain, additivity; 2L + 3 of them."""
    layers = effects.shape[1] - 1
    count = 2 * layers + 3
    mean_shift = mean_interval(shift, **options)
    if np.isnan(mean_shift.mean) or np.isnan(mean_shift.low):
        return [Interval.unknown(f"the mean margin shift is not known: {mean_shift.reason}")] * count
    if mean_shift.low <= 0.0 <= mean_shift.high:
        reason = (
            f"the interval of the mean margin shift, [{mean_shift.low:.3g}, {mean_shift.high:.3g}] nats, includes 0: "
            "there is no shift to take shares of"
        )
        return [Interval.unknown(reason)] * count

    def shares(means: np.ndarray) -> np.ndarray:
        denominator = means[..., -1:]
        recovery = means[..., : layers + 1] / denominator
        gain = np.diff(recovery, axis=-1)
        additivity = means[..., layers + 1 : -1].sum(-1, keepdims=True) / denominator
        return np.concatenate([recovery, gain, 1.0 - recovery[..., -1:], additivity], axis=-1)

    return statistic_intervals(
        np.concatenate([effects, transplants, shift[:, None]], axis=1),
        shares,
        **options,
    )


def gain_of(effects: np.ndarray, shift: np.ndarray, layers: Sequence[int], options: Options) -> Interval:
    """Share of the margin shift gained at ``layers``: Σ_{l ∈ layers} layer_gain_l, a ratio of sums with its interval.

    Args:
        effects: [N, L + 1]; column 0 patches h_{−1}.
        shift: [N] margin shifts Δ_i, whose mean is known not to be 0.
    """
    gained = sum(effects[:, layer + 1] - effects[:, layer] for layer in layers)
    return ratio_interval(gained, shift, **options, denominator_name="margin shift")


_SPOKEN_OF = {
    "layer": ("block transplant", "block", "block transplants"),
    "unit": ("mean sufficiency of a unit", "unit", "units"),
}
"""What a peak's reason calls one mean, what it is of, and several of them."""


def peak_layer(
    block_transplants: np.ndarray, shift: float, part: Literal["layer", "unit"] = "layer"
) -> tuple[int | None, str | None]:
    """The layer whose block alone moves the margin furthest in the direction of the mean shift; None and the reason if none.

    Args:
        block_transplants: [L], means over pairs, nats; of units of a site what their patch does.
        shift: the mean margin shift, nats.
        part: what the reason speaks of.

    Example:
        >>> peak_layer(np.array([0.0, -2.0, 0.5]), shift=-1.0)
        (1, None)
    """
    what, alone, several = _SPOKEN_OF[part]
    if not np.isfinite(block_transplants).all() or not np.isfinite(shift):
        return None, f"a {what} or the mean margin shift is not finite"
    along = np.sign(shift) * block_transplants
    if shift == 0.0 and block_transplants.any():
        return None, "the mean margin shift is 0: it has no direction"
    if not along.any() or (len(along) > 1 and np.all(along == along[0])):
        return None, f"every {what} is {block_transplants[0]:.3g}: no {part} stands out"
    if not along.max() > 0.0:
        return None, f"no {alone} alone moves the margin in the direction of the mean shift, {shift:.3g} nats"
    if (along == along.max()).sum() > 1:
        return None, f"several {several} share the largest value"
    return int(np.argmax(along)), None
