"""Planted signals are found: one layer changed much and all others a little, on a model whose blocks do real work."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle

LARGE, SMALL = 0.1, 0.01
"""Norm of the weight noise over the weights' own: on the planted layer, and on all others."""


def with_noise(base: Any, planted: int, seed: int) -> Any:
    policy = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, layer in enumerate(policy.model.layers):
            size = LARGE if index == planted else SMALL
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * noise * parameter.norm() / noise.norm())
    return policy


@pytest.mark.parametrize("planted", [0, 2, 5])
def test_the_planted_layer_stands_out_by_what_restoring_it_does(
    base: Any, probes: ProbeSet, audited: Any, planted: int
) -> None:
    policy = with_noise(base, planted, seed=planted)
    _, arrays = audited(policy, base, probes, patching={"noise_draws": 0})
    blocks = arrays["per_pair.transplant"][:, 1:-1]

    # The truth, by other means: put one layer's new weights into the reference, or its old ones into the policy.
    own, new = (oracle.margins(model, probes.pairs)[0] for model in (base, policy))
    alone, restored = [], []
    for index in range(len(base.model.layers)):
        for source, target, found, zero in ((policy, base, alone, own), (base, policy, restored, new)):
            model = copy.deepcopy(target)
            model.model.layers[index].load_state_dict(source.model.layers[index].state_dict())
            found.append(oracle.margins(model, probes.pairs)[0] - zero)
    np.testing.assert_allclose(blocks, np.stack(alone, axis=1), atol=1e-6)
    size = np.abs(blocks).mean(axis=0)
    assert int(size.argmax()) == int(np.abs(np.stack(restored, axis=1)).mean(axis=0).argmax()) == planted
    assert size[planted] > 2 * np.delete(size, planted).max()


def test_a_change_that_moves_no_margin_is_no_effect(base: Any, probes: ProbeSet, audited: Any) -> None:
    """A rescaled gate undone in the next product: weights move, no activation of the stream does."""
    policy = copy.deepcopy(base)
    with torch.no_grad():
        policy.model.layers[3].mlp.up_proj.weight.mul_(2.0)
        policy.model.layers[3].mlp.down_proj.weight.div_(2.0)
    record, arrays = audited(policy, base, probes, patching={})
    assert record.provenance.policy_hash != record.provenance.reference_hash
    assert np.abs(arrays["per_pair.effect"]).max() < 1e-9
    assert record.patching.recovery[3].reason is not None
    assert record.controls.noise.verdict == "not_run"
