"""What an audit keeps of its pairs: numbers per pair and token rows, each of which several processes can bring together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks


@runtime_checkable
class Mergeable(Protocol):
    """Something that every process fills with its share of the pairs."""

    def merge(self, ranks: Ranks) -> None:
        """Hold afterwards, on every process, what one process would have of all pairs. Called by all together."""


class PerPair:
    """A number a pair, or an array of them: float64 [N, *shape] in the order of the ``ProbeSet``, NaN until put.

    Attributes:
        values: [N, *shape].
    """

    def __init__(self, pairs: int, *shape: int) -> None:
        self.values = np.full((pairs, *shape), np.nan)
        self._measured = np.zeros(pairs, dtype=bool)

    def put(self, batch: PairBatch, values: torch.Tensor | np.ndarray, *where: int) -> None:
        """Store one value a pair of the batch; ``where`` indexes the trailing axes. A second time overwrites the first."""
        self.put_at(batch.pair_index.cpu().numpy(), values, *where)

    def put_at(self, places: np.ndarray, values: torch.Tensor | np.ndarray, *where: int) -> None:
        """Store one value for each pair at ``places``."""
        index: Any = (places, *where)
        self.values[index] = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
        self._measured[places] = True

    def at(self, layer: int) -> np.ndarray:
        """[N, …] of one layer, where the axis after the pairs begins with what enters layer 0 (layer −1)."""
        column: np.ndarray = self.values[:, layer + 1]
        return column

    def merge(self, ranks: Ranks) -> None:
        """Take over what other processes have measured, bit by bit."""
        places = np.flatnonzero(self._measured)
        for others, values in ranks.gather((places, self.values[places])):
            self.values[others] = values
            self._measured[others] = True


@dataclass
class Rows:
    """Token rows of a sample, each under a key that says which it is; sorted by key, the order of batches is gone.

    Attributes:
        keys: by batch, [n].
        parts: by batch, [n, …] tensors on the CPU.
    """

    keys: list[np.ndarray] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(keys) for keys in self.keys)

    def add(self, keys: np.ndarray, rows: torch.Tensor) -> None:
        """Add a batch's rows; to be called once for a batch that went through."""
        self.keys.append(keys)
        self.parts.append(rows)

    def order(self) -> torch.Tensor:
        """[rows] places of the rows, all batches one behind the other, by ascending key."""
        return torch.from_numpy(np.argsort(np.concatenate(self.keys), kind="stable"))

    def merge(self, ranks: Ranks) -> None:
        """Hold the rows of every process."""
        said = ranks.gather((self.keys, self.parts))
        self.keys = [keys for part, _ in said for keys in part]
        self.parts = [rows for _, part in said for rows in part]


@dataclass
class State:
    """What a measurement keeps of the pairs: a dataclass whose fields are merged one by one."""

    def merge(self, ranks: Ranks) -> None:
        """Merge every field that can be."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mergeable):
                value.merge(ranks)

    def per_pair(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every number per pair."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, PerPair):
                yield entry.name, value.values
