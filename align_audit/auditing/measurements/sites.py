"""Patch finer sites: attention and MLP outputs, single heads, windows of layers (METHODS §1, "Sites"; §7 for attribution).

One pass over the pairs, both ways: ``sufficiency`` puts the policy's site into the reference, ``necessity`` the reference's
into the policy. What a donor gives is recorded for as many units as may be walked together, then walked and let go.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons
from align_audit.auditing.measurements.site_units import ModelSites, Unit, units_of
from align_audit.auditing.session.accumulators import merge_by_place
from align_audit.auditing.session.estimates import Estimates, estimate, floats
from align_audit.auditing.session.walk import Session
from align_audit.config import SiteConfig
from align_audit.measures.control_variate import ControlVariate, control_variate_means
from align_audit.measures.draws import subset_order
from align_audit.measures.patching import patched, peak_layer
from align_audit.measures.significance import benjamini_hochberg, mean_p_values
from align_audit.measures.sums import sum_into
from align_audit.models.gradients import inner_gradients
from align_audit.models.replay import Recording, Replay, Stream
from align_audit.models.sites import Kind, Place, Sites
from align_audit.probes.batches import PairBatch
from align_audit.record.estimate import Estimate
from align_audit.record.site_curve import SiteCurve, SiteUnit

DIRECTIONS = ("sufficiency", "necessity")
MEASURED_PAIRS = 16
"""Pairs patched exactly beside an attribution, where the configuration does not say."""


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
        self._sites = ModelSites.of(session) if any(config.site != "block" for config in configs) else None
        count = len(session.pairs)
        self._order = subset_order([pair.identity for pair in session.pairs], session.config.seed)
        self._sizes = [min(count, self._exact_pairs(config)) for config in configs]
        self.measured: list[SiteFindings] = []
        for number, (config, size) in enumerate(zip(configs, self._sizes, strict=True)):
            units, absent = units_of(number, config, session.num_layers, self._sites)
            findings = SiteFindings(config, units, np.sort(self._order[:size]), absent)
            for direction in DIRECTIONS:
                findings.exact[direction] = np.full((count, len(units)), np.nan)
                if config.estimator != "exact":
                    findings.attribution[direction] = np.full((count, len(units)), np.nan)
            self.measured.append(findings)

    def _exact_pairs(self, config: SiteConfig) -> int:
        if config.pairs is not None:
            return config.pairs
        return len(self.session.exact_pairs) if config.estimator == "exact" else MEASURED_PAIRS

    # -- measuring -----------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """How many there will be, if memory suffices."""
        return sum(len(self.session.batches(places)) for places in self._segments())

    def measure(self, tick: Callable[[], None] = lambda: None) -> list[SiteFindings]:
        """Everything, over all pairs that are needed."""

        for places in self._segments():
            self.session.each_batch(self.update, places, tick)
        arrays = [
            values
            for findings in self.measured
            for values in (*findings.exact.values(), *findings.attribution.values())
        ]
        self.session.bring_together(functools.partial(merge_by_place, arrays))
        return self.measured

    def _segments(self) -> list[list[int]]:
        """Pairs that the same configurations patch: those of the smallest subset, what the next adds to it, …"""
        sizes = set(self._sizes)
        if any(findings.attribution for findings in self.measured):
            sizes.add(len(self.session.pairs))
        bounds = [0, *sorted(sizes)]
        pieces = [self._order[first:end] for first, end in itertools.pairwise(bounds)]
        return [sorted(int(place) for place in piece) for piece in pieces]

    def update(self, batch: PairBatch) -> None:
        """One batch, whose pairs every configuration patches all or none of; may be called again on the same pairs."""
        session = self.session
        policy_recording, reference_recording = session.record_both(batch)
        policy = _Run(session.as_policy, policy_recording, None if self._sites is None else self._sites.policy)
        reference = _Run(
            session.as_reference, reference_recording, None if self._sites is None else self._sites.reference
        )
        for direction, receiver, donor in (("sufficiency", reference, policy), ("necessity", policy, reference)):
            self._attribute(batch, direction, receiver, donor)
            self._patch(batch, direction, receiver, donor)

    def _patch(self, batch: PairBatch, direction: str, receiver: _Run, donor: _Run) -> None:
        session, last = self.session, self.session.num_layers - 1
        first_pair = int(batch.pair_index[0])
        waiting = [
            (number, column, unit)
            for number, findings in enumerate(self.measured)
            if first_pair in findings.exact_pairs
            for column, unit in enumerate(findings.units)
        ]
        if not waiting:
            return
        waiting.sort(key=lambda item: item[2].last)
        recording = receiver.recording
        with receiver.active() as replay:
            top = replay.layer(last, replay.entering_last(recording), recording)
            # A stream that equals the unpatched one ends where that ends, if replaying gives the recording back.
            strays = session.so_for_any(not torch.equal(top, recording.after(last)))
            del top
            base = session.compared_with(replay, batch, recording, None, list(range(last + 1)) if strays else None)
        same_as = None if strays else recording
        # One half of the room for what the donor gives, one for the streams that are walked.
        limit = session.least(max(1, session.max_streams(recording.after(-1)) // 2))
        for first in range(0, len(waiting), limit):
            group = waiting[first : first + limit]
            given = self._given([(self.measured[number].config, unit) for number, _, unit in group], receiver, donor)
            streams = []
            for number, column, unit in group:
                config = self.measured[number].config
                make = _received(config, unit, receiver, given[_source(config, unit)], batch)
                streams.append(Stream((number, column), unit.last, make))
            with contextlib.closing(
                session.effects(receiver.active, batch, recording, streams, base, same_as=same_as, limit=limit)
            ) as walked:
                for key, effect in walked:
                    assert isinstance(key, tuple)
                    number, column = key
                    _store(self.measured[number].exact[direction], batch, column, effect)

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
        asked = [(number, findings) for number, findings in enumerate(self.measured) if findings.attribution]
        inside: dict[int, dict[Place, list[tuple[int, int]]]] = {}
        windows: dict[int, dict[Unit, list[tuple[int, int]]]] = {}
        for number, findings in asked:
            for column, unit in enumerate(findings.units):
                if findings.config.site == "block":
                    windows.setdefault(unit.last, {}).setdefault(unit, []).append((number, column))
                else:
                    place = Place(findings.config.site, unit.head)
                    inside.setdefault(unit.layer, {}).setdefault(place, []).append((number, column))
        if not inside and not windows:
            return

        def tap(layer: int) -> AbstractContextManager[Any]:
            if layer not in inside:
                return contextlib.nullcontext({})
            assert receiver.sites is not None
            return receiver.sites.tapped(layer, receiver.recording, {place.kind for place in inside[layer]})

        with receiver.active() as replay:
            steps = inner_gradients(
                replay,
                receiver.recording,
                self.session.readout.margin_objective(replay, batch),
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
            mask = batch.position_mask(self.measured[number].config.positions)
            total = sum_into(batch.row_pair, along.masked_fill(~mask, 0.0).sum(-1), batch.num_pairs)
            _store(self.measured[number].attribution[direction], batch, column, total)


def _store(array: np.ndarray, batch: PairBatch, column: int, values: torch.Tensor) -> None:
    """One value a pair of the batch, into one column of [N, U]."""
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
        return receiver.sites.swapped(unit.layer, receiver.recording, place, lambda part: patched(part, given, mask))

    return make


class FinerSites(Measurement):
    """Attention and MLP outputs, heads and windows of layers, as the options ask for."""

    name: ClassVar[str | None] = "sites"

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.collector = SiteCollector(self.session) if self.config.sites else None

    @property
    def batches(self) -> int:
        """A pass over the pairs that are needed."""
        return 0 if self.collector is None else self.collector.batches

    def look_closer(self, tick: Callable[[], None]) -> None:
        """A pass of its own, both ways."""
        if self.collector is not None:
            self.collector.measure(tick)

    @property
    def measured(self) -> list[SiteFindings]:
        """What each configuration gave."""
        return [] if self.collector is None else self.collector.measured

    def part(self) -> tuple[list[SiteCurve], Reasons]:
        """One curve for each configuration, and why numbers, or layers, are missing."""
        curves: list[SiteCurve] = []
        reasons: Reasons = {}
        for number, findings in enumerate(self.measured):
            curve, why = _curve(self.estimates, findings, self.task[Behaviour].shift)
            curves.append(curve)
            reasons |= {f"{number}.{path}": reason for path, reason in why.items()}
        return curves, reasons

    def arrays(self) -> dict[str, np.ndarray]:
        """Per-pair effects, float64 [N, U] in nats."""
        arrays = {}
        for number, findings in enumerate(self.measured):
            for direction, values in findings.exact.items():
                arrays[f"per_pair.sites.{number}.{direction}"] = values
            for direction, values in findings.attribution.items():
                arrays[f"per_pair.sites.{number}.{direction}_attribution"] = values
        return arrays


def _curve(estimates: Estimates, findings: SiteFindings, shift: np.ndarray) -> tuple[SiteCurve, Reasons]:
    config, exact_pairs = findings.config, findings.exact_pairs
    reasons = {} if findings.absent is None else {"units": findings.absent}
    effects: dict[str, list[Estimate]] = {}
    correlation: dict[str, list[float] | None] = {}
    sufficiency: list[ControlVariate] | None = None
    for direction in findings.exact:
        effects[direction], variates = _estimated(estimates, findings, direction)
        sufficiency = variates if direction == "sufficiency" else sufficiency
        correlation[direction] = None if variates is None else floats([variate.correlation for variate in variates])
        name = "correlation" if direction == "sufficiency" else "necessity_correlation"
        for place, variate in enumerate(variates or []):
            if np.isnan(variate.correlation):
                reasons[f"{name}.{place}"] = _why_uncorrelated(variate)
    p_values = floats(benjamini_hochberg(_p_values(estimates, findings, sufficiency)))
    if any(np.isnan(p_values)):
        reasons["sufficiency_p_adjusted"] = "an effect is not finite, or there are too few pairs for a test"
    of_pairs = exact_pairs if config.estimator == "exact" else np.arange(len(shift))
    means = np.array([effect.mean for effect in effects["sufficiency"]])
    peak, why = peak_layer(means, float(shift[of_pairs].mean()), "unit")
    if why is not None:
        reasons["peak"] = why
    return SiteCurve(
        site=config.site,
        positions=config.positions,
        width=config.width,
        estimator=config.estimator,
        pairs=len(of_pairs),
        exact_pairs=len(exact_pairs),
        units=[SiteUnit(layer=unit.layer, last_layer=unit.last, head=unit.head) for unit in findings.units],
        sufficiency=effects["sufficiency"],
        necessity=effects["necessity"],
        sufficiency_p_adjusted=p_values,
        correlation=correlation["sufficiency"],
        necessity_correlation=correlation["necessity"],
        peak=peak,
    ), reasons


def _estimated(
    estimates: Estimates, findings: SiteFindings, direction: str
) -> tuple[list[Estimate], list[ControlVariate] | None]:
    """Each unit's effect as the configuration wants it estimated, and its control variate; None where all is exact."""
    exact, estimator = findings.exact[direction], findings.config.estimator
    if estimator == "exact":
        return estimates.over(findings.exact_pairs).means(exact[findings.exact_pairs]), None
    attribution = findings.attribution[direction]
    options = (estimates.resamples, estimates.confidence, estimates.seed, estimates.groups)
    patched = np.zeros(exact.shape, dtype=bool)
    patched[findings.exact_pairs] = True
    variates = control_variate_means(exact, attribution, *options, patched)
    if estimator == "attribution":
        return estimates.means(attribution), variates
    return [estimate(variate.interval) for variate in variates], variates


def _p_values(estimates: Estimates, findings: SiteFindings, variates: list[ControlVariate] | None) -> np.ndarray:
    """[U] of the same estimates as the sufficiencies: of exact effects, of attributions, or of the control variates."""
    if findings.config.estimator == "control_variate" and variates is not None:
        return np.array([variate.p for variate in variates])
    if findings.config.estimator == "attribution":
        tested, over = findings.attribution["sufficiency"], estimates
    else:
        tested, over = findings.exact["sufficiency"][findings.exact_pairs], estimates.over(findings.exact_pairs)
    return mean_p_values(tested, over.resamples, over.seed, over.groups)


def _why_uncorrelated(variate: ControlVariate) -> str:
    return variate.reason or f"neither effect nor attribution varies over the {variate.exact_pairs} patched pairs"
