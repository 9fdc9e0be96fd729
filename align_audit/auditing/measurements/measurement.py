"""The second look: streams that can be named only after the first pass over all pairs has shown where to look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from align_audit.auditing.measurements.patching import Collected, noise_with
from align_audit.auditing.session.walk import Session
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch


class Look(Protocol):
    """Something to patch into the reference in the second pass."""

    @property
    def layers(self) -> set[int]:
        """At which of the policy's layers its streams are taken; empty: nothing to do."""

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        """What to walk through the reference."""

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        """Keep the effects [B], nats, of the pairs at ``places``."""


class MoreNoise:
    """Further noise draws at the layer whose verdict they decide (METHODS §2)."""

    def __init__(self, session: Session, found: Collected, layer: int | None) -> None:
        self.session = session
        self.found = found
        self.layer = layer
        self.draws = session.config.patching.noise_draws
        self.layers = set() if layer is None or self.draws < 2 else {layer}
        if self.layers:
            found.noise_draws[layer] = self.draws

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        if not self.session.is_control(batch):
            return
        mask = batch.position_mask(self.session.config.patching.positions)
        for layer in self.layers:
            for draw in range(1, self.draws):
                make = noise_with(self.session, batch, policy, reference, mask, layer, draw)
                yield Stream((draw, layer), layer, make)

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        self.found.per_pair["noise"][(places, *key)] = effect


def second_pass(
    session: Session, found: Collected, looks: Sequence[Look], tick: Callable[[], None] = lambda: None
) -> None:
    """Walk the streams of all ``looks`` through the reference, over all pairs once.

    Args:
        found: what the first pass over the same session found. Where a batch is one of its batches, the unpatched run's
            margins are those it found, to the bit, and the reference is not run to the end again. Other batches (planned
            anew after running out of memory) compute them; and where a replay does not give the recording back bit by
            bit, the unpatched run is walked as the streams are.
    """
    looks = [look for look in looks if look.layers]
    if not looks:
        return
    top = max(max(look.layers) for look in looks)

    def update(batch: PairBatch) -> None:
        if not session.is_exact(batch):
            tick()
            return
        places = batch.pair_index.cpu().numpy()
        base = None if found.strays else found.reference_margins.get(tuple(places.tolist()))
        policy, reference = session.record_both(batch, until=top, whole_reference=base is None)

        def streams() -> Iterator[Stream]:
            for number, look in enumerate(looks):
                for stream in look.streams(batch, policy, reference):
                    yield Stream((number, stream.key), stream.start, stream.make)

        with session.as_reference() as replay:
            if base is None:
                own = replay.unpatched(reference) if found.strays else reference.after(session.num_layers - 1)
                base = session.margins(replay, own, batch)
            limit = session.max_streams(reference.after(-1))
            walked = replay.walk(reference, streams(), limit, read=batch.read)
            for key, margin in session.each_margin(replay, walked, batch):
                assert margin is not None
                assert isinstance(key, tuple)
                number, within = key
                looks[number].store(within, places, (margin - base).numpy())
        tick()

    session.each_batch(update)
