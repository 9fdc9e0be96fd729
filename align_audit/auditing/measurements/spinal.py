"""SPINAL: how fast each layer's spectrum decays and how far its token distribution travels (METHODS §5; arXiv 2601.06238)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.session.accumulators import PerPair, Rows, State
from align_audit.auditing.session.estimates import floats
from align_audit.auditing.session.memory import out_of_memory
from align_audit.auditing.session.reference_cache import ReferenceTrace
from align_audit.measures import spinal as scores
from align_audit.measures.draws import keep_rows, prefix_keys
from align_audit.measures.spectrum import (
    Contraction,
    below_rounding_floor,
    contraction,
    numerical_rank,
    singular_values,
)
from align_audit.measures.sums import sum_into
from align_audit.measures.transport import TransportAccumulator
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
        self._policy_trace: tuple[DepthTrace, Reasons] | None = None

    def _trace_key(self) -> tuple[str, ...]:
        """What the reference's depth trace depends on."""
        config, models = self.config, self.session.models
        return (
            models.hashes[1], models.reference_build, self.task.request.probes.content_hash,
            config.spinal.model_dump_json(), str(config.seed), str(models.reference.compute_dtype),
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
        reference = self._rows(recorded.reference, at) if self._reference_trace is None else None
        # Added last, and together: a batch that runs out of memory comes again.
        state.policy_rows.add(keys[chosen], policy)
        if reference is not None:
            state.reference_rows.add(keys[chosen], reference)

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
        """Both traces, of all rows together; the reference's is kept in the run's cache from now on."""
        if not self.enabled:
            return
        rows, models = self.state.policy_rows, self.session.models
        with self.session.as_policy() as replay:
            distances = self._travelled(replay, rows)
        self._policy_trace = self.depth_trace(rows, distances, _epsilon(models.policy))
        if self._reference_trace is None:
            rows = self.state.reference_rows
            with self.session.as_reference() as replay:
                distances = self._travelled(replay, rows)
            traced = self.depth_trace(rows, distances, _epsilon(models.reference))
            self._reference_trace = self.task.cache.put(self._trace_key(), *traced)

    def _travelled(self, replay: Replay, rows: Rows) -> np.ndarray:
        """Distances [n, L − 1] that the logit lens of n rows travels from layer to layer, by ascending key.

        In blocks as large as the head is fast at, however few rows a batch had; processes take turns of them.
        """
        if not len(rows):
            return np.empty((0, replay.num_layers - 1))
        order, ranks = rows.order().numpy(), self.session.models.ranks
        size = next(replay.head_blocks(2**62)).stop
        blocks = [order[first : first + size] for first in range(0, len(order), size)]
        walked = {
            number: self._block_travelled(replay, rows, block)
            for number, block in enumerate(blocks)
            if number % ranks.size == ranks.rank
        }
        everywhere = {number: part for said in ranks.gather(walked) for number, part in said.items()}
        return np.concatenate([everywhere[number] for number in range(len(blocks))])

    def _block_travelled(self, replay: Replay, rows: Rows, block: np.ndarray) -> np.ndarray:
        """Of the rows at these places, which walk up the layers, so that two layers' logits of them are held; in smaller
        blocks after running out of memory."""
        walks, done, size = TransportAccumulator(), 0, len(block)
        while done < len(block):
            streams = rows.take(block[done : done + size])
            try:
                walks.update(self._lens(replay, streams, layer) for layer in range(replay.num_layers))
                done += len(streams)
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(streams) == 1:
                    raise
            # Out of the handler, so that the failed call's tensors are free.
            self.session.free_memory()
            size = len(streams) // 2
        return walks.freeze().numpy()

    def _lens(self, replay: Replay, block: torch.Tensor, layer: int) -> torch.Tensor:
        """The logit lens [n, V] of rows [n, L, d] after one layer."""
        logits = replay.head(block[:, layer].to(replay.device))
        self.session.meter.sample()
        return logits

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

    def depth_trace(self, rows: Rows, distances: np.ndarray, epsilon: float) -> tuple[DepthTrace, Reasons]:
        """One model's trace, and why a layer's contraction or transport is NaN.

        Args:
            rows: by batch [n, L, d].
            distances: what they travel [rows, L − 1], radians.
            epsilon: rounding unit of the dtype that the model computes in.
        """
        ranks, layers = self.session.models.ranks, self.session.num_layers
        order = rows.order()
        mine = {layer: self._fit(rows, order, layer, epsilon) for layer in range(ranks.rank, layers, ranks.size)}
        everywhere = {layer: fitted for said in ranks.gather(mine) for layer, fitted in said.items()}
        fits, floor = zip(*(everywhere[layer] for layer in range(layers)), strict=True)
        why = {}
        for layer, fit in enumerate(fits):
            if fit.reason is not None:
                for name in ("contraction", "contraction_r2", "contraction_stderr"):
                    why[f"{name}.{layer}"] = fit.reason
        for layer in np.flatnonzero(~np.isfinite(distances).all(axis=0)).tolist():
            why[f"transport.{layer}"] = f"the logit lens at layer {layer} or {layer + 1} is not finite on some rows"
        trace = DepthTrace(
            contraction=[fit.alpha for fit in fits],
            contraction_r2=[fit.r2 for fit in fits],
            contraction_stderr=[fit.stderr for fit in fits],
            transport=floats(distances.mean(axis=0)) if len(distances) else [math.nan] * distances.shape[1],
            singular_values=[int(fit.n) for fit in fits],
            below_rounding_floor=[int(count) for count in floor],
        )
        return trace, why

    def _fit(self, rows: Rows, order: torch.Tensor, layer: int, epsilon: float) -> tuple[Contraction, int]:
        """Of one layer, and how many singular values lie below the floor of rounding."""
        # One layer at a time, in the order of the keys: no second copy of all rows, and batches cannot matter.
        pooled = torch.cat([part[:, layer] for part in rows.parts])[order]
        spectrum = singular_values(pooled)
        rank = numerical_rank(pooled, epsilon, spectrum)
        fit = contraction(spectrum, len(pooled), pooled.shape[1], rank, self.config.spinal.window)
        return fit, int(below_rounding_floor(spectrum, epsilon))

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
            concentration = self.session.control_estimates.mean(scores.gradient_share(norms, terminal))
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
        part = SpinalPart(
            policy=policy,
            reference=reference,
            terminal_layers=[int(layer) for layer in terminal],
            rows=len(self.state.policy_rows),
            rows_available=0 if self._sampled is None else self._sampled.available,
            delta_align=delta,
            coherence=coherence,
            reference_coherence=reference_coherence,
            gradient_concentration=concentration,
            score=score,
        )
        return part, reasons


def _epsilon(replay: Replay) -> float:
    """Rounding unit of the dtype that a model computes in."""
    return float(torch.finfo(replay.compute_dtype).eps)
