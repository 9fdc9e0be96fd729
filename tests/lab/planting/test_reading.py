"""Margins, gradients and parts, against the oracle, finite differences and what the modules are called."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.lab.planting.parts import head_parts, layer_parts, output_projection, site_part, weights_of
from align_audit.lab.planting.reading import margin_gradient, margins, padded_rows, projection_rows
from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle
from tests.helpers.tiny import FAMILIES, random_pairs, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_the_oracles(family: str) -> None:
    model, pairs = tiny_model(family), random_pairs(5).pairs
    expected, *_ = oracle.margins(model, pairs)
    np.testing.assert_allclose(margins(model, pairs).numpy(), expected, rtol=0, atol=1e-6)


def test_batches_change_nothing(base: Any, probes: ProbeSet) -> None:
    whole, single = padded_rows(probes), padded_rows(probes, tokens=1)
    assert (len(whole), len(single)) == (1, len(probes))
    expected, *_ = oracle.margins(base, probes.pairs)
    np.testing.assert_allclose(margins(base, probes).numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_is_the_margins_slope(family: str) -> None:
    model, pairs = tiny_model(family), random_pairs(4).pairs
    gradient = margin_gradient(model, pairs)
    generator = torch.Generator().manual_seed(0)
    weights = weights_of(model)
    direction = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
    slope = sum(float((gradient[name] * d).sum()) for name, d in direction.items())
    ends = [
        float(margins(model, pairs, {n: w + step * direction[n] for n, w in weights.items()}).mean())
        for step in (1e-5, -1e-5)
    ]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_train_mode_is_refused() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match="train mode"):
        margins(model, random_pairs(1))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("qwen3", "self_attn.o_proj", "mlp.down_proj"),
        ("gemma2", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
    ],
)
def test_output_projections_are_found(family: str, attention: str, mlp: str) -> None:
    model = tiny_model(family)
    assert output_projection(model, 1, "attention").weight.endswith(f".1.{attention}.weight")
    found = output_projection(model, 1, "mlp")
    assert found.weight.endswith(f".1.{mlp}.weight")
    assert found.transposed == (family == "gpt2")
    names = {name for name, _ in site_part(model, 1, "mlp").slices}
    assert names == {name for name, _ in model.named_parameters() if re.search(r"\.1\.mlp\.", name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_rows_make_the_weights_gradient(family: str) -> None:
    model, pairs = tiny_model(family), random_pairs(4).pairs
    projection = output_projection(model, 1, "mlp")
    rows = projection_rows(model, pairs, projection)
    expected = margin_gradient(model, pairs)[projection.weight]
    torch.testing.assert_close(projection.stored(rows.weight_gradient), expected, rtol=1e-6, atol=1e-9)
    assert int(rows.first.sum()) == 2 * len(pairs)
    assert int(rows.completion.sum()) == sum(
        len(ids) - start for pair in pairs for ids, start in oracle.sides(pair)
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_heads_slice_is_what_that_head_writes(family: str) -> None:
    """Zeroing the slice takes away exactly what the head's values put into the projection."""
    model: Any = tiny_model(family)
    part = head_parts(model, 0)[2]
    projection = output_projection(model, 0, "attention")
    values = torch.zeros(1, 1, 32, dtype=torch.float64)
    size = 32 // 4
    values[..., 2 * size : 3 * size] = torch.arange(1.0, size + 1)
    bias = projection.module(torch.zeros_like(values))
    (weight,) = part.views(weights_of(model))
    written = (
        weight.T @ values[0, 0, 2 * size : 3 * size] if family == "gpt2" else weight @ values[0, 0, 2 * size : 3 * size]
    )
    torch.testing.assert_close((projection.module(values) - bias)[0, 0], written)


def test_layer_parts_hold_the_layers_parameters_once(base: Any) -> None:
    names = [name for part in layer_parts(base) for name, _ in part.slices]
    assert sorted(names) == sorted(name for name, _ in base.named_parameters() if name.startswith("model.layers."))
    assert [part.layer for part in layer_parts(base)] == list(range(6))
