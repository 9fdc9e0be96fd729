"""Walk every probe pair once and keep what the measures need: numbers per pair, and a bounded sample of token rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align_audit.batches import PairBatch
from align_audit.conductor.session import Session
from align_audit.measures.margin import kl_divergence, preference_margin, sum_by_pair, token_logp, token_readout
from align_audit.measures.patching import noise_directions, noised, patched
from align_audit.measures.spectrum import keep_rows, row_keys
from align_audit.measures.transport import fisher_rao_distance
from align_audit.models.replay import Recording, Replay, Stream, equal_streams


@dataclass
class Collected:
    """Per-pair numbers, float64, in the order of the ``ProbeSet``; N pairs, L layers.

    Effects and transplants are in nats and NaN where they were not asked for.
    """

    num_pairs: int
    num_layers: int
    noise_draws: int
    per_pair: dict[str, np.ndarray] = field(default_factory=dict)
    identical: bool = True
    """Policy and reference gave the same residual streams, bit by bit, on every probe token."""
    rows_available: int = 0
    row_keys: list[np.ndarray] = field(default_factory=list)
    policy_rows: list[torch.Tensor] = field(default_factory=list)
    reference_rows: list[torch.Tensor] = field(default_factory=list)
    policy_transport: list[np.ndarray] = field(default_factory=list)
    reference_transport: list[np.ndarray] = field(default_factory=list)

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
    """Gathers from batches, one ``update`` each, then freezes into :class:`Collected`."""

    def __init__(self, session: Session, *, reference_rows: bool = True) -> None:
        config = session.config
        self.session = session
        self.config = config
        self._reference_rows = reference_rows
        layers = session.num_layers
        found = Collected(len(session.pairs), layers, config.patching.noise_draws)
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
        self.found = found
        self._kept = self._sample_rows() if config.spinal.enabled else {}

    # -- one batch -----------------------------------------------------------------------------------------------------

    def update(self, batch: PairBatch) -> None:
        policy, reference = self.session.record_both(batch)
        valid = batch.position_mask("all")
        if not equal_streams(policy.streams, reference.streams, valid):
            self.found.identical = False
        self._distances(batch, policy, reference)
        self._behaviour(batch, policy, reference)
        if self.config.spinal.enabled:
            self._spinal(batch, policy, reference)
        if self.config.patching.enabled:
            self._patch(batch, policy, reference)

    def _distances(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        """RMS over a pair's prediction positions of ‖h_l(π) − h_l(ρ)‖₂ (METHODS §3)."""
        tokens = torch.bincount(batch.pair, minlength=batch.num_pairs).double()
        for layer in range(self.session.num_layers):
            ours = policy.after(layer)[batch.row, batch.position]
            theirs = reference.after(layer)[batch.row, batch.position]
            squares = (ours.double() - theirs.double()).square().sum(-1)
            pooled = sum_by_pair(squares, batch.pair, batch.side, batch.num_pairs).sum(0)
            self.found.put("features", batch, (pooled / tokens).sqrt(), layer)

    def _behaviour(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        """Log-probabilities, KL, entropies and next-token accuracy at the prediction positions (METHODS §6)."""
        session, top = self.session, self.session.num_layers - 1
        parts: dict[str, list[torch.Tensor]] = {}
        for block in session.policy.head_blocks(batch.row.numel()):
            at = (batch.row[block], batch.position[block])
            with session.as_policy() as replay:
                ours = replay.head(policy.after(top)[at])
            with session.as_reference() as replay:
                theirs = replay.head(reference.after(top)[at])
            session.meter.sample()
            for prefix, logits in (("", ours), ("reference_", theirs)):
                readout = token_readout(logits, batch.target[block])
                parts.setdefault(prefix + "logp", []).append(readout.logp)
                parts.setdefault(prefix + "entropy", []).append(readout.entropy)
                parts.setdefault(prefix + "token_accuracy", []).append(readout.correct)
            parts.setdefault("kl", []).append(kl_divergence(ours, theirs))
        values = {name: torch.cat(pieces) for name, pieces in parts.items()}

        def sums(name: str) -> torch.Tensor:
            return sum_by_pair(values[name], batch.pair, batch.side, batch.num_pairs)

        tokens = sum_by_pair(torch.ones_like(values["kl"]), batch.pair, batch.side, batch.num_pairs)
        self.found.put("chosen_tokens", batch, tokens[0])
        self.found.put("rejected_tokens", batch, tokens[1])
        for prefix in ("", "reference_"):
            chosen, rejected = sums(prefix + "logp")
            self.found.put(f"{prefix}chosen_logp", batch, chosen)
            self.found.put(f"{prefix}rejected_logp", batch, rejected)
            self.found.put(f"{prefix}entropy", batch, sums(prefix + "entropy").sum(0) / tokens.sum(0))
            self.found.put(f"{prefix}token_accuracy", batch, sums(prefix + "token_accuracy")[0] / tokens[0])
        self.found.put("kl", batch, sums("kl").sum(0) / tokens.sum(0))

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

    def _spinal(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        session = self.session
        owner = batch.pair_index[batch.pair].cpu().numpy()
        keys = row_keys(owner, batch.side.cpu().numpy(), batch.position.cpu().numpy(), self.config.seed)
        wanted = np.concatenate([self._kept.get(int(i), np.empty(0, keys.dtype)) for i in batch.pair_index.cpu()])
        chosen = np.flatnonzero(np.isin(keys, wanted) & batch.distinct.cpu().numpy())
        picked = torch.from_numpy(chosen).to(batch.row.device)
        at = (batch.row[picked], batch.position[picked])
        self.found.row_keys.append(keys[chosen])
        with session.as_policy() as replay:
            rows, transport = self._trace(replay, policy, at)
            if self.config.spinal.gradient_concentration:
                self._gradients(replay, batch, policy)
        self.found.policy_rows.append(rows)
        self.found.policy_transport.append(transport)
        if self._reference_rows:
            with session.as_reference() as replay:
                rows, transport = self._trace(replay, reference, at)
            self.found.reference_rows.append(rows)
            self.found.reference_transport.append(transport)

    def _trace(
        self, replay: Replay, recording: Recording, at: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Rows of every layer [n, L, d] and the distance each row's logit lens travels to the next layer [n, L − 1]."""
        layers = replay.num_layers
        rows = torch.stack([recording.after(layer)[at] for layer in range(layers)], dim=1)
        distances = np.empty((rows.shape[0], layers - 1))
        for block in replay.head_blocks(rows.shape[0]):
            before: torch.Tensor | None = None
            for layer in range(layers):
                logits = replay.head(rows[block, layer])
                if before is not None:
                    distances[block, layer - 1] = fisher_rao_distance(before, logits).cpu().numpy()
                before = logits
        self.session.meter.sample()
        return rows.cpu(), distances

    def _gradients(self, replay: Replay, batch: PairBatch, policy: Recording) -> None:
        """g_il = ‖∂m_i(π)/∂h_l‖_F over all positions of both sequences of pair i (METHODS §5)."""
        owner = torch.arange(2 * batch.num_pairs, device=batch.row.device) % batch.num_pairs

        def total_margin(top: torch.Tensor) -> torch.Tensor:
            # Pairs do not touch each other, so the gradient of the sum holds each pair's own gradient in its rows.
            pieces = [
                token_logp(replay.head(top[batch.row[block], batch.position[block]]), batch.target[block])
                for block in replay.head_blocks(batch.row.numel())
            ]
            return preference_margin(torch.cat(pieces), batch.pair, batch.side, batch.num_pairs).sum()

        for layer, gradient in replay.stream_gradients(policy, total_margin):
            squares = gradient.double().square().sum(dim=(1, 2))
            norms = torch.zeros(batch.num_pairs, dtype=torch.float64, device=squares.device)
            self.found.put("gradient_norm", batch, norms.index_add_(0, owner, squares).sqrt(), layer)
        self.session.meter.sample()

    # -- patching ------------------------------------------------------------------------------------------------------

    def _patch(self, batch: PairBatch, policy: Recording, reference: Recording) -> None:
        session, layers = self.session, self.session.num_layers
        mask = batch.position_mask(self.config.patching.positions)
        with session.as_policy() as replay:
            # π's block l on ρ's own stream; ρ continues from there below.
            moved = [replay.layer(layer, reference.after(layer - 1), policy) for layer in range(layers)]
            head = session.margins(replay, reference.after(layers - 1), batch)
            if self.config.patching.reverse:
                streams = [
                    Stream(("reverse", layer), layer, _patch_with(policy, reference, mask, layer))
                    for layer in range(-1, layers)
                ]
                self._walk(replay, batch, policy, streams)
        with session.as_reference() as replay:
            streams = []
            for layer in range(-1, layers):
                streams.append(Stream(("effect", layer), layer, _patch_with(reference, policy, mask, layer)))
            whole = batch.position_mask("all")
            streams.append(Stream(("transplant", -1), -1, _patch_with(reference, policy, whole, -1)))
            for layer in range(layers):
                streams.append(Stream(("transplant", layer), layer, _constant(moved[layer])))
                for draw in range(self.found.noise_draws):
                    streams.append(
                        Stream(("noise", draw, layer), layer, self._noise(batch, policy, reference, mask, layer, draw))
                    )
            base = self._walk(replay, batch, reference, streams, identity=True)
        self.found.put("transplant", batch, head - base, layers + 1)

    def _noise(
        self, batch: PairBatch, policy: Recording, reference: Recording, mask: torch.Tensor, layer: int, draw: int
    ) -> Any:
        def make() -> torch.Tensor:
            base = reference.after(layer)
            pairs = [self.session.pairs[int(i)].index for i in batch.pair_index]
            directions = noise_directions(self.config.seed, pairs, layer, draw, base.shape[1], base.shape[2])
            return noised(base, policy.after(layer), mask, directions.to(base.device).repeat(2, 1, 1))

        return make

    def _walk(
        self, replay: Replay, batch: PairBatch, own: Recording, streams: list[Stream], *, identity: bool = False
    ) -> torch.Tensor:
        """Carry streams through the receiving model and store their effects; returns the unpatched margins [B].

        The unpatched run is walked in the same calls, layer by layer. Where it meets its own recording bit by bit at
        every layer, patching a layer with itself cannot change anything: the identity effect is exactly 0. Where it
        does not (kernels that are not deterministic), the identity patch is carried to the top and its effect kept.
        A stream that equals the unpatched one where it joins stays equal and is not walked.
        """
        session, layers = self.session, self.session.num_layers
        strays: list[int] = []
        stream = own.after(-1)
        for layer in range(layers):
            stream = replay.layer(layer, stream, own)
            if not torch.equal(stream, own.after(layer)):
                strays.append(layer)
        base = session.margins(replay, stream, batch)
        if identity:
            for layer in range(layers):
                self.found.put("identity", batch, torch.zeros_like(base), layer)
            streams = streams + [Stream(("identity", layer), layer, _constant(own.after(layer))) for layer in strays]
        limit = session.max_streams(stream)
        for key, top in replay.walk(own, streams, limit, same_as=None if strays else own):
            effect = session.margins(replay, top, batch) - base if top is not None else torch.zeros_like(base)
            self._store(batch, key, effect)
        return base

    def _store(self, batch: PairBatch, key: Any, effect: torch.Tensor) -> None:
        name, *where = key
        if name in ("effect", "reverse", "transplant"):  # these arrays begin with the embedding, layer −1
            where = [where[0] + 1]
        self.found.put(name, batch, effect, *where)


def _constant(stream: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: stream


def _patch_with(base: Recording, source: Recording, mask: torch.Tensor, layer: int) -> Callable[[], torch.Tensor]:
    return lambda: patched(base.after(layer), source.after(layer), mask)
