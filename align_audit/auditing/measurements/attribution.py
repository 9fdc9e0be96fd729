"""Attribution patching: first-order effects of every pair, which correct the exact effects of some (METHODS §7)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, RecordedBatch
from align_audit.auditing.session.accumulators import PerPair, State
from align_audit.auditing.session.estimates import floats
from align_audit.auditing.session.reference_cache import ReferenceStreams
from align_audit.measures.control_variate import ControlVariate, beside_attribution, control_variate_means
from align_audit.measures.interval import Interval
from align_audit.measures.patching import patched
from align_audit.measures.significance import benjamini_hochberg
from align_audit.measures.sums import sum_into
from align_audit.models.gradients import stream_gradients
from align_audit.models.replay import Recording, Replay
from align_audit.probes.batches import PairBatch
from align_audit.record import audit_record

logger = logging.getLogger(__name__)


@dataclass
class AttributionState(State):
    """``attribution``: [N, L + 1, points] nats; the first column is for what enters layer 0."""

    attribution: PerPair


class Attribution(Measurement):
    """⟨∂m_i/∂h_l, h_l(π) − h_l(ρ)⟩ over the patched positions, where only some pairs are patched.

    It also makes the recordings of a batch, because of the reference it can keep what it needs from audit to audit.

    Attributes:
        enabled: ``patching.exact_pairs`` asks for it.
        kept: the reference's streams and gradients on disk; None where nobody asked, or no run keeps anything.
    """

    name: ClassVar[str | None] = None
    state: AttributionState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        config = self.config.patching
        self.enabled = config.enabled and config.exact_pairs is not None
        self.kept = _kept_streams(task)
        if self.enabled:
            points = len(config.attribution_points)
            self.state = AttributionState(PerPair(len(self.session.pairs), self.session.num_layers + 1, points))

    # -- recordings ----------------------------------------------------------------------------------------------------

    def record(self, batch: PairBatch) -> RecordedBatch:
        """Both models' recordings, and ρ's own gradients by layer: none where they were not kept."""
        stored = self.kept.get(batch) if self.kept is not None else {}
        layers = range(-1, self.session.num_layers)
        gradients = {layer: stored[name] for layer in reversed(layers) if (name := f"gradient.{layer}") in stored}
        streams = [stored[name] for layer in layers if (name := f"stream.{layer}") in stored]
        if self._only_compared(batch):
            if streams and gradients:
                return RecordedBatch(batch, self.session.record_policy(batch), Recording(streams, []), gradients)
            gradients = {}  # kept without streams by an audit that had to record them: kept whole this time
        return RecordedBatch(batch, *self.session.record_both(batch), gradients)

    def _only_compared(self, batch: PairBatch) -> bool:
        """Whether ρ's streams of this batch are compared with π's and no run is continued from them."""
        return not self.session.layers_of(batch) and self.config.patching.attribution_points == (0.0,)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def read(self, recorded: RecordedBatch) -> None:
        """All layers in one backward pass.

        The gradient is ρ's, its layers linearized where ``attribution_points`` says on the line between both models'
        streams: at ρ's own (0) it is the effect to first order (Nanda 2023); further on it sees how the effect bends.
        """
        if not self.enabled:
            return
        batch, owner = recorded.batch, recorded.batch.row_pair
        mask = batch.position_mask(self.config.patching.positions)
        fresh: dict[int, torch.Tensor] = {}
        with self.session.as_reference() as replay:
            for place, point in enumerate(self.config.patching.attribution_points):
                for layer, gradient in self._gradients(replay, recorded, mask, point, fresh):
                    moved = recorded.policy.after(layer).double() - recorded.reference.after(layer).double()
                    along = (gradient.double() * moved).sum(-1).masked_fill(~mask, 0.0).sum(-1)
                    self.state.attribution.put(batch, sum_into(owner, along, batch.num_pairs), layer + 1, place)
        self.session.meter.sample()
        recorded.reference_gradients = {}
        if self.kept is not None and fresh:
            tensors = {f"gradient.{layer}": gradient for layer, gradient in fresh.items()}
            if self._only_compared(batch):
                layers = range(-1, self.session.num_layers)
                tensors |= {f"stream.{layer}": recorded.reference.after(layer) for layer in layers}
            self.kept.put(batch, tensors)

    def _gradients(
        self,
        replay: Replay,
        recorded: RecordedBatch,
        mask: torch.Tensor,
        point: float,
        fresh: dict[int, torch.Tensor],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """∂m(ρ)/∂h_l by layer, ρ's layers linearized at ``point``; what may be kept is put into ``fresh``."""
        batch, config = recorded.batch, self.config.patching
        margin = self.session.readout.margin_objective(replay, batch)
        first = -1 if config.embedding else 0
        if config.attribution_path == "joint":
            if point == 0.0 and recorded.reference_gradients:
                yield from recorded.reference_gradients.items()
                return
            at = _between(recorded.reference, recorded.policy, point)
            for layer, (gradient,) in stream_gradients(replay, at, margin, down_to=first):
                if point == 0.0 and self.kept is not None:
                    fresh[layer] = gradient
                yield layer, gradient
            return
        for start in range(first, self.session.num_layers):
            at = self._patched_partly(replay, recorded, mask, start, point)
            for layer, (gradient,) in stream_gradients(replay, at, margin, down_to=start):
                if layer == start:
                    yield layer, gradient

    def _patched_partly(
        self, replay: Replay, recorded: RecordedBatch, mask: torch.Tensor, start: int, point: float
    ) -> Recording:
        """ρ's run whose stream after layer ``start`` moves by ``point`` of the way to that of π."""
        base = recorded.reference
        way = _between(base, recorded.policy, point).after(start)
        streams = [*base.streams[: start + 1], patched(base.after(start), way, mask)]
        for layer in range(start + 1, self.session.num_layers):
            streams.append(replay.layer(layer, streams[-1], base))
        return Recording(streams, base.calls)

    # -- corrected effects ---------------------------------------------------------------------------------------------

    def corrected(self, effects: np.ndarray) -> tuple[list[ControlVariate], list[ControlVariate]]:
        """Mean effect of each layer, corrected by attribution and margin shift; and by attribution alone.

        Args:
            effects: [N, L] nats, NaN where not patched.
        """
        estimates = self.estimates
        options = (estimates.resamples, estimates.confidence, estimates.seed, estimates.groups)
        attributed = self.state.attribution.values[:, 1:]
        beside = beside_attribution(attributed, self.task[Behaviour].shift, len(self.session.exact_pairs))
        patched = self.session.choice.patched
        return (
            control_variate_means(effects, beside, *options, patched),
            control_variate_means(effects, attributed, *options, patched),
        )

    def correct(
        self, effects: np.ndarray
    ) -> tuple[list[Interval], list[float], audit_record.Attribution, dict[str, str]]:
        """Each layer's effect as corrected and its p-value among them all, the record's words on the correction, and why
        numbers of them are NaN."""
        combined, alone = self.corrected(effects)
        config = self.config.patching
        part = audit_record.Attribution(
            exact_pairs=len(self.session.exact_pairs),
            patched_pairs=[variate.exact_pairs for variate in combined],
            pairs=len(self.session.pairs),
            correlation=floats([variate.correlation for variate in alone]),
            joint_correlation=floats([variate.correlation for variate in combined]),
            equivalent_pairs=floats([variate.equivalent_pairs for variate in combined]),
            points=list(config.attribution_points),
            path=config.attribution_path,
            mean=self.estimates.means(self.state.attribution.values[:, 1:].mean(axis=2)),
        )
        reasons: dict[str, str] = {}
        for layer, (single, joint) in enumerate(zip(alone, combined, strict=True)):
            flat = f"neither effect nor attribution varies over the {joint.exact_pairs} patched pairs"
            if math.isnan(single.correlation) or single.reason is not None:
                reasons[f"correlation.{layer}"] = single.reason or flat
            for name, value in (
                ("joint_correlation", joint.correlation), ("equivalent_pairs", joint.equivalent_pairs),
            ):  # fmt: skip
                if math.isnan(value) or joint.reason is not None:
                    reasons[f"{name}.{layer}"] = joint.reason or flat
        p_adjusted = floats(benjamini_hochberg(np.array([variate.p for variate in combined])))
        return [variate.interval for variate in combined], p_adjusted, part, reasons

    def look_closer(self, tick: Callable[[], None]) -> None:
        """What of the kept streams no batch had use for goes."""
        if self.kept is not None:
            self.kept.forget_the_rest()


def _kept_streams(task: AuditTask) -> ReferenceStreams | None:
    session, config = task.session, task.session.config.patching
    directory = task.cache.directory
    if not config.enabled or not config.keep_reference or directory is None:
        return None
    if session.models.ranks.size > 1:
        logger.info("patching.keep_reference keeps nothing where training runs on several processes")
        return None
    return ReferenceStreams.of(
        session,
        directory,
        probes=task.request.probes.content_hash,
        weights=session.models.hashes[1],
        configuration=task.session.models.reference_build,
        # Before training policy and reference must agree to the bit, so there nothing is taken on trust.
        read=not task.request.at_start,
    )


def _between(base: Recording, source: Recording, point: float) -> Recording:
    """The run of ``base`` with its streams moved by ``point`` of the way to those of ``source``."""
    if point == 0.0:
        return base
    streams = [torch.lerp(a, b.to(a.dtype), point) for a, b in zip(base.streams, source.streams, strict=True)]
    return Recording(streams, base.calls)
