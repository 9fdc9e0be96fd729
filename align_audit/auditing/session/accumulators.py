"""What an audit keeps of its pairs: numbers per pair and token rows, each of which several processes can bring together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks


@runtime_checkable
class Mergeable(Protocol):
    """Something that every process fills with its share of the pairs."""

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Answer afterwards, on every process, what one process would of all pairs. Called by all together.

        Args:
            places: places of the pairs that this process has worked on.
        """


def merge_by_place(arrays: Sequence[np.ndarray], ranks: Ranks, places: np.ndarray) -> None:
    """Take over the rows [N, …] of the pairs that other processes have worked on, bit by bit."""
    for there, rows in ranks.gather((places, [array[places] for array in arrays])):
        for array, values in zip(arrays, rows, strict=True):
            array[there] = values


class PerPair:
    """A number a pair, or an array of them: float64 [N, *shape] in the order of the ``ProbeSet``, NaN until put.

    Attributes:
        values: [N, *shape].
    """

    def __init__(self, pairs: int, *shape: int) -> None:
        self.values = np.full((pairs, *shape), np.nan)

    def put(self, batch: PairBatch, values: torch.Tensor | np.ndarray, *where: int) -> None:
        """Store one value a pair of the batch; ``where`` indexes the trailing axes. A second time overwrites the first."""
        self.put_at(batch.pair_index.cpu().numpy(), values, *where)

    def put_at(self, places: np.ndarray, values: torch.Tensor | np.ndarray, *where: int) -> None:
        """Store one value for each pair at ``places``."""
        index: Any = (places, *where)
        self.values[index] = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)

    def at(self, layer: int) -> np.ndarray:
        """[N, …] of one layer, where the axis after the pairs begins with what enters layer 0 (layer −1)."""
        column: np.ndarray = self.values[:, layer + 1]
        return column

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Take over what other processes have measured, bit by bit."""
        merge_by_place([self.values], ranks, places)


class PerToken:
    """A number for each completion token of a pair that can be predicted; float32, in the order of the ``ProbeSet``.

    Attributes:
        values: of each pair those of its chosen and of its rejected completion, [C] and [R]; None until put.
    """

    def __init__(self, pairs: int) -> None:
        self.values: list[tuple[np.ndarray, np.ndarray] | None] = [None] * pairs

    def put(self, batch: PairBatch, values: torch.Tensor) -> None:
        """Store one value for each prediction entry [P] of the batch. A second time overwrites the first."""
        # Entries are ordered by side, then by pair.
        counts = torch.bincount(batch.side * batch.num_pairs + batch.pair, minlength=2 * batch.num_pairs).tolist()
        parts = [part.numpy() for part in values.float().cpu().split(counts)]
        for number, place in enumerate(batch.pair_index.tolist()):
            self.values[place] = parts[number], parts[number + batch.num_pairs]

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Take over what other processes have measured, bit by bit."""
        for there, values in ranks.gather((places.tolist(), [self.values[place] for place in places])):
            for place, value in zip(there, values, strict=True):
                self.values[place] = value


@dataclass
class Rows:
    """Token rows of a sample, each under a key that says which it is; sorted by key, the order of batches is gone.

    Every process keeps the rows of its own pairs, which are far larger than all else that an audit keeps. What it needs of the
    others' is brought when it is asked for, by all together. A row's *place* counts the rows of all processes, one behind
    the other, in the order in which they were added.

    Attributes:
        keys: of this process's rows, by batch, [n].
        parts: by batch, [n, L, d] tensors on the CPU.
    """

    keys: list[np.ndarray] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    _ranks: Ranks = field(default_factory=Ranks)
    _everywhere: list[np.ndarray] | None = None
    """Keys of each process's rows, since they were brought together."""

    def __len__(self) -> int:
        return sum(map(len, self._keys_of_all()))

    def add(self, keys: np.ndarray, rows: torch.Tensor) -> None:
        """Add a batch's rows; to be called once for a batch that went through."""
        self.keys.append(keys)
        self.parts.append(rows)

    def order(self) -> np.ndarray:
        """[rows] places of the rows of all processes, by ascending key."""
        # Those that are none have no say in the type of the keys.
        keys = [some for some in self._keys_of_all() if len(some)]
        return np.argsort(np.concatenate(keys), kind="stable") if keys else np.empty(0, dtype=np.int64)

    def layer(self, layers: Sequence[int]) -> torch.Tensor | None:
        """[rows, d] of this process's layer, all rows by place. Called by all together.

        Args:
            layers: the first process's, the second's, ...; those without one get None.
        """

        def slices(layer: int, stay: bool) -> list[torch.Tensor]:
            # Of a slice that is sent, all that it is a slice of would travel.
            return [part[:, layer] if stay else part[:, layer].clone() for part in self.parts]

        rank, size = self._ranks.rank, self._ranks.size
        asked = [slices(layer, at == rank) for at, layer in enumerate(layers)]
        said = self._ranks.exchange(asked + [None] * (size - len(layers)))
        return torch.cat([rows for parts in said for rows in parts or ()]) if rank < len(layers) else None

    def take(self, places: Sequence[np.ndarray]) -> torch.Tensor | None:
        """[n, L, d] the rows at this process's places. Called by all together.

        Args:
            places: the first process's, the second's, ...; those without any get None.
        """
        rank, keys = self._ranks.rank, self._keys_of_all()
        first = sum(map(len, keys[:rank])) if self._everywhere else 0
        end = first + sum(map(len, self.keys))
        here = [(asked_for >= first) & (asked_for < end) for asked_for in places]
        asked = [
            (np.flatnonzero(kept), self._kept_at(asked_for[kept] - first)) if kept.any() else None
            for kept, asked_for in zip(here, places, strict=True)
        ]
        said = self._ranks.exchange(asked + [None] * (self._ranks.size - len(places)))
        if rank >= len(places):
            return None
        parts = [part for part in said if part is not None]
        taken = parts[0][1].new_empty((len(places[rank]), *parts[0][1].shape[1:]))
        for where, rows in parts:
            taken[torch.from_numpy(where)] = rows
        return taken

    def _kept_at(self, places: np.ndarray) -> torch.Tensor:
        """[n, L, d] of this process's rows those at these places among them."""
        first = np.cumsum([0, *map(len, self.parts)])
        part_of = np.searchsorted(first, places, side="right") - 1
        taken = self.parts[0].new_empty((len(places), *self.parts[0].shape[1:]))
        for part in np.unique(part_of).tolist():
            at = np.flatnonzero(part_of == part)
            taken[torch.from_numpy(at)] = self.parts[part][torch.from_numpy(places[at] - first[part])]
        return taken

    def _keys_of_all(self) -> list[np.ndarray]:
        return self.keys if self._everywhere is None else self._everywhere

    def forget(self) -> None:
        """Let go of the rows; how many there were, and their order, stays known."""
        self.parts = []

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Know of the rows of every process; the rows themselves stay where they are."""
        keys = np.concatenate(self.keys) if self.keys else np.empty(0)
        self._ranks, self._everywhere = ranks, ranks.gather(keys)


@dataclass
class State:
    """What a measurement keeps of the pairs: a dataclass whose fields are merged one by one."""

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Merge every field that can be."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mergeable):
                value.merge(ranks, places)

    def per_pair(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every number per pair."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, PerPair):
                yield entry.name, value.values
