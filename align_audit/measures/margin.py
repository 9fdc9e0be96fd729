"""Preference margins and what else is read from next-token logits (METHODS, notation and §6; arXiv 2510.16167 §3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenReadout:
    """What the model says at n prediction positions: float64 [n] each.

    ``correct`` is 1 where the target is the argmax, else 0; NaN where the logits are.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor


def token_logp(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, float64 [n], from logits [n, V] (float64 stays float64; others compute in float32).

    Example:
        >>> token_logp(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item()  # log ½
        -0.6931471824645996
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = wide.gather(-1, target[:, None])[:, 0]
    return (chosen - torch.logsumexp(wide, dim=-1)).double()


def token_readout(logits: torch.Tensor, target: torch.Tensor) -> TokenReadout:
    """Log-probability of the targets, entropy in nats, and next-token correctness, from logits [n, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide, dim=-1)
    # A token of probability 0 adds nothing to the entropy; 0·(−inf) would make it NaN.
    plogp = torch.where(logp > -torch.inf, logp.exp() * logp, torch.zeros_like(logp))
    # NaN logits compare false everywhere; the entropy must not come out as a clean 0.
    plogp = torch.where(logp.isnan(), logp, plogp)
    return TokenReadout(
        logp=token_logp(logits, target),
        entropy=-plogp.sum(-1).double(),
        correct=torch.where(logp.isnan().any(-1), torch.nan, (wide.argmax(-1) == target).double()),
    )


def kl_divergence(policy_logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ ρ) of next-token distributions, nats per token: float64 [n] from logits [n, V]. In [0, ∞).

    Example:
        >>> kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item()
        0.0
    """
    wide = policy_logits.dtype == torch.float64
    logp = torch.log_softmax(policy_logits if wide else policy_logits.float(), dim=-1)
    logq = torch.log_softmax(reference_logits if wide else reference_logits.float(), dim=-1)
    terms = torch.where(logp > -torch.inf, logp.exp() * (logp - logq), torch.zeros_like(logp))
    terms = torch.where(logp.isnan(), logp, terms)
    # Rounding may take a sum of nearly cancelling terms just below zero.
    return terms.double().sum(-1).clamp_min(0.0)


def sum_by_pair(values: torch.Tensor, pair: torch.Tensor, side: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Sum token values [P] per pair and side, in float64: [2, B]; row 0 is the chosen side."""
    sums = torch.zeros(2 * num_pairs, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, side * num_pairs + pair, values.double()).view(2, num_pairs)


def preference_margin(logp: torch.Tensor, pair: torch.Tensor, side: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """m = log p(y⁺|x) − log p(y⁻|x), nats, float64 [B], from token log-probabilities [P]."""
    chosen, rejected = sum_by_pair(logp, pair, side, num_pairs)
    return chosen - rejected
