"""The log of W&B, which another process goes on writing while tests read it."""

from __future__ import annotations

import functools

from tests.helpers.tracker_stores import Store, WandbStore, wandb_records


def test_a_log_that_is_cut_anywhere_is_read_up_to_there(stores: functools._lru_cache_wrapper[Store]) -> None:
    store = stores(WandbStore)
    assert isinstance(store, WandbStore)
    with store.run("cut"):
        for step in range(400):
            store.train(step)
    store.read("cut")  # once it is whole
    data = max(store.logs(), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    whole = list(wandb_records(data))
    assert len(data) > 2**15, "a record goes on in the next block"
    counts = []
    for end in range(0, len(data), 37):
        read = list(wandb_records(data[:end]))
        assert read == whole[: len(read)]
        counts.append(len(read))
    assert counts[0] == 0 and counts == sorted(counts) and len(set(counts)) > 400
