"""Token rows on their way up the layers of a model, read by its logit lens: how far each travels from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from align_audit.auditing.session.accumulators import Rows
from align_audit.auditing.session.memory import out_of_memory
from align_audit.auditing.session.walk import Session
from align_audit.measures.row_sample import rows_needed
from align_audit.measures.transport import TransportAccumulator
from align_audit.models.replay import Replay

PORTION = 128
"""Rows of the first portion, and of a block of every portion: below, reading the unembedding takes longer than multiplying
by it, and a standard error is wrong by more than a sixteenth."""
SHARE = 0.02
"""Of the mean, the largest standard error of a transport of which rows are drawn."""


@dataclass
class LensWalk:
    """Of one model. Rows are taken by ascending key, so that the first n are a random sample, whatever n is.

    Attributes:
        active: makes the model compute.
        rows: of all processes: all that may be asked for, but for those that have walked.
        distances: [m, L − 1] radians, of the m rows with the smallest keys: those that have walked.
        alike: the walk of a model with the same streams, bit by bit. Where the first block travels as far in both, the heads
            that read them are the same as well, and this model's other rows do not walk: they have that model's distances.
    """

    session: Session
    active: Callable[[], AbstractContextManager[Replay]]
    rows: Rows
    distances: np.ndarray
    alike: LensWalk | None = None

    def __post_init__(self) -> None:
        self._walked = len(self.distances)
        self._order = self.rows.order()

    def up_to(self, count: int, block: int | None = None) -> np.ndarray:
        """Distances [count, L − 1] of the rows with the smallest keys; walks those that have not walked.

        Args:
            block: rows that walk together; None: as many as the head is fast at. Rows that walk at different times, in
                different audits, get the same bits where ``count`` is a multiple of it, or all rows there are.
        """
        if self.alike is not None:
            first = min(count, self._block(block))
            if np.array_equal(self._walk(first, block), self.alike.up_to(first, block), equal_nan=True):
                return self.alike.up_to(count, block)
        return self._walk(count, block)

    def _walk(self, count: int, block: int | None) -> np.ndarray:
        begun = len(self.distances)
        if count > begun:
            with self.active() as replay:
                places = self._order[begun - self._walked : count - self._walked]
                more = self._travelled(replay, places, self._block(block))
            self.distances = np.concatenate([self.distances, more])
        return self.distances[:count]

    def _block(self, asked: int | None) -> int:
        """How many rows walk together: as many as asked for, or as a head is fast at."""
        return asked if asked is not None else next(self.session.models.policy.head_blocks(2**62)).stop

    def _travelled(self, replay: Replay, places: np.ndarray, size: int) -> np.ndarray:
        """Distances of the rows at these places, in blocks; processes take turns of them."""
        ranks = self.session.models.ranks
        blocks = [places[first : first + size] for first in range(0, len(places), size)]
        walked: dict[int, np.ndarray] = {}
        for begun in range(0, len(blocks), ranks.size):
            # Every process has its block before any begins to walk: else each would wait for the one before it.
            block = self.rows.take(blocks[begun : begun + ranks.size])
            if block is not None:
                walked[begun + ranks.rank] = self._block_travelled(replay, block)
        everywhere = {number: part for said in ranks.gather(walked) for number, part in said.items()}
        return np.concatenate([everywhere[number] for number in range(len(blocks))])

    def _block_travelled(self, replay: Replay, block: torch.Tensor) -> np.ndarray:
        """Of rows [n, L, d], which walk up the layers, so that two layers' logits of them are held; in smaller blocks after
        running out of memory."""
        walks, done, size = TransportAccumulator(), 0, len(block)
        while done < len(block):
            streams = block[done : done + size]
            try:
                walks.update(self._lens(replay, streams, layer) for layer in range(replay.num_layers))
                done += len(streams)
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(streams) == 1:
                    raise
            # Out of the handler, so that the failed call's tensors are free.
            self.session.free_memory()
            size = len(streams) // 2
        return walks.freeze().numpy()

    def _lens(self, replay: Replay, block: torch.Tensor, layer: int) -> torch.Tensor:
        """The logit lens [n, V] of rows [n, L, d] after one layer."""
        logits = replay.head(block[:, layer].to(replay.device))
        self.session.meter.sample()
        return logits


class Walk(Protocol):
    """What :func:`travelled` asks of a model's rows."""

    def up_to(self, count: int, block: int | None = None) -> np.ndarray:
        """As :meth:`LensWalk.up_to`."""


def travelled(
    walks: Sequence[Walk], asked: int | Literal["auto", "all"], kept: int, population: int
) -> list[np.ndarray]:
    """How far the same rows travel in each model, [n, L − 1] radians.

    ``auto`` draws rows in portions until the mean of every layer's transport, in each model, has a standard error of at most
    ``SHARE`` of it. What that takes is the same whoever asks, and whatever has walked before.

    Args:
        asked: ``spinal.transport_rows``.
        kept: how many rows there are to walk.
        population: of how many they are a sample.
    """
    if asked != "auto":
        count = kept if asked == "all" else min(asked, kept)
        return [walk.up_to(count) for walk in walks]
    count = min(PORTION, kept)
    while True:
        distances = [walk.up_to(count, PORTION) for walk in walks]
        if count == kept:
            return distances
        needed = max(rows_needed(each, population, SHARE) for each in distances)
        if needed <= count:
            return distances
        blocks = -(-needed // PORTION)  # at least one more: count is a multiple
        count = min(blocks * PORTION, kept)
