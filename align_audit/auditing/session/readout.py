"""What the top of a model says of pairs: log-probabilities and preference margins of final residual streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch

from align_audit.measures.margin import preference_margin, token_logp, token_logp_gradient
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

    def sides(self, replay: Replay, batch: PairBatch) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """What ``stream_gradients`` takes of a final stream [R, T, d]: log p of all chosen completions of a batch, and of all
        rejected ones, as :meth:`margin_objective` has them.

        Pairs do not touch each other, so the gradient of a sum holds each pair's own gradient in its rows.
        """

        def each(top: torch.Tensor) -> list[torch.Tensor]:
            slopes = self._logp_slopes(replay, top, batch)
            return [self._tangent(top, slopes, batch, side) for side in (0, 1)]

        return each

    def margin_objective(self, replay: Replay, batch: PairBatch) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """Of a final stream [R, T, d] the sum of the batch's margins, as ``stream_gradients`` takes it: what it gives has the
        gradient of that sum and is linear in the stream, so no graph of the vocabulary's size is kept."""

        def total(top: torch.Tensor) -> list[torch.Tensor]:
            slopes = self._logp_slopes(replay, top, batch)
            return [self._tangent(top, slopes, batch, 0) - self._tangent(top, slopes, batch, 1)]

        return total

    def _logp_slopes(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """∂ log p(target) / ∂ row [P, d] of every prediction entry: each goes through the head once, and back once."""
        pieces: list[torch.Tensor] = []
        for block in replay.head_blocks(batch.row.numel()):
            rows = top.detach()[batch.row[block], batch.position[block]].requires_grad_()
            with torch.enable_grad():
                logits = replay.head(rows)
            slope = token_logp_gradient(logits.detach(), batch.target[block])
            pieces += torch.autograd.grad(logits, rows, slope)
        self._sample()
        return torch.cat(pieces)

    @staticmethod
    def _tangent(top: torch.Tensor, slopes: torch.Tensor, batch: PairBatch, side: int) -> torch.Tensor:
        """A scalar, linear in the stream, with the gradient of one side's log-probabilities."""
        entries = batch.side == side
        return (top[batch.row[entries], batch.position[entries]] * slopes[entries]).sum()

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
