"""What all contenders share: pairs, padded batches, margins, and the two sweeps over a tool's three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAIRS_PER_BATCH = 4


@dataclass(frozen=True)
class Pair:
    """One preference pair in tokens."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The two full sequences."""
        return self.prompt + self.chosen, self.prompt + self.rejected


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B right-padded rows, chosen first. ``completion`` [2B, T]: the tokens whose log p is summed."""

    index: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.index, self.input_ids.to(device), self.attention_mask.to(device), self.completion.to(device))


@dataclass
class Result:
    """``effects`` [N, L] or [N, L, K] in nats, float64; ``logps`` [N, 2] of the unpatched reference."""

    effects: np.ndarray
    logps: np.ndarray
    facts: dict[str, Any]


def make_batches(pairs: Sequence[Pair], size: int = PAIRS_PER_BATCH) -> list[Batch]:
    """Pairs in their own order, ``size`` at a time: what a user writes first."""
    batches = []
    for first in range(0, len(pairs), size):
        index = list(range(first, min(first + size, len(pairs))))
        rows = [pairs[i].sides[side] for side in (0, 1) for i in index]
        starts = [len(pairs[i].prompt) for _ in (0, 1) for i in index]
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, completion = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
        for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
            completion[place, start : len(row)] = True
        batches.append(Batch(index, ids, mask, completion))
    return batches


def sequence_logps(logits: Tensor, batch: Batch) -> Tensor:
    """Summed completion log-probabilities [2, B], float64, from logits [2B, T, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = wide[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return (logp.double() * batch.completion[:, 1:]).sum(1).view(2, -1)


class Contender:
    """A tool that patches. It says how to do three things; the sweeps are the same for all.

    A value that is patched is written over ``resid_post`` of one layer of the reference at all positions.
    """

    def __init__(self, policy: Any, reference: Any) -> None:
        self.policy, self.reference = policy, reference
        self.num_layers: int = reference.config.num_hidden_layers
        self.device: torch.device = reference.model.embed_tokens.weight.device
        self.pairs_per_batch = PAIRS_PER_BATCH

    def batches(self, pairs: Sequence[Pair], size: int | None = None) -> list[Batch]:
        return [batch.to(self.device) for batch in make_batches(pairs, size or self.pairs_per_batch)]

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        """The policy's residual streams [2B, T, d] after layers 0 … L−1."""
        raise NotImplementedError

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The reference's logits [2B, T, V] and its residual streams."""
        raise NotImplementedError

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        """Logits of the reference with ``value`` in place of its stream after ``layer``."""
        raise NotImplementedError

    def base_logits(self, batch: Batch) -> Tensor:
        """Logits of the reference, unpatched; nothing is kept from between its layers."""
        return self.reference_run(batch)[0]

    @torch.no_grad()
    def layer_sweep(self, pairs: Sequence[Pair]) -> Result:
        """Effect of the policy's stream at each layer."""
        effects, logps = np.zeros((len(pairs), self.num_layers)), np.zeros((len(pairs), 2))
        for batch in self.batches(pairs):
            source = self.policy_streams(batch)
            base = sequence_logps(self.base_logits(batch), batch)
            logps[batch.index] = base.T.cpu().numpy()
            for layer in range(self.num_layers):
                patched = sequence_logps(self.patched_logits(batch, layer, source[layer]), batch)
                effects[batch.index, layer] = _effect(patched, base)
        return Result(effects, logps, {})

    @torch.no_grad()
    def rank_sweep(self, pairs: Sequence[Pair], bases: Tensor, ranks: Sequence[int], halves: np.ndarray) -> Result:
        """Effect of h_l(ρ) + P_k (h_l(π) − h_l(ρ)) at each layer and rank; the bases are given, not fitted."""
        effects = np.zeros((len(pairs), self.num_layers, len(ranks)))
        logps = np.zeros((len(pairs), 2))
        for batch in self.batches(pairs):
            source = self.policy_streams(batch)
            logits, own = self.reference_run(batch)
            base = sequence_logps(logits, batch)
            del logits
            logps[batch.index] = base.T.cpu().numpy()
            half = torch.from_numpy(halves[batch.index].astype(np.int64)).repeat(2).to(self.device)
            for layer in range(self.num_layers):
                shift = source[layer] - own[layer]
                for column, rank in enumerate(ranks):
                    span = bases[layer, half, :, :rank].to(shift.dtype)
                    value = own[layer] + (shift @ span) @ span.mT
                    patched = sequence_logps(self.patched_logits(batch, layer, value), batch)
                    effects[batch.index, layer, column] = _effect(patched, base)
        return Result(effects, logps, {})


def _effect(patched: Tensor, base: Tensor) -> np.ndarray:
    return ((patched[0] - patched[1]) - (base[0] - base[1])).cpu().numpy()
