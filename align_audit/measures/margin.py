"""Preference margins and what else is read from next-token logits (METHODS, notation and §6; arXiv 2510.16167 §3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from align_audit.measures.sums import sum_into

_CHUNK_BYTES = 2**21
"""Rows of logits are taken in chunks of this size on a CPU, so that the passes over a chunk meet it in the cache."""


@dataclass(frozen=True)
class TokenReadout:
    """What the model says at n prediction positions: [n] each, float64 but for the last.

    ``correct`` is 1 where the target is the argmax, else 0; NaN where the logits are. ``normalizer`` is log Σ_v exp(logit_v),
    in the working dtype.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    normalizer: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of all positions of the parts, one part after the other."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def at(self, rows: slice) -> Self:
        """Of some of the positions."""
        return type(self)(*(getattr(self, each.name)[rows] for each in fields(self)))

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return type(self)(*(getattr(self, each.name).to(device) for each in fields(self)))


def token_logp(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, float64 [n], from logits [n, V] (float64 stays float64; others compute in float32).

    Example:
        >>> token_logp(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item()  # log ½
        -0.6931471824645996
    """
    parts = []
    for rows in _chunks(logits):
        wide = _wide(logits[rows])
        parts.append((_at(wide, target[rows]) - torch.logsumexp(wide, dim=-1)).double())
    return torch.cat(parts)


def token_logp_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """∂ log p(target) / ∂ logits = 1{v = target} − p_v: [n, V] in the dtype of the logits [n, V].

    It is what autograd makes of :func:`token_logp`, in one tensor of that size in place of four.

    Example:
        >>> token_logp_gradient(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).tolist()
        [[-0.5, 0.5]]
    """
    gradient = torch.empty_like(logits)
    for rows in _chunks(logits):
        wide = _wide(logits[rows])
        place = target[rows, None]
        slope = (wide - torch.logsumexp(wide, dim=-1, keepdim=True)).exp_().neg_()
        gradient[rows] = slope.scatter_add_(-1, place, torch.ones_like(place, dtype=slope.dtype))
    return gradient


def token_readout(logits: torch.Tensor, target: torch.Tensor) -> TokenReadout:
    """Log-probability of the targets, entropy in nats, and next-token correctness, from logits [n, V]."""
    return TokenReadout.joined([_read(logits[rows], target[rows])[0] for rows in _chunks(logits)])


def kl_divergence(policy_logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ ρ) of next-token distributions, nats per token: float64 [n] from logits [n, V]. In [0, ∞).

    Example:
        >>> kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item()
        0.0
    """
    nowhere = torch.zeros(len(policy_logits), dtype=torch.long, device=policy_logits.device)
    return compare_readouts(policy_logits, reference_logits, nowhere)[2]


def compare_readouts(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    target: torch.Tensor,
    read_before: TokenReadout | None = None,
) -> tuple[TokenReadout, TokenReadout, torch.Tensor]:
    """:func:`token_readout` of both models and :func:`kl_divergence`, with each softmax computed once.

    Where one vocabulary is longer, the divergence is that of both distributions over the tokens they have in common.

    Args:
        read_before: the reference's readout, from when these logits and targets were read before.

    Example:
        >>> policy, reference, kl = compare_readouts(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
        >>> round(policy.entropy.item(), 6), kl.item()
        (0.693147, 0.0)
    """
    parts = [
        _compare(
            policy_logits[rows],
            reference_logits[rows],
            target[rows],
            None if read_before is None else read_before.at(rows),
        )
        for rows in _chunks(policy_logits, reference_logits)
    ]
    policy, reference, kl = zip(*parts, strict=True)
    return TokenReadout.joined(policy), TokenReadout.joined(reference), torch.cat(kl)


def _compare(
    policy_logits: torch.Tensor, reference_logits: torch.Tensor, target: torch.Tensor, read_before: TokenReadout | None
) -> tuple[TokenReadout, TokenReadout, torch.Tensor]:
    policy, logp, p = _read(policy_logits, target)
    if read_before is None:
        reference, logq, _ = _read(reference_logits, target)
    else:
        reference, logq = read_before, _wide(reference_logits) - read_before.normalizer[:, None]
    if logp.shape[-1] != logq.shape[-1]:
        # Embeddings are padded for speed: what only one of them has is no token of anything, and both go without.
        width = min(logp.shape[-1], logq.shape[-1])
        logp, logq = logp[:, :width].log_softmax(-1), logq[:, :width].log_softmax(-1)
        p = logp.exp()
    terms = logp.sub_(logq).mul_(p)
    if not bool((p.amin(-1) > 0).all()):
        # A token that the policy never says adds nothing, whatever the reference makes of it: 0·(−inf), 0·(inf − inf).
        terms.masked_fill_((p == 0) & ~logq.isnan(), 0.0)
    # Rounding may take a sum of nearly cancelling terms just below zero.
    return policy, reference, terms.double().sum(-1).clamp_min(0.0)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """In the working dtype."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _at(wide: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The values [n] of the targets, of values [n, V]."""
    return wide.gather(-1, target[:, None])[:, 0]


def _chunks(*logits: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on together, one slice at least; all of them on an accelerator, where each call is a launch."""
    count, width = logits[0].shape
    size = max(1, count)
    if logits[0].device.type == "cpu":
        size = max(1, _CHUNK_BYTES // (width * max(4, *(each.element_size() for each in logits))))
    for first in range(0, max(1, count), size):
        yield slice(first, min(first + size, count))


def _read(logits: torch.Tensor, target: torch.Tensor) -> tuple[TokenReadout, torch.Tensor, torch.Tensor]:
    """The readout, and log p and p themselves [n, V], in the working dtype."""
    wide = _wide(logits)
    total = torch.logsumexp(wide, dim=-1)
    logp = wide - total[:, None]
    p = logp.exp()
    plogp = p * logp
    unknown = total.isnan() | total.isinf()
    if not bool((logp.amin(-1) > -torch.inf).all()):
        # A token of probability 0 adds nothing to the entropy; 0·(−inf) would make it NaN.
        plogp.masked_fill_(p == 0, 0.0)
    entropy = -plogp.sum(-1).double()
    del plogp
    said = _at(wide, target)
    readout = TokenReadout(
        # As token_logp, to the bit: margins of patched runs are compared with it.
        logp=(said - total).double(),
        entropy=torch.where(unknown, torch.nan, entropy),
        correct=torch.where(unknown, torch.nan, _is_argmax(wide, said, target).double()),
        normalizer=total,
    )
    return readout, logp, p


def _is_argmax(wide: torch.Tensor, said: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Whether the targets, of values ``said``, are the argmax: bool [n].

    On a CPU it is looked for only where the value is the largest one, since looking takes several times longer than that; other
    tokens may have the same.
    """
    if wide.device.type != "cpu":
        return wide.argmax(-1) == target
    largest = said == wide.amax(-1)
    rows = largest.nonzero()[:, 0]
    largest[rows] = wide[rows].argmax(-1) == target[rows]
    return largest


def sum_by_pair(values: torch.Tensor, pair: torch.Tensor, side: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Sum token values [P] per pair and side, in float64: [2, B]; row 0 is the chosen side."""
    return sum_into(side * num_pairs + pair, values, 2 * num_pairs).view(2, num_pairs)


def preference_margin(logp: torch.Tensor, pair: torch.Tensor, side: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """m = log p(y⁺|x) − log p(y⁻|x), nats, float64 [B], from token log-probabilities [P]."""
    chosen, rejected = sum_by_pair(logp, pair, side, num_pairs)
    margin: torch.Tensor = chosen - rejected
    return margin
