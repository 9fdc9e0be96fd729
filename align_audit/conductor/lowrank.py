"""Low-rank reconstruction at the layers that matter: two more passes over the pairs (METHODS §4; arXiv 2510.16167 §4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
        random: per layer: [N, K] mean effect over draws of random subspaces, in the shift form.
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


def reconstruct(session: Session, layers: list[int], tick: Callable[[], None] = lambda: None) -> LowRankFindings:
    """Fit the subspaces at ``layers``, patch them cross-fit, and random ones of the same ranks beside them."""
    config = session.config.low_rank
    width = session.policy.anatomy.hidden_size
    ranks = [rank for rank in config.ranks if rank <= width] or [width]
    found = LowRankFindings(ranks)
    halves = split_halves(len(session.pairs), session.config.seed)
    grams = _fit(session, layers, halves, tick)
    fits: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, (one, other) in grams.items():
        if not (torch.isfinite(one.matrix).all() and torch.isfinite(other.matrix).all()):
            found.skipped[key] = f"the activations at layer {key[1]} are not finite"
        elif key[0] == "shift" and not (one.matrix.any() and other.matrix.any()):
            found.skipped[key] = f"policy and reference do not differ at layer {key[1]}: there is no shift to span"
        else:
            # fits[key][h] is fitted on the half h is not.
            fits[key] = (top_basis(other, ranks[-1]), top_basis(one, ranks[-1]))
            captured = [
                np.array(explained_variance_ratio(held, basis, ranks)) * float(held.matrix.trace())
                for held, basis in zip((one, other), fits[key], strict=True)
            ]
            found.explained[key] = list(np.sum(captured, axis=0) / float((one + other).matrix.trace()))
            found.bases[key] = top_basis(one + other, ranks[-1]).cpu().numpy()
    count = len(session.pairs)
    for key in fits:
        found.fitted[key] = np.full((count, len(ranks)), np.nan)
    draws = config.random_draws
    spans = {}
    for layer in {layer for _, layer in fits} if draws else set():
        found.random[layer] = np.zeros((count, len(ranks)))
        spans[layer] = [
            random_basis(width, ranks[-1], _seed(session.config.seed, layer, draw)) for draw in range(draws)
        ]
    if fits:
        _patch(session, found, fits, spans, halves, tick)
    return found


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
    for batch in session.batches():
        policy, reference = session.record_both(batch)
        mask = batch.position_mask(session.config.patching.positions)
        member = _row_halves(batch, halves)
        for (basis, layer), pair in grams.items():
            ours, theirs = policy.after(layer), reference.after(layer)
            rows = ours if basis == "activation" else ours.double() - theirs.double()
            for half in (0, 1):
                pair[half].update(rows[mask & (member == bool(half))[:, None]])
        tick()
    return {key: (one.freeze(), other.freeze()) for key, (one, other) in grams.items()}


def _row_halves(batch: PairBatch, halves: np.ndarray) -> torch.Tensor:
    """[R] booleans: the half of each row's pair."""
    return torch.from_numpy(halves[batch.pair_index.cpu().numpy()]).to(batch.row.device).repeat(2)


def _patch(
    session: Session,
    found: LowRankFindings,
    fits: dict[Key, tuple[torch.Tensor, torch.Tensor]],
    spans: dict[int, list[torch.Tensor]],
    halves: np.ndarray,
    tick: Callable[[], None],
) -> None:
    for batch in session.batches():
        policy, reference = session.record_both(batch)
        mask = batch.position_mask(session.config.patching.positions)
        member = _row_halves(batch, halves)

        def streams(
            policy: Recording = policy,
            reference: Recording = reference,
            mask: torch.Tensor = mask,
            member: torch.Tensor = member,
        ) -> Iterator[Stream]:
            for (basis, layer), (first, second) in fits.items():
                for column, rank in enumerate(found.ranks):
                    make = _reconstruction(policy, reference, mask, member, layer, basis, first, second, rank)
                    yield Stream(("fitted", basis, layer, column), layer, make)
            for layer, draws in spans.items():
                for column, rank in enumerate(found.ranks):
                    for draw in draws:
                        make = _reconstruction(policy, reference, mask, member, layer, "shift", draw, draw, rank)
                        yield Stream(("random", layer, column, len(draws)), layer, make)

        index = batch.pair_index.cpu().numpy()
        with session.as_reference() as replay:
            base = session.margins(replay, _unpatched(replay, reference), batch)
            for key, top in replay.walk(reference, streams(), session.max_streams(reference.after(-1))):
                assert top is not None and isinstance(key, tuple)
                effect = (session.margins(replay, top, batch) - base).numpy()
                if key[0] == "fitted":
                    found.fitted[key[1], key[2]][index, key[3]] = effect
                else:
                    found.random[key[1]][index, key[2]] += effect / key[3]
        tick()


def _unpatched(replay: object, recording: Recording) -> torch.Tensor:
    """The unpatched run, walked in the same calls as the patched ones."""
    stream = recording.after(-1)
    for layer in range(len(recording.calls)):
        stream = replay.layer(layer, stream, recording)  # type: ignore[attr-defined]
    return stream


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
            columns = span[:, :rank].to(rows.device, torch.float64)
            return (rows @ columns) @ columns.T

        inside = (
            torch.where(member[:, None, None], project(second), project(first))
            if first is not second
            else (project(first))
        )
        whole = inside if basis == "activation" else theirs.double() + inside
        return patched(theirs, whole, mask)

    return make
