"""Walk every probe pair once and keep what the measures need: numbers per pair, and a bounded sample of token rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from align_audit.auditing.session.reference_streams import ReferenceStreams
from align_audit.auditing.session.walk import Session, out_of_memory
from align_audit.measures.margin import compare_readouts, sum_by_pair
from align_audit.measures.patching import noise_directions, noised, patched
from align_audit.measures.spectrum import keep_rows, row_keys
from align_audit.measures.sums import sum_into
from align_audit.measures.transport import TransportAccumulator
from align_audit.models.replay import Recording, Replay, Stream, equal_streams
from align_audit.probes.batches import PairBatch

if TYPE_CHECKING:
    from align_audit.auditing.measurements.low_rank import TokenGrams


@dataclass
class Collected:
    """Per-pair numbers, float64, in the order of the ``ProbeSet``; N pairs, L layers.

    Effects and transplants are in nats and NaN where they were not asked for.
    """

    num_pairs: int
    num_layers: int
    noise_draws: np.ndarray
    """[L] random directions that were patched at each layer."""
    exact_pairs: np.ndarray
    """Places of the pairs that were patched at every layer; of the others the effects at some layers at most are known."""
    control_pairs: np.ndarray
    """Places of the pairs on which noise, reverse, random subspaces and gradients were measured; NaN elsewhere."""
    per_pair: dict[str, np.ndarray] = field(default_factory=dict)
    identical: bool = True
    """Policy and reference gave the same residual streams, bit by bit, on every probe token."""
    strays: bool = False
    """Replaying a recording of the reference did not give it back bit by bit."""
    identity_pairs: list[int] = field(default_factory=list)
    """Places of the pairs on which the identity control was measured."""
    reference_margins: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """Of each batch, by the places of its pairs: [B], for what else is walked on the same batch, in the same shapes. A batch
    that was planned anew after running out of memory is not among them."""
    rows_available: int = 0
    row_keys: list[np.ndarray] = field(default_factory=list)
    policy_rows: list[torch.Tensor] = field(default_factory=list)
    reference_rows: list[torch.Tensor] = field(default_factory=list)
    policy_transport: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """[rows, L − 1], in the order of ``row_keys``; so too the reference's, where it was measured."""
    reference_transport: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    def array(self, name: str, *shape: int) -> np.ndarray:
        """The array of that name, [N, *shape], made of NaN the first time."""
        if name not in self.per_pair:
            self.per_pair[name] = np.full((self.num_pairs, *shape), np.nan)
        return self.per_pair[name]

    def put(self, name: str, batch: PairBatch, values: torch.Tensor | np.ndarray, *where: int) -> None:
        """Store one value a pair of the batch; ``where`` indexes the trailing axes of the array."""
        index: Any = batch.pair_index.cpu().numpy()
        self.per_pair[name][(index, *where)] = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)


class Collector:
    """Gathers from batches, one ``update`` each, then freezes into :class:`Collected`.

    An ``update`` that raises leaves nothing behind that a second one on the same pairs would not overwrite.
    """

    def __init__(
        self,
        session: Session,
        *,
        reference_rows: bool = True,
        kept: ReferenceStreams | None = None,
        token_grams: TokenGrams | None = None,
    ) -> None:
        config = session.config
        self.session = session
        self.config = config
        self._reference_rows = reference_rows
        self._kept_streams = kept
        self._token_grams = token_grams
        self._replayed: dict[bool, int] = {}
        """Batches whose recordings were replayed as a check, by whether the model is the reference."""
        self._strays: dict[bool, bool] = {}
        layers = session.num_layers
        found = Collected(
            len(session.pairs),
            layers,
            np.zeros(layers, dtype=int),
            exact_pairs=session.exact_pairs,
            control_pairs=session.control_pairs,
        )
        for name in (
            "chosen_logp", "rejected_logp", "reference_chosen_logp", "reference_rejected_logp", "chosen_tokens",
            "rejected_tokens", "kl", "entropy", "reference_entropy", "token_accuracy", "reference_token_accuracy",
        ):  # fmt: skip
            found.array(name)
        found.array("features", layers)
        found.array("gradient_norm", layers)
        if config.patching.enabled:
            found.array("effect", layers + 1)
            found.array("reverse", layers + 1)
            found.array("identity", layers)
            found.array("noise", config.patching.noise_draws, layers)
            found.array("transplant", layers + 2)
            if config.patching.exact_pairs is not None:
                found.array("attribution", layers + 1, len(config.patching.attribution_points))
            if config.patching.noise_draws:
                found.noise_draws[:] = 1
        self.found = found
        self._kept = self._sample_rows() if config.spinal.enabled else {}

    # -- one batch -----------------------------------------------------------------------------------------------------

    def update(self, batch: PairBatch) -> None:
        """Measure one batch."""
        policy, reference, gradients = self._record(batch)
        valid = batch.position_mask("all")
        if not equal_streams(policy.streams, reference.streams, valid):
            self.found.identical = False
        if self.config.localization.enabled:
            self._distances(batch, policy, reference)
        ours, theirs = self._behaviour(batch, policy, reference)
        if self.config.patching.enabled:
            if self.config.patching.exact_pairs is not None:
                self._attribute(batch, policy, reference, gradients)
                del gradients
            if self.session.is_exact(batch):
                self._patch(batch, policy, reference, ours, theirs)
            else:
                self._patch_effects(batch, self.session.layers_of(batch), policy, reference, theirs)
        if self._token_grams is not None:
            self._token_grams.update(batch, policy, reference)
        if self.config.spinal.enabled:
            self.update_spinal(batch, policy, reference)
        self.found.reference_margins[tuple(batch.pair_index.tolist())] = theirs

    def _record(self, batch: PairBatch) -> tuple[Recording, Recording, dict[int, torch.Tensor]]:
        """Both models' recordings, and ρ's own gradients by layer: empty where they were not kept."""
        found = self._kept_streams.get(batch) if self._kept_streams is not None else {}
        layers = range(-1, self.session.num_layers)
        gradients = {layer: found[name] for layer in reversed(layers) if (name := f"gradient.{layer}") in found}
        streams = [found[name] for layer in layers if (name := f"stream.{layer}") in found]
        if self._only_compared(batch):
            if streams and gradients:
                return self.session.record_policy(batch), Recording(streams, []), gradients
            gradients = {}  # kept without streams by an audit that had to record them: kept whole this time
        return *self.session.record_both(batch), gradients

    def _only_compared(self, batch: PairBatch) -> bool:
        """Whether ρ's streams of this batch are compared with π's and no run is continued from them."""
        return not self.session.layers_of(batch) and self.config.patching.attribution_points == (0.0,)

    def _distances(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        """RMS over a pair's prediction positions of ‖h_l(π) − h_l(ρ)‖₂ (METHODS §3)."""
        tokens = torch.bincount(batch.pair, minlength=batch.num_pairs).double()
        for layer in range(self.session.num_layers):
            ours = policy.after(layer)[batch.row, batch.position]
            theirs = reference.after(layer)[batch.row, batch.position]
            squares = (ours.double() - theirs.double()).square().sum(-1)
            pooled = sum_by_pair(squares, batch.pair, batch.side, batch.num_pairs).sum(0)
            self.found.put("features", batch, (pooled / tokens).sqrt(), layer)

    def _behaviour(
        self, batch: PairBatch, policy: Recording, reference: Recording
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, KL, entropies and next-token accuracy at the prediction positions (METHODS §6).

        Returns:
            preference margins [B] of policy and reference, float64 on the CPU.
        """
        session, top = self.session, self.session.num_layers - 1
        parts: dict[str, list[torch.Tensor]] = {}
        for block in session.policy.head_blocks(batch.row.numel()):
            at = (batch.row[block], batch.position[block])
            with session.as_policy() as replay:
                ours = replay.head(policy.after(top)[at])
            with session.as_reference() as replay:
                theirs = replay.head(reference.after(top)[at])
            session.meter.sample()
            own, other, kl = compare_readouts(ours, theirs, batch.target[block])
            for prefix, readout in (("", own), ("reference_", other)):
                parts.setdefault(prefix + "logp", []).append(readout.logp)
                parts.setdefault(prefix + "entropy", []).append(readout.entropy)
                parts.setdefault(prefix + "token_accuracy", []).append(readout.correct)
            parts.setdefault("kl", []).append(kl)
        values = {name: torch.cat(pieces) for name, pieces in parts.items()}

        def sums(name: str) -> torch.Tensor:
            return sum_by_pair(values[name], batch.pair, batch.side, batch.num_pairs)

        tokens = sum_by_pair(torch.ones_like(values["kl"]), batch.pair, batch.side, batch.num_pairs)
        self.found.put("chosen_tokens", batch, tokens[0])
        self.found.put("rejected_tokens", batch, tokens[1])
        margins = []
        for prefix in ("", "reference_"):
            chosen, rejected = sums(prefix + "logp")
            margins.append((chosen - rejected).cpu())
            self.found.put(f"{prefix}chosen_logp", batch, chosen)
            self.found.put(f"{prefix}rejected_logp", batch, rejected)
            self.found.put(f"{prefix}entropy", batch, sums(prefix + "entropy").sum(0) / tokens.sum(0))
            self.found.put(f"{prefix}token_accuracy", batch, sums(prefix + "token_accuracy")[0] / tokens[0])
        self.found.put("kl", batch, sums("kl").sum(0) / tokens.sum(0))
        return margins[0], margins[1]

    # -- SPINAL --------------------------------------------------------------------------------------------------------

    def _sample_rows(self) -> dict[int, np.ndarray]:
        """Which prediction entries enter the spectra: chosen by hash before anything runs, so batches cannot matter."""
        pairs, sides, positions = [], [], []
        for index, pair in enumerate(self.session.pairs):
            for side, (ids, start) in enumerate(
                ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
            ):
                read = np.arange(max(start, 1) - 1, len(ids) - 1)
                # A prefix common to both completions counts once: equal rows would make singular values of 0.
                if side == 1:
                    counted = (read < pair.common_prefix) & np.isin(read, pair.chosen_predictions)
                    read = read[~counted]
                pairs.append(np.full(len(read), index))
                sides.append(np.full(len(read), side))
                positions.append(read)
        owner, side_of, place = (np.concatenate(parts) for parts in (pairs, sides, positions))
        keys = row_keys(owner, side_of, place, self.config.seed)
        kept = keep_rows(keys, self.config.spinal.max_rows)
        self.found.rows_available = len(keys)
        return {int(pair): keys[kept & (owner == pair)] for pair in np.unique(owner)}

    def update_spinal(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        """The part of :meth:`update` that METHODS §5 needs: rows for spectra and transport, and gradients."""
        session = self.session
        owner = batch.pair_index[batch.pair].cpu().numpy()
        place = batch.place[batch.row, batch.position].cpu().numpy()
        keys = row_keys(owner, batch.side.cpu().numpy(), place, self.config.seed)
        wanted = np.concatenate([self._kept.get(int(i), np.empty(0, keys.dtype)) for i in batch.pair_index.cpu()])
        chosen = np.flatnonzero(np.isin(keys, wanted) & batch.distinct.cpu().numpy())
        picked = torch.from_numpy(chosen).to(batch.row.device)
        at = (batch.row[picked], batch.position[picked])
        if self.config.spinal.gradient_concentration and session.is_control(batch):
            with session.as_policy() as replay:
                self._gradients(replay, batch, policy)
        rows = self._rows(policy, at)
        theirs = self._rows(reference, at) if self._reference_rows else None
        # Kept last, and together: a batch that runs out of memory comes again.
        self.found.row_keys.append(keys[chosen])
        self.found.policy_rows.append(rows)
        if theirs is not None:
            self.found.reference_rows.append(theirs)

    def _rows(self, recording: Recording, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The residual stream after every layer at some positions, [n, L, d], on the CPU."""
        return torch.stack([recording.after(layer)[at] for layer in range(self.session.num_layers)], dim=1).cpu()

    def trace(self) -> None:
        """What the logit lens of every row that was sampled travels from layer to layer; once all batches are in.

        Of all rows together, in blocks as large as the head is fast at, however few a batch had.
        """
        if not self.config.spinal.enabled:
            return
        with self.session.as_policy() as replay:
            self.found.policy_transport = self._travelled(replay, self.found.policy_rows)
        if self._reference_rows:
            with self.session.as_reference() as replay:
                self.found.reference_transport = self._travelled(replay, self.found.reference_rows)

    def _travelled(self, replay: Replay, parts: list[torch.Tensor]) -> np.ndarray:
        """Distances [n, L − 1] of n rows; a block of rows walks up the layers, so that two layers' logits of it are held."""
        total, layers = sum(map(len, parts)), replay.num_layers
        size = next(replay.head_blocks(2**62)).stop
        walks, done = TransportAccumulator(), 0
        while done < total:
            rows = _stretch(parts, done, done + size)
            try:
                walks.update(self._sampled(replay.head(rows[:, layer].to(replay.device))) for layer in range(layers))
                done += len(rows)
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(rows) == 1:
                    raise
            # Out of the handler, so that the failed call's tensors are free.
            self.session.free_memory()
            size = len(rows) // 2
        return walks.freeze().numpy() if total else np.empty((0, layers - 1))

    def _sampled(self, logits: torch.Tensor) -> torch.Tensor:
        self.session.meter.sample()
        return logits

    def _gradients(self, replay: Replay, batch: PairBatch, policy: Recording) -> None:
        """g_il = ‖∂m_i(π)/∂h_l‖_F over all positions of both sequences of pair i (METHODS §5).

        Where both sequences share the row of their prompt, each one's log-probability is differentiated for itself: the
        norm is over the positions of two sequences, in which the prompt stands twice.
        """

        def each_side(top: torch.Tensor) -> list[torch.Tensor]:
            return list(self.session.summed_logp(replay, top, batch))

        objective = each_side if batch.shared else self.session.margin_objective(replay, batch)
        owner = batch.row_pair
        for layer, gradients in replay.stream_gradients(policy, objective):
            squares = torch.stack([gradient.double().square().sum(dim=(1, 2)) for gradient in gradients]).sum(0)
            self.found.put("gradient_norm", batch, sum_into(owner, squares, batch.num_pairs).sqrt(), layer)
        self.session.meter.sample()

    def _attribute(
        self, batch: PairBatch, policy: Recording, reference: Recording, known: dict[int, torch.Tensor]
    ) -> None:
        """Attribution patching: ⟨∂m_i/∂h_l, h_l(π) − h_l(ρ)⟩ over the patched positions, all layers in one backward pass.

        The gradient is ρ's, its layers linearized where ``attribution_points`` says on the line between both models'
        streams: at ρ's own (0) it is the effect to first order (Nanda 2023); further on it sees how the effect bends.
        METHODS §7: an estimator of its own. ``known`` are the gradients at ρ's own streams, by layer, where they were kept.
        """
        mask = batch.position_mask(self.config.patching.positions)
        begin = -1 if self.config.patching.embedding else 0

        def gradients(replay: Replay, point: float) -> Iterator[tuple[int, torch.Tensor]]:
            margin = self.session.margin_objective(replay, batch)
            if self.config.patching.attribution_path == "joint":
                if point == 0.0 and known:
                    yield from known.items()
                    return
                at = _between(reference, policy, point)
                for layer, (gradient,) in replay.stream_gradients(at, margin, down_to=begin):
                    if point == 0.0 and self._kept_streams is not None:
                        fresh[layer] = gradient
                    yield layer, gradient
                return
            for start in range(begin, self.session.num_layers):
                at = self._patched_partly(replay, reference, policy, mask, start, point)
                for layer, (gradient,) in replay.stream_gradients(at, margin, down_to=start):
                    if layer == start:
                        yield layer, gradient

        owner = batch.row_pair
        fresh: dict[int, torch.Tensor] = {}
        with self.session.as_reference() as replay:
            for place, point in enumerate(self.config.patching.attribution_points):
                for layer, gradient in gradients(replay, point):
                    moved = policy.after(layer).double() - reference.after(layer).double()
                    along = (gradient.double() * moved).sum(-1).masked_fill(~mask, 0.0).sum(-1)
                    total = sum_into(owner, along, batch.num_pairs)
                    self.found.put("attribution", batch, total, layer + 1, place)
        self.session.meter.sample()
        if self._kept_streams is not None and fresh:
            kept = {f"gradient.{layer}": gradient for layer, gradient in fresh.items()}
            if self._only_compared(batch):
                kept |= {f"stream.{layer}": reference.after(layer) for layer in range(-1, self.session.num_layers)}
            self._kept_streams.put(batch, kept)

    def _patched_partly(
        self, replay: Replay, base: Recording, source: Recording, mask: torch.Tensor, start: int, point: float
    ) -> Recording:
        """The run of ``base`` whose stream after layer ``start`` moves by ``point`` of the way to that of ``source``."""
        way = _between(base, source, point).after(start)
        streams = [*base.streams[: start + 1], patched(base.after(start), way, mask)]
        for layer in range(start + 1, self.session.num_layers):
            streams.append(replay.layer(layer, streams[-1], base))
        return Recording(streams, base.calls)

    # -- patching ------------------------------------------------------------------------------------------------------

    def _patch(
        self,
        batch: PairBatch,
        policy: Recording,
        reference: Recording,
        policy_margin: torch.Tensor,
        reference_margin: torch.Tensor,
    ) -> None:
        session, layers, config = self.session, self.session.num_layers, self.config.patching
        mask = batch.position_mask(config.positions)
        begin = -1 if config.embedding else 0
        controls = session.is_control(batch)
        moved: list[torch.Tensor] = []
        head = None
        with session.as_policy() as replay:
            if config.transplants:
                # π's block l on ρ's own stream; ρ continues from there below.
                moved = [replay.layer(layer, reference.after(layer - 1), policy) for layer in range(layers)]
                head = session.margins(replay, reference.after(layers - 1), batch)
            if config.reverse and controls:
                streams = [
                    Stream(("reverse", layer), layer, patch_with(policy, reference, mask, layer))
                    for layer in range(begin, layers)
                ]
                self._walk(replay, batch, policy, streams, policy_margin, is_reference=False)
        with session.as_reference() as replay:
            streams = []
            for layer in range(begin, layers):
                streams.append(Stream(("effect", layer), layer, patch_with(reference, policy, mask, layer)))
                if layer >= 0 and config.noise_draws and controls:
                    make = noise_with(session, batch, policy, reference, mask, layer, 0)
                    streams.append(Stream(("noise", 0, layer), layer, make))
                if layer >= 0 and config.transplants:
                    streams.append(Stream(("transplant", layer), layer, _constant(moved[layer])))
            whole = batch.position_mask("all")
            # At all positions the patch of the embedding is its transplant, and is not walked twice.
            same = bool(torch.equal(mask, whole))
            if config.transplants and config.embedding and not same:
                streams.append(Stream(("transplant", -1), -1, patch_with(reference, policy, whole, -1)))
            base = self._walk(replay, batch, reference, streams, reference_margin, is_reference=True)
        if head is not None:
            self.found.put("transplant", batch, head - base, layers + 1)
            if same and config.embedding:
                index = batch.pair_index.cpu().numpy()
                self.found.per_pair["transplant"][index, 0] = self.found.per_pair["effect"][index, 0]

    def patch_missing(self, batch: PairBatch) -> None:
        """Effects at the layers that the batch is to be patched at by now, and was not when it was measured."""
        known = ~np.isnan(self.found.per_pair["effect"][int(batch.pair_index[0])])
        layers = [layer for layer in self.session.layers_of(batch) if not known[layer + 1]]
        if not layers:
            return
        policy = self.session.record_policy(batch, until=max(layers))
        with self.session.as_reference() as replay:
            reference = replay.record(batch.model_inputs())
            base = self.session.margins(replay, reference.after(self.session.num_layers - 1), batch)
        self._patch_effects(batch, layers, policy, reference, base)

    def _patch_effects(
        self,
        batch: PairBatch,
        layers: Sequence[int],
        policy: Recording,
        reference: Recording,
        reference_margin: torch.Tensor,
    ) -> None:
        """The effect alone, at those layers whose intervals need more pairs than others do."""
        mask = batch.position_mask(self.config.patching.positions)
        streams = [
            Stream(("effect", layer), layer, patch_with(reference, policy, mask, layer))
            for layer in layers
            if layer >= 0 or self.config.patching.embedding
        ]
        if streams:
            with self.session.as_reference() as replay:
                self._walk(replay, batch, reference, streams, reference_margin, is_reference=True)

    def _walk(
        self,
        replay: Replay,
        batch: PairBatch,
        own: Recording,
        streams: list[Stream],
        base: torch.Tensor,
        *,
        is_reference: bool,
    ) -> torch.Tensor:
        """Carry streams through the receiving model and store their effects; returns the unpatched margins [B].

        The unpatched run is the recording, computed in the same shapes as the walked streams; that replaying it gives
        it back bit by bit is checked at every layer on the first batch, and at one layer, another each time, on each
        that follows. Then patching a layer with itself cannot change anything: the identity effect is exactly 0. Where
        it is not so (kernels that are not deterministic), the unpatched run and the identity patches are walked too, and
        their effect is kept. A stream that equals the unpatched one where it joins stays equal and is not walked.
        """
        session, layers = self.session, self.session.num_layers
        strays = self._replay_check(replay, own, is_reference)
        if strays is not None:
            base = session.margins(replay, replay.unpatched(own), batch)
            self.found.strays |= is_reference
        if is_reference and (strays is not None or self._replayed[True] == 1):
            self.found.identity_pairs += [int(i) for i in batch.pair_index if int(i) not in self.found.identity_pairs]
            for layer in range(layers):
                self.found.put("identity", batch, torch.zeros_like(base), layer)
            streams = streams + [
                Stream(("identity", layer), layer, _constant(own.after(layer))) for layer in strays or []
            ]
        limit = session.max_streams(own.after(-1))
        same_as = None if strays is not None else own
        walked = replay.walk(own, streams, limit, same_as=same_as, read=batch.read)
        for key, margin in session.each_margin(replay, walked, batch):
            self._store(batch, key, margin - base if margin is not None else torch.zeros_like(base))
        return base

    def _replay_check(self, replay: Replay, own: Recording, is_reference: bool) -> list[int] | None:
        """Layers at which a replay strays from the recording; None where it does not stray at all."""
        layers = self.session.num_layers
        seen = self._replayed.get(is_reference, 0)
        every = range(layers)
        checked = every if seen == 0 or self._strays.get(is_reference) else [seen % layers]

        def stray(layer: int) -> bool:
            return not torch.equal(replay.layer(layer, own.after(layer - 1), own), own.after(layer))

        strays = [layer for layer in checked if stray(layer)]
        if strays and len(checked) < layers:
            strays = [layer for layer in every if stray(layer)]
        # Counted only now: a check that ran out of memory has shown nothing, and the next batch is the first again.
        self._replayed[is_reference] = seen + 1
        self._strays[is_reference] = bool(strays)
        return strays or None

    def _store(self, batch: PairBatch, key: Any, effect: torch.Tensor) -> None:
        name, *where = key
        if name in ("effect", "reverse", "transplant"):  # these arrays begin with the embedding, layer −1
            where = [where[0] + 1]
        self.found.put(name, batch, effect, *where)


def _between(one: Recording, other: Recording, point: float) -> Recording:
    """The run of ``one`` with its streams moved by ``point`` of the way to those of ``other``."""
    if point == 0.0:
        return one
    return Recording(
        [torch.lerp(a, b.to(a.dtype), point) for a, b in zip(one.streams, other.streams, strict=True)], one.calls
    )


def _stretch(parts: list[torch.Tensor], first: int, end: int) -> torch.Tensor:
    """Rows ``first`` to ``end`` (or the last) of all parts one behind the other."""
    found, before = [], 0
    for part in parts:
        if before < end and before + len(part) > first:
            found.append(part[max(first - before, 0) : end - before])
        before += len(part)
    return torch.cat(found)


def _constant(stream: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: stream


def patch_with(base: Recording, source: Recording, mask: torch.Tensor, layer: int) -> Callable[[], torch.Tensor]:
    """What joins a walk of ``base`` after ``layer``: its stream with that of ``source`` at the ``mask``ed positions."""
    return lambda: patched(base.after(layer), source.after(layer), mask)


def noise_with(
    session: Session,
    batch: PairBatch,
    policy: Recording,
    reference: Recording,
    mask: torch.Tensor,
    layer: int,
    draw: int,
) -> Callable[[], torch.Tensor]:
    """ρ's stream with a random shift of π's length, the same direction wherever the same token stands (METHODS §2)."""

    def make() -> torch.Tensor:
        base = reference.after(layer)
        pairs = [session.pairs[int(i)].index for i in batch.pair_index]
        longest = int(batch.place.max()) + 1
        directions = noise_directions(session.config.seed, pairs, layer, draw, longest, base.shape[2]).to(base.device)
        return noised(base, policy.after(layer), mask, directions[batch.row_pair[:, None], batch.place])

    return make
