"""Probe pairs as padded tensors, with the bookkeeping every measure needs: where a model is read, for which pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from align_audit.config import Positions
    from align_audit.probes import ProbePair


@dataclass(frozen=True)
class PairBatch:
    """B probe pairs as R = 2B right-padded rows of T tokens: the chosen rows, then the rejected ones.

    *Prediction entries* are the positions whose next token is a completion token (METHODS, notation), flattened to
    length P and ordered by row, then position.

    Attributes:
        pair_index: [B] where each pair stands in its ``ProbeSet``.
        input_ids, attention_mask: [R, T].
        completion_start: [R] index of the first completion token.
        lengths: [R] tokens without padding.
        row, position, target, pair, side: [P] of each prediction entry: its row and position, the token it should
            predict, its pair within the batch, and 0 for chosen or 1 for rejected.
        distinct: [P] False where the same prefix was already counted, as an entry of the chosen side.
    """

    pair_index: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_start: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    pair: torch.Tensor
    side: torch.Tensor
    distinct: torch.Tensor

    @property
    def num_pairs(self) -> int:
        return int(self.pair_index.numel())

    def position_mask(self, positions: Positions) -> torch.Tensor:
        """[R, T] booleans: the positions a patch replaces. Padding is never among them."""
        place = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None, :]
        valid = place < self.lengths[:, None]
        start = self.completion_start[:, None]
        if positions == "all":
            return valid
        if positions == "prompt":
            return valid & (place < start)
        if positions == "completion":
            return valid & (place >= start)
        return valid & (place == start - 1)

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def make_batch(pairs: Sequence[ProbePair], pair_index: Sequence[int], pad_token_id: int) -> PairBatch:
    """Pad ``pairs`` into one batch. ``pair_index`` says where each stands in its ``ProbeSet``."""
    sequences = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    starts = [pair.chosen_start for pair in pairs] + [pair.rejected_start for pair in pairs]
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    rows, positions, targets, owners, sides, distinct = [], [], [], [], [], []
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        owner, side = row % len(pairs), row // len(pairs)
        # A completion that starts at position 0 has nothing before it to predict its first token from.
        read = np.arange(max(start, 1) - 1, len(ids) - 1)
        rows.append(np.full(len(read), row))
        positions.append(read)
        targets.append(np.asarray(ids)[read + 1])
        owners.append(np.full(len(read), owner))
        sides.append(np.full(len(read), side))
        pair = pairs[owner]
        counted = (read < pair.common_prefix) & np.isin(read, pair.chosen_predictions)
        distinct.append(np.full(len(read), True) if side == 0 else ~counted)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return PairBatch(
        pair_index=torch.tensor(list(pair_index), dtype=torch.long),
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_start=torch.tensor(starts, dtype=torch.long),
        lengths=torch.tensor([len(ids) for ids in sequences], dtype=torch.long),
        row=joined(rows).long(),
        position=joined(positions).long(),
        target=joined(targets).long(),
        pair=joined(owners).long(),
        side=joined(sides).long(),
        distinct=joined(distinct).bool(),
    )


def iterate_batches(pairs: Sequence[ProbePair], batch_tokens: int, pad_token_id: int) -> Iterator[PairBatch]:
    """All pairs, batched by length so that little is padded; at most ``batch_tokens`` padded tokens a batch.

    A pair longer than that makes a batch of its own. The order depends on the pairs alone, so two audits of the same
    probes see the same batches.
    """
    for group in plan_batches(pairs, batch_tokens):
        yield make_batch([pairs[i] for i in group], group, pad_token_id)


def plan_batches(pairs: Sequence[ProbePair], batch_tokens: int) -> list[list[int]]:
    """Which pairs go together: lists of indices, longest pairs first."""
    length = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-length[i], i)):
        if groups and 2 * (len(groups[-1]) + 1) * length[groups[-1][0]] <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
