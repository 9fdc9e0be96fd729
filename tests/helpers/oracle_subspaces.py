"""The oracle of features and low-rank patches (METHODS 3 and 4); see :mod:`tests.helpers.oracle`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.helpers.oracle import (
    Basis,
    Floats,
    PairLike,
    _patched_margin,
    decoder_layers,
    forward,
    margins,
    patch_effects,
    prediction_positions,
    sides,
)


def activation_features(policy: nn.Module, reference: nn.Module, pairs: Sequence[PairLike]) -> Floats:
    """X_il = RMS over the prediction positions of both sequences of ||h_l(policy) - h_l(reference)||_2 -> [N, L]."""
    depth = len(decoder_layers(reference))
    features = np.zeros((len(pairs), depth))
    for i, pair in enumerate(pairs):
        squares: list[list[float]] = [[] for _ in range(depth)]
        for ids, start in sides(pair):
            policy_run, reference_run = forward(policy, ids), forward(reference, ids)
            for layer in range(depth):
                shift = policy_run.h(layer).double() - reference_run.h(layer).double()
                for position in prediction_positions(ids, start):
                    squares[layer].append(shift[position].square().sum().item())
        for layer in range(depth):
            features[i, layer] = np.sqrt(np.mean(squares[layer]))
    return features


def low_rank_effects(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Sequence[PairLike],
    layer: int,
    ranks: Sequence[int],
    basis: Basis,
    halves: NDArray[np.bool_],
) -> dict[str, Any]:
    """Cross-fitted rank-k patches at one layer, policy into reference, all positions.

    ``halves`` [N] says which half each pair is in. V_k: the first k right singular vectors of the token rows of the
    *other* half (all positions of both sequences of each pair, not centred): h(policy) for ``activation``,
    h(policy) - h(reference) for ``shift``. The patch: P_k h(policy), or h(reference) + P_k (h(policy) - h(reference)).

    Returns effects [N, K] and full_effect [N] (nats, against the unpatched reference), explained_variance_ratio [K]
    (energy of the held-out rows inside V_k over their energy, both sums over both directions), effect_fraction [K]
    (ratio of sums over pairs), and rank_95 (NaN if none).
    """
    halves = np.asarray(halves, dtype=bool)
    if halves.shape != (len(pairs),) or halves.all() or not halves.any():
        raise ValueError("halves must have one entry per pair and name two non-empty halves")
    if basis not in ("activation", "shift"):
        raise ValueError(f"unknown basis {basis!r}")

    def stream(model: nn.Module, ids: Sequence[int]) -> Floats:
        return forward(model, ids).h(layer).double().cpu().numpy()

    # Per pair and side: the rows that the basis is made of, and what the projection is added to.
    rows: list[list[Floats]] = []
    anchors: list[list[Floats]] = []
    for pair in pairs:
        rows.append([])
        anchors.append([])
        for ids, _ in sides(pair):
            from_policy, from_reference = stream(policy, ids), stream(reference, ids)
            rows[-1].append(from_policy if basis == "activation" else from_policy - from_reference)
            anchors[-1].append(np.zeros_like(from_policy) if basis == "activation" else from_reference)

    right: dict[bool, Floats] = {}
    for half in (False, True):
        pooled = [side for i in range(len(pairs)) if bool(halves[i]) == half for side in rows[i]]
        right[half] = np.linalg.svd(np.concatenate(pooled), full_matrices=False)[2]

    baseline = margins(reference, pairs)[0]
    full_effect = patch_effects(policy, reference, pairs)[:, layer + 1]
    effects = np.zeros((len(pairs), len(ranks)))
    captured, energy = np.zeros(len(ranks)), 0.0
    for i, pair in enumerate(pairs):
        held_out_basis = right[not bool(halves[i])]
        energy += sum(float((side**2).sum()) for side in rows[i])
        for j, rank in enumerate(ranks):
            vectors = held_out_basis[:rank]
            projected = [side @ vectors.T @ vectors for side in rows[i]]
            captured[j] += sum(float((side**2).sum()) for side in projected)
            patch = [torch.from_numpy(a + p) for a, p in zip(anchors[i], projected, strict=True)]
            effects[i, j] = _patched_margin(reference, pair, layer, patch) - baseline[i]
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = effects.sum(axis=0) / full_effect.sum()
        explained = captured / energy
    return {
        "effects": effects,
        "full_effect": full_effect,
        "explained_variance_ratio": explained,
        "effect_fraction": fraction,
        "rank_95": rank_95(ranks, fraction),
    }


def rank_95(ranks: Sequence[int], effect_fraction: Floats) -> float:
    """The least k such that every evaluated rank >= k has an effect fraction >= 0.95; NaN if there is none."""
    for rank in sorted(ranks):
        if all(f >= 0.95 for k, f in zip(ranks, effect_fraction, strict=True) if k >= rank):
            return float(rank)
    return float("nan")
