"""Patch finer sites: attention and MLP outputs, single heads, windows of layers (METHODS §1, "Sites"; §7 for attribution).

One pass over the pairs, both ways: ``sufficiency`` puts the policy's site into the reference, ``necessity`` the reference's
into the policy. What a donor gives is recorded for as many units as may be walked together, then walked and let go.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align_audit.auditing.session.walk import Session
from align_audit.config import SiteConfig
from align_audit.errors import SiteError
from align_audit.measures.control_variate import subset_order
from align_audit.measures.patching import patched
from align_audit.measures.sums import sum_into
from align_audit.models.replay import Recording, Replay, Stream
from align_audit.models.sites import Kind, Place, Sites
from align_audit.probes.batches import PairBatch

DIRECTIONS = ("sufficiency", "necessity")
MEASURED_PAIRS = 16
"""Pairs patched exactly beside an attribution, where the configuration does not say."""


@dataclass(frozen=True)
class Unit:
    """What is swapped at once: layers ``layer`` to ``last`` of a block, one layer's addend, or one of its heads."""

    layer: int
    last: int
    head: int | None = None


@dataclass
class SiteFindings:
    """What one :class:`SiteConfig` gave, per pair: float64 [N, U], nats, in the order of the ``ProbeSet``.

    Attributes:
        exact_pairs: places of the pairs that were patched; NaN elsewhere.
        absent: which layers have no such site, and why; None where all have it.
        exact: by direction, the effects.
        attribution: by direction, to first order; empty where only exact effects were asked for.
    """

    config: SiteConfig
    units: list[Unit]
    exact_pairs: np.ndarray
    absent: str | None = None
    exact: dict[str, np.ndarray] = field(default_factory=dict)
    attribution: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """One of the two models on a batch: how to make it compute, and what it computed."""

    active: Callable[[], AbstractContextManager[Replay]]
    recording: Recording
    sites: Sites | None


class SiteCollector:
    """Finds the sites that were asked for when made; then measures them, batch by batch.

    Raises:
        SiteError: the models, or the layers named, do not have a site; the message lists what there is.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        configs = session.config.sites
        self._policy_sites: Sites | None = None
        self._reference_sites: Sites | None = None
        if any(config.site != "block" for config in configs):
            with session.as_policy() as replay:
                self._policy_sites = Sites(replay)
            with session.as_reference() as replay:
                self._reference_sites = Sites(replay, self._policy_sites if session.alike else None)
        count = len(session.pairs)
        self._order = subset_order([pair.index for pair in session.pairs], session.config.seed)
        self._sizes = [min(count, self._exact_pairs(config)) for config in configs]
        self.found: list[SiteFindings] = []
        for number, (config, size) in enumerate(zip(configs, self._sizes, strict=True)):
            units, absent = self._units(number, config)
            found = SiteFindings(config, units, np.sort(self._order[:size]), absent)
            for direction in DIRECTIONS:
                found.exact[direction] = np.full((count, len(units)), np.nan)
                if config.estimator != "exact":
                    found.attribution[direction] = np.full((count, len(units)), np.nan)
            self.found.append(found)

    def _exact_pairs(self, config: SiteConfig) -> int:
        if config.pairs is not None:
            return config.pairs
        return len(self.session.exact_pairs) if config.estimator == "exact" else MEASURED_PAIRS

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def _units(self, number: int, config: SiteConfig) -> tuple[list[Unit], str | None]:
        layers = self.session.num_layers
        named = range(layers) if config.layers == "all" else sorted(config.layers)
        outside = [layer for layer in named if layer >= layers]
        if outside:
            raise SiteError(f"sites.{number}.layers names {outside}; the model has layers 0 to {layers - 1}")
        if config.site == "block":
            past = [layer for layer in named if layer + config.width > layers]
            if config.width > layers or (past and config.layers != "all"):
                raise SiteError(
                    f"sites.{number}: windows of {config.width} layers"
                    + (f" that start at {past} end past the last layer" if config.width <= layers else "")
                    + f"; the model has layers 0 to {layers - 1}"
                    + (f", so windows start at 0 to {layers - config.width}" if config.width <= layers else "")
                )
            return [Unit(layer, layer + config.width - 1) for layer in named if layer not in past], None
        kind = config.site
        lacking = {layer: why for layer in named if (why := self._lacks(kind, layer)) is not None}
        if lacking and (config.layers != "all" or len(lacking) == layers):
            raise SiteError(f"sites.{number}: {_grouped(lacking)}")
        units = []
        for layer in named:
            if layer in lacking:
                continue
            if kind != "head":
                units.append(Unit(layer, layer))
                continue
            for head in range(self._heads(layer)) if config.heads == "all" else sorted(config.heads):
                for sites in (self._policy_sites, self._reference_sites):
                    assert sites is not None
                    sites.check("head", layer, head)
                units.append(Unit(layer, layer, head))
        return units, _grouped(lacking) if lacking else None

    def _heads(self, layer: int) -> int:
        assert self._policy_sites is not None
        return self._policy_sites.layers[layer].heads

    def _lacks(self, kind: Kind, layer: int) -> str | None:
        """Why a layer of either model has no such site."""
        for name, sites in (("policy", self._policy_sites), ("reference", self._reference_sites)):
            assert sites is not None
            found = sites.layers[layer]
            if found.path(kind) is None:
                where = "" if self.session.alike else f" in the {name}"
                return f"{', '.join(found.kinds)}; no {kind}{where}: {found.missing[kind]}"
        return None

    # -- measuring -----------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """How many there will be, if memory suffices."""
        return sum(len(self.session.batches(places)) for places in self._segments())

    def measure(self, tick: Callable[[], None] = lambda: None) -> list[SiteFindings]:
        """Everything, over all pairs that are needed."""

        def update(batch: PairBatch) -> None:
            self.update(batch)
            tick()

        for places in self._segments():
            self.session.each_batch(update, places)
        return self.found

    def _segments(self) -> list[list[int]]:
        """Pairs that the same configurations patch: those of the smallest subset, what the next adds to it, …"""
        sizes = set(self._sizes)
        if any(found.attribution for found in self.found):
            sizes.add(len(self.session.pairs))
        bounds = [0, *sorted(sizes)]
        pieces = [self._order[first:end] for first, end in itertools.pairwise(bounds)]
        return [sorted(int(place) for place in piece) for piece in pieces]

    def update(self, batch: PairBatch) -> None:
        """One batch, whose pairs every configuration patches all or none of; may be called again on the same pairs."""
        session = self.session
        ours, theirs = session.record_both(batch)
        policy = _Run(session.as_policy, ours, self._policy_sites)
        reference = _Run(session.as_reference, theirs, self._reference_sites)
        for direction, receiver, donor in (("sufficiency", reference, policy), ("necessity", policy, reference)):
            self._attribute(batch, direction, receiver, donor)
            self._patch(batch, direction, receiver, donor)

    def _patch(self, batch: PairBatch, direction: str, receiver: _Run, donor: _Run) -> None:
        session, last = self.session, self.session.num_layers - 1
        first_pair = int(batch.pair_index[0])
        waiting = [
            (number, column, unit)
            for number, found in enumerate(self.found)
            if first_pair in found.exact_pairs
            for column, unit in enumerate(found.units)
        ]
        if not waiting:
            return
        waiting.sort(key=lambda item: item[2].last)
        own = receiver.recording
        with receiver.active() as replay:
            top = replay.unpatched(own)
            base = session.margins(replay, top, batch)
        # A stream that equals the unpatched one ends where that ends, if replaying gives the recording back.
        same_as = own if torch.equal(top, own.after(last)) else None
        del top
        # One half of the room for what the donor gives, one for the streams that are walked.
        limit = max(1, session.max_streams(own.after(-1)) // 2)
        for first in range(0, len(waiting), limit):
            group = waiting[first : first + limit]
            given = self._given([(self.found[number].config, unit) for number, _, unit in group], receiver, donor)
            with receiver.active() as replay:
                streams = []
                for number, column, unit in group:
                    config = self.found[number].config
                    make = _received(config, unit, receiver, given[_source(config, unit)], batch)
                    streams.append(Stream((number, column), unit.last, make))
                walked = replay.walk(own, streams, limit, same_as=same_as, read=batch.read)
                for key, margin in session.each_margin(replay, walked, batch):
                    effect = torch.zeros_like(base) if margin is None else margin - base
                    self._store("exact", direction, batch, key, effect)

    def _given(self, asked: Sequence[tuple[SiteConfig, Unit]], receiver: _Run, donor: _Run) -> dict[Any, torch.Tensor]:
        """What the donor puts in, [R, T, d] each: its own blocks on the receiver's stream, or its own run's tensors."""
        given: dict[Any, torch.Tensor] = {}
        places: dict[int, list[Place]] = {}
        with donor.active() as replay:
            for config, unit in asked:
                source = _source(config, unit)
                if config.site == "block" and source not in given:
                    given[source] = _through(replay, unit, receiver.recording, donor.recording)
                elif config.site != "block" and source[1] not in places.setdefault(unit.layer, []):
                    places[unit.layer].append(source[1])
            for layer, wanted in places.items():
                assert donor.sites is not None
                for place, tensor in donor.sites.record(layer, donor.recording, wanted).items():
                    given[layer, place] = tensor
        self.session.meter.sample()
        return given

    # -- attribution ---------------------------------------------------------------------------------------------------

    def _attribute(self, batch: PairBatch, direction: str, receiver: _Run, donor: _Run) -> None:
        """⟨∂m(receiver)/∂site, donor's − receiver's⟩ over the positions: every unit from one backward pass.

        Models may be one module in two states, so each step of the pass is taken while the receiver's is on.
        """
        asked = [(number, found) for number, found in enumerate(self.found) if found.attribution]
        inside: dict[int, dict[Place, list[tuple[int, int]]]] = {}
        windows: dict[int, dict[Unit, list[tuple[int, int]]]] = {}
        for number, found in asked:
            for column, unit in enumerate(found.units):
                if found.config.site == "block":
                    windows.setdefault(unit.last, {}).setdefault(unit, []).append((number, column))
                else:
                    place = Place(found.config.site, unit.head)
                    inside.setdefault(unit.layer, {}).setdefault(place, []).append((number, column))
        if not inside and not windows:
            return

        def tap(layer: int) -> AbstractContextManager[Any]:
            if layer not in inside:
                return contextlib.nullcontext({})
            assert receiver.sites is not None
            return receiver.sites.tapped(layer, receiver.recording, {place.kind for place in inside[layer]})

        with receiver.active() as replay:
            steps = replay.inner_gradients(
                receiver.recording,
                self.session.margin_objective(replay, batch),
                tap,
                down_to=min([layer - 1 for layer in inside] + list(windows)),
            )
        while True:
            with receiver.active():
                step = next(steps, None)
            if step is None:
                break
            layer, (gradient,), inner = step
            for unit, columns in windows.get(layer, {}).items():
                with donor.active() as replay:
                    moved = _through(replay, unit, receiver.recording, donor.recording).double()
                along = (gradient.double() * (moved - receiver.recording.after(layer).double())).sum(-1)
                self._attributed(direction, batch, columns, along)
            if layer + 1 in inside and inner:
                self._attribute_inside(batch, direction, receiver, donor, layer + 1, inside[layer + 1], inner)
        self.session.meter.sample()

    def _attribute_inside(
        self,
        batch: PairBatch,
        direction: str,
        receiver: _Run,
        donor: _Run,
        layer: int,
        columns: dict[Place, list[tuple[int, int]]],
        gradients: dict[Kind, list[torch.Tensor]],
    ) -> None:
        shape = receiver.recording.after(layer).shape

        def along(place: Place, tensor: torch.Tensor) -> torch.Tensor:
            return (gradients[place.kind][0].view(shape).double() * tensor.double()).sum(-1)

        sums = []
        for run in (donor, receiver):
            with run.active():
                assert run.sites is not None
                sums.append(run.sites.record(layer, run.recording, columns, along))
        for place, where in columns.items():
            self._attributed(direction, batch, where, sums[0][place] - sums[1][place])

    def _attributed(
        self, direction: str, batch: PairBatch, columns: Sequence[tuple[int, int]], along: torch.Tensor
    ) -> None:
        """Sum what each position [R, T] contributes, per pair, over each configuration's positions."""
        for number, column in columns:
            mask = batch.position_mask(self.found[number].config.positions)
            total = sum_into(batch.row_pair, along.masked_fill(~mask, 0.0).sum(-1), batch.num_pairs)
            self._store("attribution", direction, batch, (number, column), total)

    def _store(self, which: str, direction: str, batch: PairBatch, key: Any, values: torch.Tensor) -> None:
        number, column = key
        array = getattr(self.found[number], which)[direction]
        array[batch.pair_index.cpu().numpy(), column] = values.cpu().numpy()


def _source(config: SiteConfig, unit: Unit) -> tuple[Any, ...]:
    """What a unit takes from the donor; the same for configurations that differ in positions only."""
    if config.site == "block":
        return ("block", unit)
    return (unit.layer, Place(config.site, unit.head))


def _through(replay: Replay, unit: Unit, stream: Recording, blocks: Recording) -> torch.Tensor:
    """The model's layers ``unit.layer`` … ``unit.last`` on another run's stream."""
    result = stream.after(unit.layer - 1)
    for layer in range(unit.layer, unit.last + 1):
        result = replay.layer(layer, result, blocks)
    return result


def _received(
    config: SiteConfig, unit: Unit, receiver: _Run, given: torch.Tensor, batch: PairBatch
) -> Callable[[], torch.Tensor]:
    """What joins the receiver's walk after the unit's last layer."""
    mask = batch.position_mask(config.positions)
    if config.site == "block":
        return lambda: patched(receiver.recording.after(unit.last), given, mask)
    place = Place(config.site, unit.head)

    def make() -> torch.Tensor:
        assert receiver.sites is not None
        return receiver.sites.swapped(unit.layer, receiver.recording, place, lambda own: patched(own, given, mask))

    return make


def _grouped(lacking: dict[int, str]) -> str:
    """Layers with what they have and lack, those that are alike together."""
    groups: dict[str, list[int]] = {}
    for layer, words in lacking.items():
        groups.setdefault(words, []).append(layer)
    return "; ".join(
        f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} {'have' if len(layers) > 1 else 'has'} {words}"
        for words, layers in groups.items()
    )
