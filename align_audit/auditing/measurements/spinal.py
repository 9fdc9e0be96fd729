"""SPINAL: how fast each layer's spectrum decays and how far its token distribution travels (METHODS §5; arXiv 2601.06238)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.layer_spectra import fitted_layers
from align_audit.auditing.measurements.lens_walk import LensWalk, travelled
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.session.accumulators import PerPair, Rows, State
from align_audit.auditing.session.estimates import floats
from align_audit.auditing.session.reference_cache import ReferenceTrace, computed_by
from align_audit.measures import spinal as scores
from align_audit.measures.draws import keep_rows, prefix_keys
from align_audit.measures.row_sample import sampling_error
from align_audit.measures.sums import sum_into
from align_audit.models.gradients import stream_gradients
from align_audit.models.replay import Recording, Replay
from align_audit.record.audit_record import DepthTrace
from align_audit.record.audit_record import Spinal as SpinalPart
from align_audit.record.estimate import Estimate


@dataclass
class SpinalState(State):
    """``gradient_norm``: [N, L] ‖∂m_i(π)/∂h_l‖_F; rows are streams [n, L, d] at sampled prediction positions."""

    gradient_norm: PerPair
    policy_rows: Rows
    reference_rows: Rows


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Which token rows enter the spectra.

    Attributes:
        keys: int64 [n], of every position of every sequence, pair by pair, chosen before rejected.
        first: [2 N] where each sequence begins among them.
        kept: bool [n].
        available: how many different rows there are to draw from.
    """

    keys: np.ndarray
    first: np.ndarray
    kept: np.ndarray
    available: int


class Spinal(Measurement):
    """Depth traces of both models on the same rows, and the scores made of them."""

    name: ClassVar[str | None] = "spinal"
    state: SpinalState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.enabled = self.config.spinal.enabled
        self.state = SpinalState(PerPair(len(self.session.pairs), self.session.num_layers), Rows(), Rows())
        self._sampled = self._sample_rows() if self.enabled else None
        # The first process's word: it alone has what an earlier run left on disk.
        kept = task.cache.get(self._trace_key()) if self.enabled else None
        self._reference_trace = self.session.models.ranks.share(kept)
        self._reference_from = self._first_reference_key() if self.enabled else None
        self._policy_trace: tuple[DepthTrace, Reasons] | None = None
        self._distances: list[np.ndarray] = []

    def _trace_key(self) -> tuple[str, ...]:
        """What the reference's depth trace depends on."""
        config, models = self.config, self.session.models
        return (
            models.hashes[1], models.reference_build, self.task.request.probes.content_hash,
            config.spinal.model_dump_json(), str(config.seed), str(models.reference.compute_dtype),
            computed_by(self.session.device),
        )  # fmt: skip

    # -- rows and gradients --------------------------------------------------------------------------------------------

    def _sample_rows(self) -> SampledRows:
        """Which prediction entries enter the spectra: chosen by hash before anything runs, so batches cannot matter.

        A position whose whole prefix occurs before, in the pair or in any other, counts once: equal rows would make singular
        values of rounding errors.
        """
        pairs = self.session.pairs
        keys = [prefix_keys(ids, self.config.seed) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        lengths = np.array([len(each) for each in keys])
        flat, first = np.concatenate(keys), np.concatenate([[0], np.cumsum(lengths)[:-1]])
        read = np.zeros(len(flat), dtype=bool)
        for place, pair in enumerate(pairs):
            for side, positions in enumerate((pair.chosen_predictions, pair.rejected_predictions)):
                start = first[2 * place + side]
                read[start + positions.start : start + positions.stop] = True
        at = np.flatnonzero(read)
        distinct, places = np.unique(flat[at], return_index=True)
        kept = np.zeros(len(flat), dtype=bool)
        kept[at[places[keep_rows(distinct, self.config.spinal.max_rows)]]] = True
        return SampledRows(flat, first, kept, len(distinct))

    def _first_reference_key(self) -> int | None:
        """The key from which on rows of the reference may have to walk; None: none has to, as enough of them have walked."""
        assert self._sampled is not None
        keys = np.sort(self._sampled.keys[self._sampled.kept])
        walked = 0 if self._reference_trace is None else len(self._reference_trace.distances)
        if self._reference_trace is not None and self.config.spinal.transport_rows != "auto":
            return None
        return int(keys[walked]) if walked < len(keys) else None

    def read(self, recorded: RecordedBatch) -> None:
        """On pairs of the controls, the policy's gradients."""
        if self.enabled and self.config.spinal.gradient_concentration and self.session.is_control(recorded.batch):
            with self.session.as_policy() as replay:
                self._gradients(replay, recorded)

    def commit(self, recorded: RecordedBatch) -> None:
        """The batch's sampled rows of both models."""
        if self._sampled is None:
            return
        batch, state = recorded.batch, self.state
        owner = batch.pair_index[batch.pair].cpu().numpy()
        place = batch.place[batch.row, batch.position].cpu().numpy()
        entries = self._sampled.first[2 * owner + batch.side.cpu().numpy()] + place
        chosen = np.flatnonzero(self._sampled.kept[entries] & batch.distinct.cpu().numpy())
        keys = self._sampled.keys[entries]
        picked = torch.from_numpy(chosen).to(batch.row.device)
        at = (batch.row[picked], batch.position[picked])
        policy = self._rows(recorded.policy, at)
        reference = None
        if self._reference_from is not None:
            asked = keys[chosen] >= self._reference_from
            among = torch.from_numpy(np.flatnonzero(asked)).to(batch.row.device)
            reference = self._rows(recorded.reference, (at[0][among], at[1][among]))
        # Added last, and together: a batch that runs out of memory comes again.
        state.policy_rows.add(keys[chosen], policy)
        if reference is not None:
            state.reference_rows.add(keys[chosen][asked], reference)

    def _rows(self, recording: Recording, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The residual stream after every layer at some positions, [n, L, d], on the CPU."""
        return torch.stack([recording.after(layer)[at] for layer in range(self.session.num_layers)], dim=1).cpu()

    def _gradients(self, replay: Replay, recorded: RecordedBatch) -> None:
        """g_il = ‖∂m_i(π)/∂h_l‖_F over all positions of both sequences of pair i.

        Where both sequences share the row of their prompt, each one's log-probability is differentiated for itself: the
        norm is over the positions of two sequences, in which the prompt stands twice.
        """
        batch, readout = recorded.batch, self.session.readout
        objective = readout.sides(replay, batch) if batch.shared else readout.margin_objective(replay, batch)
        for layer, gradients in stream_gradients(replay, recorded.policy, objective):
            squares = torch.stack([gradient.double().square().sum(dim=(1, 2)) for gradient in gradients]).sum(0)
            self.state.gradient_norm.put(batch, sum_into(batch.row_pair, squares, batch.num_pairs).sqrt(), layer)
        self.session.meter.sample()

    # -- transport -----------------------------------------------------------------------------------------------------

    def look_closer(self, tick: Callable[[], None]) -> None:
        """Both traces, of all rows together; what is the reference's alone is kept in the run's cache from now on.

        Of a policy that is its reference still, as before the first step, nothing is made twice.
        """
        if not self.enabled or self._sampled is None:
            return
        session, state, kept = self.session, self.state, self._reference_trace
        nowhere = np.empty((0, session.num_layers - 1))
        walked = (
            nowhere if kept is None else np.array(kept.distances).reshape(len(kept.distances), session.num_layers - 1)
        )
        of_reference = LensWalk(session, session.as_reference, state.reference_rows, walked)
        identical = Behaviour in self.task and self.task[Behaviour].identical
        alike = of_reference if identical else None
        walks = [LensWalk(session, session.as_policy, state.policy_rows, nowhere, alike), of_reference]
        asked = self.config.spinal.transport_rows
        self._distances = travelled(walks, asked, len(state.policy_rows), self._sampled.available)
        policy, reference = session.models.policy, session.models.reference
        if kept is None:
            traced = self.depth_trace(state.reference_rows, self._distances[1], reference)
        else:
            traced = self._with_transport(kept.trace, kept.reasons, self._distances[1])
        if identical and policy.compute_dtype == reference.compute_dtype:
            self._policy_trace = self._with_transport(*traced, self._distances[0])
        else:
            self._policy_trace = self.depth_trace(state.policy_rows, self._distances[0], policy)
        self._reference_trace = ReferenceTrace.of(self._trace_key(), *traced, of_reference.distances.tolist())
        if kept is None or len(of_reference.distances) > len(walked):
            self.task.cache.put(self._reference_trace)
        state.policy_rows.forget()
        state.reference_rows.forget()

    # -- what is said --------------------------------------------------------------------------------------------------

    def part(self) -> tuple[SpinalPart | None, Reasons]:
        """Both traces and the scores."""
        if self._policy_trace is None or self._reference_trace is None:
            return None, {"": "switched off (spinal.enabled)"}
        policy, why = self._policy_trace
        part, reasons = self._scores(policy, self._reference_trace)
        reasons |= {f"policy.{path}": reason for path, reason in why.items()}
        reasons |= {f"reference.{path}": reason for path, reason in self._reference_trace.reasons.items()}
        return part, reasons

    def depth_trace(self, rows: Rows, distances: np.ndarray, replay: Replay) -> tuple[DepthTrace, Reasons]:
        """One model's trace, and why a layer's contraction or transport is NaN.

        Args:
            rows: [rows, L, d] of all processes.
            distances: what they travel [rows, L − 1], radians.
            replay: the model.
        """
        fits, floor = zip(*fitted_layers(self.session, rows, replay, self.config.spinal.window), strict=True)
        why = {}
        for layer, fit in enumerate(fits):
            if fit.reason is not None:
                for name in ("contraction", "contraction_r2", "contraction_stderr"):
                    why[f"{name}.{layer}"] = fit.reason
        trace = DepthTrace(
            contraction=[fit.alpha for fit in fits],
            contraction_r2=[fit.r2 for fit in fits],
            contraction_stderr=[fit.stderr for fit in fits],
            transport=[],
            singular_values=[int(fit.n) for fit in fits],
            below_rounding_floor=[int(count) for count in floor],
        )
        return self._with_transport(trace, why, distances)

    def _with_transport(self, trace: DepthTrace, reasons: Reasons, distances: np.ndarray) -> tuple[DepthTrace, Reasons]:
        """The trace, and its reasons, with the transport of these distances in place of what it had."""
        why = {path: reason for path, reason in reasons.items() if not path.startswith("transport")}
        for layer in np.flatnonzero(~np.isfinite(distances).all(axis=0)).tolist():
            for name in ("transport", "transport_stderr"):
                why[f"{name}.{layer}"] = f"the logit lens at layer {layer} or {layer + 1} is not finite on some rows"
        unknown = [math.nan] * distances.shape[1]
        moved = {
            "transport": floats(distances.mean(axis=0)) if len(distances) else unknown,
            "transport_stderr": floats(self._row_error(distances)),
        }
        return trace.model_copy(update=moved), why

    def _row_error(self, values: np.ndarray) -> np.ndarray:
        """Standard error [k] of means over all rows, from those [n, k] that were drawn."""
        assert self._sampled is not None
        return sampling_error(values, self._sampled.available)

    def _scores(self, policy: DepthTrace, kept: ReferenceTrace) -> tuple[SpinalPart, Reasons]:
        config, reference = self.config.spinal, kept.trace
        terminal = scores.terminal_layers(self.session.num_layers, config.terminal_fraction)
        of_policy = (np.array(policy.contraction), np.array(policy.transport))
        of_reference = (np.array(reference.contraction), np.array(reference.transport))
        delta, no_delta = scores.delta_align(of_policy[0], of_reference[0], of_policy[1], of_reference[1], terminal)
        coherence, no_coherence = scores.coherence(*of_policy, *of_reference, terminal)
        reference_coherence, no_reference = scores.coherence(*of_reference, *of_reference, terminal)
        if config.gradient_concentration:
            norms = self.state.gradient_norm.values[self.session.control_pairs]
            concentration = self.session.control_estimates.mean(scores.gradient_share(norms, terminal), 0.0, 1.0)
        else:
            concentration = Estimate.unknown("switched off (spinal.gradient_concentration)")
        score, no_score = scores.spinal_score(delta, coherence, concentration.mean, config.weights)
        reasons = {
            name: why
            for name, why in (
                ("delta_align", no_delta), ("coherence", no_coherence), ("reference_coherence", no_reference),
                ("score", no_score),
            )
            if why is not None
        }  # fmt: skip
        left_open, why = self._left_open(terminal, no_delta)
        reasons |= why
        part = SpinalPart(
            policy=policy,
            reference=reference,
            terminal_layers=[int(layer) for layer in terminal],
            rows=len(self.state.policy_rows),
            rows_available=0 if self._sampled is None else self._sampled.available,
            transport_rows=len(self._distances[0]),
            delta_align=delta,
            coherence=coherence,
            reference_coherence=reference_coherence,
            gradient_concentration=concentration,
            score=score,
            **left_open,
        )
        return part, reasons

    def _left_open(self, terminal: Sequence[int], no_delta: str | None) -> tuple[dict[str, Any], Reasons]:
        """Standard errors, of the rows that were drawn, of what compares both models on the same rows."""
        change = self._distances[0] - self._distances[1]
        inner = [layer for layer in terminal if layer < change.shape[1]]
        by_layer, reasons = self._row_error(change), {}
        for layer in np.flatnonzero(np.isnan(by_layer)).tolist():
            reasons[f"transport_change_stderr.{layer}"] = f"transport is not known at layer {layer} of both models"
        of_delta = float(self._row_error(change[:, inner].mean(axis=1, keepdims=True))[0]) if inner else math.nan
        if math.isnan(of_delta):
            reasons["delta_align_stderr"] = no_delta or "transport is not known over the terminal block"
        return {"transport_change_stderr": floats(by_layer), "delta_align_stderr": of_delta}, reasons
