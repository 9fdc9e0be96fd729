"""A planted subspace: the stream differs in exactly that many dimensions, each worth the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align_audit.lab.planting import plant_subspace
from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle
from tests.helpers.tiny import random_pairs, tiny_model


def stream_differences(policy: Any, base: Any, layer: int, probes: ProbeSet) -> torch.Tensor:
    rows = []
    for pair in probes.pairs:
        for ids, _ in oracle.sides(pair):
            rows.append(oracle.forward(policy, ids).h(layer) - oracle.forward(base, ids).h(layer))
    return torch.cat(rows)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_shift_has_the_planted_rank_and_equal_directions(
    base: Any, planting: ProbeSet, probes: ProbeSet, rank: int
) -> None:
    planted = plant_subspace(base, planting, 2, rank, shift=1.5)
    policy: Any = planted.policy
    moved = [
        name for name, new in policy.named_parameters() if not torch.equal(new, dict(base.named_parameters())[name])
    ]
    assert moved == ["model.layers.2.mlp.down_proj.weight"]
    assert not stream_differences(policy, base, 1, probes).any()
    sizes = torch.linalg.svdvals(stream_differences(policy, base, 2, probes))
    assert sizes[rank - 1] > 0.05 * sizes[0]
    assert sizes[rank] < 1e-9 * sizes[0]
    update = policy.model.layers[2].mlp.down_proj.weight - base.model.layers[2].mlp.down_proj.weight
    left, strengths, _ = torch.linalg.svd(update.detach())
    assert strengths[rank] < 1e-9 * strengths[0]
    # Each direction u_j of the output alone (the update is a sum over orthonormal u_j, told apart by their sizes c_j).
    basis = left[:, :rank]
    alone = [planted.truth.numbers[f"shift_alone_{j}"] for j in range(rank)]
    np.testing.assert_allclose(alone, 1.5 / rank, rtol=0.05)
    before, *_ = oracle.margins(base, planting.pairs)
    after, *_ = oracle.margins(policy, planting.pairs)
    assert planted.truth.numbers["shift"] == pytest.approx(float((after - before).mean()), abs=1e-5)
    assert planted.truth.numbers["shift"] == pytest.approx(1.5, rel=0.25)
    inside = stream_differences(policy, base, 2, probes)
    torch.testing.assert_close(inside @ basis @ basis.T, inside, rtol=0, atol=1e-9)


def test_terms_are_uncorrelated_over_the_planting_tokens(base: Any, planting: ProbeSet) -> None:
    """So the singular values of the shift are the planted sizes (up to the ridge)."""
    planted = plant_subspace(base, planting, 3, 3, shift=1.5)
    rows = stream_differences(planted.policy, base, 3, planting)
    found = torch.linalg.svdvals(rows) / len(rows) ** 0.5
    expected = sorted((planted.truth.numbers[f"size_{j}"] for j in range(3)), reverse=True)
    np.testing.assert_allclose(found[:3].numpy(), expected, rtol=0.15)


def test_a_layer_that_normalizes_what_it_writes_is_refused() -> None:
    with pytest.raises(ValueError, match="changed on its way into the residual stream"):
        plant_subspace(tiny_model("gemma2"), random_pairs(3), 1, 1, shift=0.1)


def test_an_impossible_rank_is_refused(base: Any, planting: ProbeSet) -> None:
    with pytest.raises(ValueError, match="rank from 1 to 96; found 97"):
        plant_subspace(base, planting, 1, 97)
