"""What several processes keep is brought together into what one process would have kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align_audit.auditing.session.accumulators import PerPair, PerToken, Rows, State
from align_audit.probes.batches import make_batch
from align_audit.ranks import Ranks
from tests.helpers.tiny import random_pairs


class Threads(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, said: list[Any]) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "said", said)

    def gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value  # type: ignore[attr-defined]
        self.barrier.wait(10)  # type: ignore[attr-defined]
        everything = list(self.said)  # type: ignore[attr-defined]
        self.barrier.wait(10)  # type: ignore[attr-defined]
        return everything

    def exchange(self, values: Sequence[Any]) -> list[Any]:
        return [everything[self.rank] for everything in self.gather(list(values))]


def together(size: int, work: Callable[[Ranks], None]) -> None:
    """``work`` on ``size`` ranks at once."""
    barrier, said, errors = threading.Barrier(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            work(Threads(rank, size, barrier, said))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@dataclass
class Kept(State):
    number: PerPair = field(default_factory=lambda: PerPair(6))
    layers: PerPair = field(default_factory=lambda: PerPair(6, 3))
    rows: Rows = field(default_factory=Rows)
    words: str = "not merged"


def filled(kept: Kept, places: list[int]) -> Kept:
    pairs = random_pairs(6).pairs
    batch = make_batch([pairs[i] for i in places], places, 0)
    kept.number.put(batch, torch.tensor([i + 0.1 for i in places], dtype=torch.float64))
    for layer in range(3):
        if layer != 1:  # not measured anywhere
            kept.layers.put(batch, np.array([10.0 * i + layer for i in places]), layer)
    for i in places:
        kept.rows.add(np.array([100 - i], dtype=np.uint64), torch.full((1, 2, 4), float(i)))
    return kept


def test_every_rank_holds_what_one_process_would() -> None:
    shares = [[0, 3], [5], [4, 1]]
    whole = filled(Kept(), [0, 1, 3, 4, 5])
    merged: dict[int, Kept] = {}
    layers: dict[int, torch.Tensor | None] = {}
    taken: dict[int, torch.Tensor | None] = {}

    def work(ranks: Ranks) -> None:
        kept = merged[ranks.rank] = filled(Kept(), shares[ranks.rank])
        kept.merge(ranks, np.array(shares[ranks.rank]))
        order = kept.rows.order()
        layers[ranks.rank] = kept.rows.layer([0, 1])
        taken[ranks.rank] = kept.rows.take([order[[3, 0, 1]], order[[2]]])

    together(3, work)
    for kept in merged.values():
        np.testing.assert_array_equal(kept.number.values, whole.number.values)
        np.testing.assert_array_equal(kept.layers.values, whole.layers.values)
        assert np.isnan(kept.number.values[2]), "nobody measured it"
        assert len(kept.rows) == len(whole.rows) == 5
        assert kept.words == "not merged"
    # By key: of the last pair first.
    entire = torch.cat(whole.rows.parts)[whole.rows.order()]
    for rank in (0, 1):
        rows = layers[rank]
        assert rows is not None
        assert torch.equal(rows[merged[rank].rows.order()], entire[:, rank])
    assert taken[0] is not None and taken[1] is not None
    assert torch.equal(taken[0], entire[[3, 0, 1]])
    assert torch.equal(taken[1], entire[[2]])
    assert layers[2] is None and taken[2] is None, "there were two of each"


def test_rows_stay_on_the_process_that_has_them() -> None:
    """All rows of a large model are tens of gigabytes: no process may have to hold them."""
    held: dict[int, Rows] = {}

    def work(ranks: Ranks) -> None:
        rows = held[ranks.rank] = Rows()
        if ranks.rank != 1:  # which had no pair to work on
            # No two of these are one as floating-point numbers are.
            keys = np.array([3, 2, 1, 0], dtype=np.int64) + 2**62 + 4 * ranks.rank
            rows.add(keys, torch.full((4, 3, 2), float(ranks.rank)))
        rows.merge(ranks, np.array([]))
        assert rows.order().tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
        layer = rows.layer(range(3))
        assert layer is not None and len(layer) == 8
        taken = rows.take([np.array([0, 1]), np.array([7, 0])])
        assert taken is None if ranks.rank == 2 else taken is not None
        if taken is not None:
            assert taken[:, 0, 0].tolist() == [[0.0, 0.0], [2.0, 0.0]][ranks.rank]

    together(3, work)
    assert [sum(map(len, held[rank].parts)) for rank in range(3)] == [4, 0, 4]
    assert [len(held[rank]) for rank in range(3)] == [8, 8, 8]
    held[0].forget()
    assert (held[0].parts, len(held[0])) == ([], 8)


def test_a_second_pass_is_brought_together_as_the_first() -> None:
    """What a process holds of pairs that another one has worked on since is out of date."""
    merged: dict[int, PerPair] = {}

    def work(ranks: Ranks) -> None:
        kept = merged[ranks.rank] = PerPair(4, 2)
        for column in range(2):
            places = np.array([[0, 1], [2, 3]][ranks.rank])
            kept.put_at(places, places + 10.0 * column, column)
            kept.merge(ranks, places)

    together(2, work)
    for kept in merged.values():
        np.testing.assert_array_equal(kept.values, [[0, 10], [1, 11], [2, 12], [3, 13]])


def test_half_a_batch_that_was_given_up_is_not_handed_on() -> None:
    merged: dict[int, PerPair] = {}

    def work(ranks: Ranks) -> None:
        kept = merged[ranks.rank] = PerPair(2)
        kept.put_at(np.array([0, 1]), np.array([5.0, 6.0]) if ranks.rank == 0 else np.array([-1.0, -1.0]))
        kept.merge(ranks, np.array([[0, 1], []][ranks.rank], dtype=int))

    together(2, work)
    for kept in merged.values():
        np.testing.assert_array_equal(kept.values, [5.0, 6.0])


def test_rows_are_taken_across_batches() -> None:
    rows = Rows()
    for first, count in ((0, 3), (3, 1), (4, 4)):
        rows.add(np.arange(count, dtype=np.uint64), torch.arange(first, first + count)[:, None] * torch.ones(1, 2))
    taken = rows.take([np.array([7, 0, 3, 4, 2])])
    assert taken is not None
    assert taken.tolist() == [[7, 7], [0, 0], [3, 3], [4, 4], [2, 2]]


def test_alone_nothing_changes() -> None:
    kept = filled(Kept(), [0, 2])
    kept.merge(Ranks(), np.array([0, 2]))
    np.testing.assert_array_equal(kept.number.values, filled(Kept(), [0, 2]).number.values)
    assert len(kept.rows) == 2


def test_putting_again_overwrites() -> None:
    """Pairs of a batch that ran out of memory come again."""
    kept = PerPair(4, 2)
    kept.put_at(np.array([1, 2]), np.array([1.0, 2.0]), 0)
    kept.put_at(np.array([1]), np.array([5.0]), 0)
    np.testing.assert_array_equal(kept.values[:, 0], [np.nan, 5.0, 2.0, np.nan])
    assert np.isnan(kept.values[:, 1]).all()


def test_names_and_values_of_all_numbers_per_pair() -> None:
    assert [name for name, _ in Kept().per_pair()] == ["number", "layers"]


def test_numbers_of_tokens_are_those_of_each_pair_and_side_on_any_process() -> None:
    """Of random pairs each completion's own tokens, from batches in any order, on three ranks that read different pairs."""
    pairs = random_pairs(7).pairs

    def read(kept: PerToken, places: list[int], **layout: Any) -> None:
        batch = make_batch([pairs[place] for place in places], places, 0, **layout)
        kept.put(batch, batch.target.double() + 0.25)

    def expected(ids: tuple[int, ...], start: int) -> list[float]:
        return [token + 0.25 for token in ids[max(start, 1) :]]

    def on_a_rank(ranks: Ranks) -> None:
        kept = PerToken(7)
        mine = [[3, 0], [6, 1], [2, 5, 4]][ranks.rank]
        read(kept, mine, shared=ranks.rank == 1)
        read(kept, mine[:1])  # again, as after running out of memory
        kept.merge(ranks, np.array(mine))
        for pair, values in zip(pairs, kept.values, strict=True):
            assert values is not None
            assert values[0].dtype == values[1].dtype == np.float32
            assert values[0].tolist() == expected(pair.chosen_ids, pair.chosen_start)
            assert values[1].tolist() == expected(pair.rejected_ids, pair.rejected_start)

    together(3, on_a_rank)
