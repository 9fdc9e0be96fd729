"""What the top of a model says of pairs: log-probabilities and preference margins of final residual streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch

from align_audit.measures.margin import preference_margin, sum_by_pair, token_logp
from align_audit.models.replay import Replay
from align_audit.probes.batches import PairBatch


class Readout:
    """Reads final streams through a model's own norm and head, at prediction positions only.

    Args:
        sample: called where most memory is held.
    """

    def __init__(self, sample: Callable[[], None]) -> None:
        self._sample = sample

    def token_logp(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Log-probabilities [P] of the batch's targets, float64, from a final residual stream [R, T, d]."""
        pieces = [
            token_logp(replay.head(top[batch.row[block], batch.position[block]]), batch.target[block])
            for block in replay.head_blocks(batch.row.numel())
        ]
        self._sample()
        return torch.cat(pieces)

    def summed_logp(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of all chosen completions of a batch, and of all rejected ones: two scalars to differentiate.

        Pairs do not touch each other, so the gradient of a sum holds each pair's own gradient in its rows.
        """
        logp = self.token_logp(replay, top, batch)
        chosen, rejected = sum_by_pair(logp, batch.pair, batch.side, batch.num_pairs).sum(1)
        return chosen, rejected

    def margin_objective(self, replay: Replay, batch: PairBatch) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """Of a final stream [R, T, d] the sum of the batch's margins, as ``stream_gradients`` takes it."""

        def total(top: torch.Tensor) -> list[torch.Tensor]:
            chosen, rejected = self.summed_logp(replay, top, batch)
            return [chosen - rejected]

        return total

    def margins(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Preference margins [B], float64 on the CPU, from a final residual stream [R, T, d]."""
        logp = self.token_logp(replay, top, batch)
        return preference_margin(logp, batch.pair, batch.side, batch.num_pairs).cpu()

    def each_margin(
        self, replay: Replay, walked: Iterator[tuple[Hashable, torch.Tensor | None]], batch: PairBatch
    ) -> Iterator[tuple[Hashable, torch.Tensor | None]]:
        """:meth:`margins` of every walked stream; None for one that was not walked.

        Streams go through the head together, as many rows at once as keep it busy; only those rows are kept of each.
        """
        waiting: list[tuple[Hashable, torch.Tensor]] = []
        block = next(replay.head_blocks(2**62)).stop
        for key, top in walked:
            if top is None:
                yield key, None
                continue
            waiting.append((key, top[batch.row, batch.position]))
            if (len(waiting) + 1) * batch.row.numel() > block:
                yield from self._read(replay, waiting, batch)
                waiting = []
        yield from self._read(replay, waiting, batch)

    def _read(
        self, replay: Replay, waiting: list[tuple[Hashable, torch.Tensor]], batch: PairBatch
    ) -> Iterator[tuple[Hashable, torch.Tensor]]:
        if not waiting:
            return
        rows = torch.cat([part for _, part in waiting])
        target = batch.target.repeat(len(waiting))
        logp = [token_logp(replay.head(rows[block]), target[block]) for block in replay.head_blocks(len(rows))]
        self._sample()
        for (key, _), part in zip(waiting, torch.cat(logp).split(batch.row.numel()), strict=True):
            yield key, preference_margin(part, batch.pair, batch.side, batch.num_pairs).cpu()
