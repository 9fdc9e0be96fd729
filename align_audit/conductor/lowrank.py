"""Low-rank reconstruction at the layers that matter (METHODS §4; arXiv 2510.16167 §4.3).

One more pass over the pairs fits the subspaces (no further up than the highest of the layers); they are patched in the
pass after that (``conductor.second``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from align_audit.batches import PairBatch
from align_audit.conductor.session import Session
from align_audit.measures.patching import patched
from align_audit.measures.subspace import Gram, GramAccumulator, explained_variance_ratio, random_basis, top_basis
from align_audit.models.replay import Recording, Stream

Key = tuple[str, int]
"""Basis name and layer."""


@dataclass
class LowRankFindings:
    """Per-pair effects in nats, float64, in the order of the ``ProbeSet``.

    Attributes:
        ranks: evaluated ranks; those above the model's width are left out.
        fitted: per (basis, layer): [N, K] effect of the rank-k patch, basis fitted on the half the pair is not in.
        random: per layer: [N, K, D] effects of D random subspaces of each pair's own, in the shift form; NaN for pairs
            that no control is measured on.
        explained: per (basis, layer): [K] explained variance ratio on held-out halves.
        bases: per (basis, layer): [d, K_max] fitted on all pairs.
        skipped: why a (basis, layer) is missing.
    """

    ranks: list[int]
    fitted: dict[Key, np.ndarray] = field(default_factory=dict)
    random: dict[int, np.ndarray] = field(default_factory=dict)
    explained: dict[Key, list[float]] = field(default_factory=dict)
    bases: dict[Key, np.ndarray] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)


class Reconstruction:
    """Fits subspaces at ``layers`` when made; then gives the streams to patch, cross-fit, and random ones beside them."""

    def __init__(self, session: Session, layers: list[int], tick: Callable[[], None] = lambda: None) -> None:
        config = session.config.low_rank
        self.session = session
        self.width = session.policy.anatomy.hidden_size
        ranks = [rank for rank in config.ranks if rank <= self.width] or [self.width]
        self.found = found = LowRankFindings(ranks)
        self._halves = split_halves(len(session.pairs), session.config.seed)
        self._fits: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
        grams = _fit(session, layers, self._halves, tick)
        for key, (one, other) in grams.items():
            if not (torch.isfinite(one.matrix).all() and torch.isfinite(other.matrix).all()):
                found.skipped[key] = f"the activations at layer {key[1]} are not finite"
            elif key[0] == "shift" and not (one.matrix.any() and other.matrix.any()):
                found.skipped[key] = f"policy and reference do not differ at layer {key[1]}: there is no shift to span"
            else:
                # fits[key][h] is fitted on the half h is not.
                fits = (top_basis(other, ranks[-1]), top_basis(one, ranks[-1]))
                self._fits[key] = (fits[0].to(session.device), fits[1].to(session.device))
                captured = [
                    np.array(explained_variance_ratio(held, basis, ranks)) * float(held.matrix.trace())
                    for held, basis in zip((one, other), fits, strict=True)
                ]
                found.explained[key] = list(np.sum(captured, axis=0) / float((one + other).matrix.trace()))
                found.bases[key] = top_basis(one + other, ranks[-1]).cpu().numpy()
        count = len(session.pairs)
        for key in self._fits:
            found.fitted[key] = np.full((count, len(ranks)), np.nan)
        for layer in sorted({layer for _, layer in self._fits}) if config.random_draws else []:
            found.random[layer] = np.full((count, len(ranks), config.random_draws), np.nan)

    @property
    def layers(self) -> set[int]:
        """Where there is a subspace to patch."""
        return {layer for _, layer in self._fits}

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        """Every rank of every fitted subspace on pairs that are patched, random ones on those of the controls."""
        if not self.session.is_exact(batch):
            return
        mask = batch.position_mask(self.session.config.patching.positions)
        member = _row_halves(batch, self._halves)
        for (basis, layer), (first, second) in self._fits.items():
            for column, rank in enumerate(self.found.ranks):
                make = _reconstruction(policy, reference, mask, member, layer, basis, first, second, rank)
                yield Stream(("fitted", basis, layer, column), layer, make)
        if not self.session.is_control(batch):
            return
        for layer in self.found.random:
            for draw in range(self.session.config.low_rank.random_draws):
                span = self._random_spans(batch, layer, draw)
                for column, rank in enumerate(self.found.ranks):
                    make = _reconstruction(policy, reference, mask, member, layer, "shift", span, span, rank)
                    yield Stream(("random", layer, column, draw), layer, make)

    def _random_spans(self, batch: PairBatch, layer: int, draw: int) -> torch.Tensor:
        """[R, d, K] a random subspace for each row's pair: as many subspaces as pairs average better than a few for all."""
        spans = [
            random_basis(
                self.width,
                self.found.ranks[-1],
                _seed(self.session.config.seed, layer, draw, self.session.pairs[int(place)].index),
            )
            for place in batch.pair_index.cpu()
        ]
        return torch.stack(spans).to(self.session.device)[batch.row_pair]

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        """Keep the effects [B], nats, of the pairs at ``places``."""
        if key[0] == "fitted":
            self.found.fitted[key[1], key[2]][places, key[3]] = effect
        else:
            self.found.random[key[1]][places, key[2], key[3]] = effect


def split_halves(count: int, seed: int) -> np.ndarray:
    """Which of two random halves each pair is in, booleans [N]; with an odd number the first is the smaller."""
    order = np.random.default_rng([seed, 0x5B]).permutation(count)
    halves = np.zeros(count, dtype=bool)
    halves[order[count // 2 :]] = True
    return halves


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _fit(
    session: Session, layers: list[int], halves: np.ndarray, tick: Callable[[], None]
) -> dict[Key, tuple[Gram, Gram]]:
    """Gram matrices [d, d] of the pooled token rows of each half, per basis and layer."""
    width = session.policy.anatomy.hidden_size
    grams = {
        (basis, layer): (GramAccumulator(width), GramAccumulator(width))
        for basis in session.config.low_rank.bases
        for layer in layers
    }
    top = max(layers)

    def update(batch: PairBatch) -> None:
        inputs = batch.model_inputs()
        with session.as_policy() as replay:
            policy = replay.record(inputs, until=top)
        with session.as_reference() as replay:
            reference = replay.record(inputs, until=top)
        session.meter.sample()
        mask = batch.position_mask(session.config.patching.positions)
        member = _row_halves(batch, halves)
        pieces = []
        for (basis, layer), pair in grams.items():
            ours, theirs = policy.after(layer), reference.after(layer)
            for half in (0, 1):
                within = mask & (member == bool(half))[:, None]
                if not within.any():
                    continue
                rows = ours[within].double()
                if basis == "shift":
                    rows = rows - theirs[within].double()
                # A position that stands for both sequences of its pair is two of the pooled rows.
                pieces.append((pair[half], rows * batch.copies[within].double().sqrt()[:, None]))
        # Added only when all are there: a batch that runs out of memory comes again, and must not count twice.
        for accumulator, rows in pieces:
            accumulator.update(rows)
        tick()

    session.each_batch(update)
    return {key: (one.freeze(), other.freeze()) for key, (one, other) in grams.items()}


def _row_halves(batch: PairBatch, halves: np.ndarray) -> torch.Tensor:
    """[R] booleans: the half of each row's pair."""
    member = torch.from_numpy(halves[batch.pair_index.cpu().numpy()]).to(batch.row.device)
    return member[batch.row_pair]


def _reconstruction(
    policy: Recording,
    reference: Recording,
    mask: torch.Tensor,
    member: torch.Tensor,
    layer: int,
    basis: str,
    first: torch.Tensor,
    second: torch.Tensor,
    rank: int,
) -> Callable[[], torch.Tensor]:
    """h_l(ρ) + P_k (h_l(π) − h_l(ρ)) in the shift basis, P_k h_l(π) in the activation basis; P_k by each row's half."""

    def make() -> torch.Tensor:
        ours, theirs = policy.after(layer), reference.after(layer)
        # Projections are taken in float64: in the activation basis one direction is far larger than all others.
        rows = ours.double() if basis == "activation" else ours.double() - theirs.double()

        def project(span: torch.Tensor) -> torch.Tensor:
            columns = span[..., :rank]
            return (rows @ columns) @ columns.mT

        if first is second or not member.any():
            inside = project(first)
        elif member.all():
            inside = project(second)
        else:
            inside = torch.where(member[:, None, None], project(second), project(first))
        whole = inside if basis == "activation" else theirs.double() + inside
        return patched(theirs, whole, mask)

    return make
