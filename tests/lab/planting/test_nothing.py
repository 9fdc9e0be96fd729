"""Null models move without a preference, and real training puts its update where it was told to."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.lab.planting import margin_gradient, plant_layers, plant_nothing, train_dpo
from align_audit.lab.planting.nothing import swap_half
from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle


def shift_on(policy: Any, base: Any, pairs: ProbeSet) -> float:
    return float((oracle.margins(policy, pairs.pairs)[0] - oracle.margins(base, pairs.pairs)[0]).mean())


def layer_vectors(model: Any) -> list[torch.Tensor]:
    return [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in model.model.layers]


def test_orthogonal_noise_moves_every_layer_alike_and_no_margin_to_first_order(base: Any, planting: ProbeSet) -> None:
    small, planted = (plant_nothing(base, planting, "orthogonal_noise", size, seed=3) for size in (0.001, 0.01))
    for null, size in ((small, 0.001), (planted, 0.01)):
        shares = [
            float((new - old).norm() / old.norm())
            for new, old in zip(layer_vectors(null.policy), layer_vectors(base), strict=True)
        ]
        np.testing.assert_allclose(shares, size, rtol=1e-9)
        assert null.truth.units == ()
    assert shift_on(planted.policy, base, planting) == pytest.approx(planted.truth.numbers["shift"], abs=1e-5)
    gradient, old = margin_gradient(base, planting), dict(base.named_parameters())
    slope = sum(
        float(((new - old[name]) * gradient[name]).sum().detach()) for name, new in planted.policy.named_parameters()
    )
    assert abs(slope) < 1e-9
    # As much movement as a planted preference has, and a small part of its shift.
    real = plant_layers(base, planting, [3], shift=2.0, distraction=0)
    assert real.truth.numbers["planted_share"] < 0.02
    assert abs(planted.truth.numbers["shift"]) < 0.1 * real.truth.numbers["shift"]
    # What is left is of second order: a tenth of the noise, about a hundredth of the shift.
    assert abs(small.truth.numbers["shift"]) < 0.05 * abs(planted.truth.numbers["shift"]) + 1e-4
    moved = oracle.forward(planted.policy, planting[0].chosen_ids).h(5)
    assert (moved - oracle.forward(base, planting[0].chosen_ids).h(5)).norm() > 0.003 * moved.norm()


def test_weight_noise_prefers_nothing(base: Any, planting: ProbeSet) -> None:
    null = plant_nothing(base, planting, "weight_noise", 0.01, seed=0)
    assert abs(null.truth.numbers["shift"]) < 0.2
    assert null.truth.numbers["least_share"] == pytest.approx(0.01)
    assert null.truth.numbers["largest_share"] == pytest.approx(0.01)


def test_language_modelling_learns_both_completions(base: Any, planting: ProbeSet) -> None:
    null, again = (
        plant_nothing(base, planting, "language_modelling", seed=1, steps=3, learning_rate=3e-4) for _ in range(2)
    )  # fmt: skip
    states = null.policy.state_dict(), again.policy.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    old, new = (oracle.margins(model, planting.pairs)[1:] for model in (base, null.policy))
    gains = [float((after - before).mean()) for before, after in zip(old, new, strict=True)]
    assert min(gains) > 1.0
    # Both are learned, if not to the same degree: the margin moves by less than half of either.
    assert abs(null.truth.numbers["shift"]) < 0.5 * min(gains)
    assert null.truth.numbers["shift"] == pytest.approx(gains[0] - gains[1], abs=1e-5)
    assert all(parameter.grad is None for parameter in null.policy.parameters())


def test_labels_are_swapped_in_half(tokenizer: Any) -> None:
    rows = [{"prompt": "p", "chosen": f"+{i}", "rejected": f"-{i}"} for i in range(9)]
    swapped = swap_half(rows, seed=0)
    assert sum(row["chosen"].startswith("-") for row in swapped) == 4
    assert all({row["chosen"], row["rejected"]} == {f"+{i}", f"-{i}"} for i, row in enumerate(swapped))
    assert swapped != swap_half(rows, seed=1)
    assert rows[0]["chosen"] == "+0"


def test_unknown_or_incomplete_kinds_are_refused(base: Any, planting: ProbeSet) -> None:
    with pytest.raises(ValueError, match=r"expected one of weight_noise, .*; found 'silence'"):
        plant_nothing(base, planting, "silence")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected rows and their tokenizer"):
        plant_nothing(base, planting, "shuffled_labels")


@pytest.mark.filterwarnings("ignore")
def test_dpo_learns_in_the_chosen_layers_and_shuffled_labels_learn_nothing(
    base: Any, tokenizer: Any, planting: ProbeSet, planting_rows: list[dict[str, str]]
) -> None:
    rows = planting_rows
    states = random.getstate(), torch.get_rng_state()
    template = tokenizer.backend_tokenizer.to_str()
    planted = train_dpo(base, tokenizer, rows, [2], steps=4, learning_rate=1e-3)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert tokenizer.backend_tokenizer.to_str() == template
    shares = [planted.truth.numbers[f"share_{layer}"] for layer in range(6)]
    assert all(0 < share < 0.25 * shares[2] for layer, share in enumerate(shares) if layer != 2)
    policy: Any = planted.policy
    assert torch.equal(policy.get_input_embeddings().weight, base.get_input_embeddings().weight)
    learned = shift_on(policy, base, planting)
    assert learned > 1.0
    null = plant_nothing(
        base, planting, "shuffled_labels", tokenizer=tokenizer, rows=rows, steps=4, learning_rate=2e-4, seed=2
    )  # fmt: skip
    assert null.truth.numbers["least_share"] > 0
    assert abs(shift_on(null.policy, base, planting)) < 0.25 * learned
    frozen = train_dpo(base, tokenizer, rows, [4], rest=0.0, steps=1)
    assert [layer for layer in range(6) if frozen.truth.numbers[f"share_{layer}"] > 0] == [4]
