"""Layer-wise activation patching: the policy's streams and single updates put into the reference (METHODS §1; AL §3.1)."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.attribution import Attribution
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.session.accumulators import PerPair, State
from align_audit.auditing.session.estimates import estimate, floats
from align_audit.auditing.session.subsets import more_pairs
from align_audit.measures.interval import Interval
from align_audit.measures.layer_set import layer_set
from align_audit.measures.patching import PatchSummary, gain_of, patched, summarize_patching
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch
from align_audit.record import audit_record
from align_audit.record.audit_record import LayerSet


@dataclass
class PatchingState(State):
    """Nats, NaN where not patched.

    Attributes:
        effect: [N, L + 1] m_i(ρ patched after layer l) − m_i(ρ); the first for what enters layer 0.
        transplant: [N, L + 2] the same for π's embedding, each of its blocks, and its norm and head, alone in ρ.
    """

    effect: PerPair
    transplant: PerPair


class Patching(Measurement):
    """``policy_into_reference`` at every layer, and what each block's own update does inside the reference."""

    name: ClassVar[str | None] = "patching"
    state: PatchingState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        pairs, layers = len(self.session.pairs), self.session.num_layers
        self.enabled = self.config.patching.enabled
        self._summary: PatchSummary | None = None
        if self.enabled:
            self.state = PatchingState(PerPair(pairs, layers + 1), PerPair(pairs, layers + 2))

    # -- what is walked ------------------------------------------------------------------------------------------------

    def read(self, recorded: RecordedBatch) -> None:
        """π's blocks on ρ's own stream: what is transplanted."""
        session, layers = self.session, self.session.num_layers
        if not (self.enabled and self.config.patching.transplants and session.is_exact(recorded.batch)):
            return
        with session.as_policy() as replay:
            recorded.transplants = [
                replay.layer(layer, recorded.reference.after(layer - 1), recorded.policy) for layer in range(layers)
            ]
            last = recorded.reference.after(layers - 1)
            recorded.head_margins = session.readout.margins(replay, last, recorded.batch)

    def streams(self, recorded: RecordedBatch) -> Iterator[Stream]:
        """At each layer π's stream, and π's block alone; of pairs that only some effects are wanted of, those."""
        batch, config = recorded.batch, self.config.patching
        if not self.enabled:
            return
        if not self.session.is_exact(batch):
            yield from self.effect_streams(recorded, self.session.layers_of(batch))
            return
        yield from self.effect_streams(recorded, range(-1, self.session.num_layers))
        for layer, moved in enumerate(recorded.transplants):
            yield Stream(("transplant", layer), layer, constant(moved))
        if config.transplants and config.embedding and not _everywhere(recorded, config.positions):
            entering = patch_with(recorded.reference, recorded.policy, batch.position_mask("all"), -1)
            yield Stream(("transplant", -1), -1, entering)

    def effect_streams(self, recorded: RecordedBatch, layers: Sequence[int]) -> Iterator[Stream]:
        """ρ's stream with π's at the patched positions, after each of ``layers``."""
        mask = recorded.batch.position_mask(self.config.patching.positions)
        for layer in layers:
            if layer >= 0 or self.config.patching.embedding:
                yield Stream(("effect", layer), layer, patch_with(recorded.reference, recorded.policy, mask, layer))

    def store(self, key: Hashable, recorded: RecordedBatch, effect: torch.Tensor) -> None:
        """Both arrays begin with what enters layer 0."""
        assert isinstance(key, tuple)
        kind, layer = key
        values = self.state.effect if kind == "effect" else self.state.transplant
        values.put(recorded.batch, effect, layer + 1)

    def commit(self, recorded: RecordedBatch) -> None:
        """The transplants that need no walk of their own."""
        if recorded.head_margins is None or recorded.unpatched is None:
            return
        config, transplant = self.config.patching, self.state.transplant
        head = recorded.head_margins - recorded.unpatched.margins
        transplant.put(recorded.batch, head, self.session.num_layers + 1)
        if config.embedding and _everywhere(recorded, config.positions):
            # At all positions the patch of the embedding is its transplant, and is not walked twice.
            places = recorded.batch.pair_index.cpu().numpy()
            transplant.put_at(places, self.state.effect.values[places, 0], 0)

    # -- more pairs, where attribution explains too little -------------------------------------------------------------

    def look_closer(self, tick: Callable[[], None]) -> None:
        """With ``exact_pairs`` "auto": more pairs are patched, at the layers whose intervals need them."""
        if not self.enabled:
            return
        if self.config.patching.exact_pairs == "auto":
            self._patch_more()
        # What the next passes do is for the first process to say: another one's processor may round otherwise.
        ranks = self.session.models.ranks
        self._summary = ranks.share(self.summary if ranks.rank == 0 else None)

    def _patch_more(self) -> None:
        config, session = self.config.patching, self.session
        if len(session.pairs) <= config.equivalent_pairs:
            warnings.warn(
                f"patching.exact_pairs 'auto' saves nothing here: there are {len(session.pairs)} probe pairs, and intervals "
                f"as of {config.equivalent_pairs} (patching.equivalent_pairs) are wanted. Expected more pairs than that "
                "(max_pairs), which attribution makes cheap",
                stacklevel=2,
            )
        effects = self.state.effect.values[:, 1:]
        estimates, _ = self.task[Attribution].corrected(effects)
        choice = more_pairs(session.choice, effects, estimates, config.equivalent_pairs)
        session.take_choice(session.models.ranks.share(choice))
        wanting = [
            place
            for place, layers in enumerate(session.choice.layers_of())
            if np.isnan(effects[place, [layer for layer in layers if layer >= 0]]).any()
        ]
        if wanting:
            session.each_batch(self._patch_missing, wanting)
            session.bring_together(self.state.merge)

    def _patch_missing(self, batch: PairBatch) -> None:
        """Effects at the layers that the batch is to be patched at by now, and was not when it was measured."""
        session = self.session
        measured = ~np.isnan(self.state.effect.values[int(batch.pair_index[0])])
        layers = session.layers_of_any([layer for layer in session.layers_of(batch) if not measured[layer + 1]])
        if not layers:
            return
        policy = session.record_policy(batch, until=max(layers))
        with session.as_reference() as replay:
            reference = replay.record(batch.model_inputs())
            margins = session.readout.margins(replay, reference.after(session.num_layers - 1), batch)
            unpatched = session.unpatched(replay, batch, reference, margins, is_reference=True)
        recorded = RecordedBatch(batch, policy, reference)
        same_as = reference if unpatched.strays is None else None
        streams = self.effect_streams(recorded, layers)
        with contextlib.closing(
            session.effects(session.as_reference, batch, reference, streams, unpatched, same_as=same_as)
        ) as walked:
            for key, effect in walked:
                self.store(key, recorded, effect)

    # -- what is said --------------------------------------------------------------------------------------------------

    def effect(self, layer: int) -> np.ndarray:
        """[N] effects of the patch after ``layer``, nats."""
        return self.state.effect.at(layer)

    @functools.cached_property
    def direction(self) -> float:
        """1, −1 or 0: the sign of the mean margin shift of the pairs that everything was patched on."""
        return float(np.sign(self.task[Behaviour].shift[self.session.exact_pairs].mean()))

    @property
    def summary(self) -> PatchSummary | None:
        """What the pairs that were patched everywhere say, once the first pass is done; None where patching is off."""
        if self._summary is None and self.enabled:
            self._summary = self._summarized()
        return self._summary

    def _summarized(self) -> PatchSummary:
        exact = self.session.exact_pairs
        summary = summarize_patching(
            self.state.effect.values[exact],
            self.state.transplant.values[exact],
            self.task[Behaviour].shift[exact],
            **self.session.exact_estimates.options,
        )
        return _without_what_was_switched_off(
            summary, embedding=self.config.patching.embedding, transplants=self.config.patching.transplants
        )

    def part(self) -> tuple[audit_record.Patching | None, Reasons]:
        """METHODS §1; None, with a reason, where it is off."""
        summary = self.summary
        if summary is None:
            return None, {"": "switched off (patching.enabled)"}
        reasons: Reasons = {}
        if summary.peak_reason is not None:
            reasons["peak_layer"] = summary.peak_reason
        effect, attribution, p_adjusted = summary.effect, None, summary.effect_p_adjusted
        if Attribution in self.task and self.task[Attribution].enabled:
            effect, p_adjusted, attribution, why = self.task[Attribution].correct(self.state.effect.values[:, 1:])
            reasons |= {f"attribution.{path}": reason for path, reason in why.items()}
        if any(math.isnan(p) for p in p_adjusted):
            reasons["effect_p_adjusted"] = "an effect is not finite, or there are too few pairs for a test"
        standing, why = self._standing_out()
        reasons |= {f"standing_out{path and '.'}{path}": reason for path, reason in why.items()}
        part = audit_record.Patching(
            positions=self.config.patching.positions,
            estimator="exact" if attribution is None else "control_variate",
            attribution=attribution,
            groups=self.session.exact_estimates.independent,
            effect=[estimate(interval) for interval in effect],
            effect_p_adjusted=p_adjusted,
            recovery=[estimate(interval) for interval in summary.recovery],
            layer_gain=[estimate(interval) for interval in summary.layer_gain],
            block_transplant=[estimate(interval) for interval in summary.block_transplant],
            embedding_gain=estimate(summary.embedding_gain),
            head_gain=estimate(summary.head_gain),
            embedding_transplant=estimate(summary.embedding_transplant),
            head_transplant=estimate(summary.head_transplant),
            additivity=estimate(summary.additivity),
            peak_layer=summary.peak_layer,
            standing_out=standing,
        )
        return part, reasons

    def _standing_out(self) -> tuple[LayerSet | None, Reasons]:
        config, exact, estimates = self.config.patching, self.session.exact_pairs, self.session.exact_estimates
        shift = self.task[Behaviour].shift[exact]
        if not config.transplants:
            return None, {"": "block transplants are switched off (patching.transplants)"}
        effects, transplants = self.state.effect.values[exact], self.state.transplant.values[exact]
        # At chosen positions a stream's effect may fall with depth, and its steps are no layer's work.
        gains = np.diff(effects, axis=1) if config.positions == "all" else transplants[:, 1:-1].copy()
        if not config.embedding:
            gains[:, 0] = transplants[:, 1]
        stands = layer_set(
            self.direction * transplants[:, 1:-1],
            self.direction * gains,
            estimates.resamples,
            estimates.confidence,
            estimates.seed,
            estimates.groups,
            estimates.method,
        )
        reasons: Reasons = {}
        if stands.reason is not None:
            reasons = {"stability": stands.reason, "selection_frequency": stands.reason}
            gain = Interval.unknown(stands.reason)
        elif 0 in stands.layers and not config.embedding:
            gain = Interval.unknown("the gain of layer 0 is switched off (patching.embedding)")
        else:
            gain = gain_of(effects, shift, stands.layers, estimates.options)
        return LayerSet(
            layers=list(stands.layers),
            gain=estimate(gain),
            separation=estimate(stands.separation),
            stability=stands.stability,
            selection_frequency=floats(stands.selection_frequency),
            contribution=[estimate(interval) for interval in stands.contribution],
        ), reasons


def _without_what_was_switched_off(summary: PatchSummary, *, embedding: bool, transplants: bool) -> PatchSummary:
    """The true reason where a number is missing because nobody asked for it."""
    if not embedding:
        off = Interval.unknown("switched off (patching.embedding)")
        summary = replace(
            summary,
            embedding_gain=off,
            layer_gain=[off, *summary.layer_gain[1:]],
            embedding_transplant=off,
            additivity=off,
        )
    if not transplants:
        off = Interval.unknown("switched off (patching.transplants)")
        summary = replace(
            summary,
            block_transplant=[off] * len(summary.block_transplant),
            embedding_transplant=off,
            head_transplant=off,
            additivity=off,
            peak_reason=off.reason,
        )
    return summary


def _everywhere(recorded: RecordedBatch, positions: str) -> bool:
    """Whether the patched positions are all there are."""
    batch = recorded.batch
    return bool(torch.equal(batch.position_mask(positions), batch.position_mask("all")))


def constant(stream: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What joins a walk is there already."""
    return lambda: stream


def patch_with(base: Recording, source: Recording, mask: torch.Tensor, layer: int) -> Callable[[], torch.Tensor]:
    """What joins a walk of ``base`` after ``layer``: its stream with that of ``source`` at the ``mask``ed positions."""
    return lambda: patched(base.after(layer), source.after(layer), mask)
