"""The fingerprint of a model: every bit counts, and nothing but the weights does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import align_audit.models.weights.fingerprint as module
from align_audit.models.reference import Reference, policy_fingerprint
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.device

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def holder(**tensors: torch.Tensor) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    return made


def tensor(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (8 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    values = tensor(dtype)
    bits = 8 * values.element_size()
    prints = {fingerprint(holder(w=values))}
    for place in range(values.numel()):
        for bit in range(bits):
            flipped = values.clone()
            whole = flipped.view(-1).view(INTEGERS[values.element_size()])
            sign = bit == bits - 1 and whole.dtype != torch.uint8
            whole[place] ^= -(2**bit) if sign else 2**bit
            prints.add(fingerprint(holder(w=flipped)))
    assert len(prints) == 1 + values.numel() * bits


def test_it_is_sixteen_hexadecimal_digits() -> None:
    found = fingerprint(holder(w=tensor()))
    assert len(found) == 16
    assert set(found) <= set("0123456789abcdef")


def test_names_shapes_and_dtypes_count() -> None:
    zeros = torch.zeros(4, 6)
    prints = [
        fingerprint(holder(w=zeros)),
        fingerprint(holder(v=zeros)),
        fingerprint(holder(w=zeros.reshape(6, 4))),
        fingerprint(holder(w=zeros.reshape(24))),
        fingerprint(holder(w=torch.zeros(4, 6, 1))),
        fingerprint(holder(w=zeros.to(torch.int32))),
        fingerprint(holder(w=zeros.half())),
        fingerprint(holder(w=zeros, v=zeros)),
        fingerprint(holder(w=torch.zeros(3, 8))),
        fingerprint(holder()),
    ]
    assert len(set(prints)) == len(prints)


def test_the_same_weights_under_exchanged_names_differ() -> None:
    one, two = tensor(seed=1), tensor(seed=2)
    assert fingerprint(holder(a=one, b=two)) != fingerprint(holder(a=two, b=one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_swap_of_two_weights_counts(dtype: torch.dtype) -> None:
    """Also of powers of two a power of two apart, which a product modulo 2⁶⁴ could lose."""
    for distance in (1, 2, 64, 4096, 2**14):
        values = torch.full((2**14 + 1,), 0.5, dtype=dtype)
        values[0], values[distance] = 1.0, 2.0
        swapped = values.clone()
        swapped[0], swapped[distance] = 2.0, 1.0
        assert fingerprint(holder(w=values)) != fingerprint(holder(w=swapped)), distance


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 2**31))
def test_any_reordering_of_the_weights_counts(order: list[int], seed: int) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    same = order == sorted(order)
    assert (fingerprint(holder(w=values)) == fingerprint(holder(w=values[order]))) == same


def test_the_order_of_parameters_and_their_layout_in_memory_do_not_count() -> None:
    one, two = tensor(seed=1), tensor(seed=2)
    expected = fingerprint(holder(a=one, b=two))
    assert fingerprint(holder(b=two, a=one)) == expected
    turned = holder(a=one, b=two)
    turned.a = nn.Parameter(one.T.contiguous().T, requires_grad=False)
    assert not turned.a.is_contiguous()
    assert fingerprint(turned) == expected


def test_training_state_does_not_count() -> None:
    model = tiny_model("llama")
    expected = fingerprint(model)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.grad = torch.ones_like(parameter)
    assert fingerprint(model) == expected
    assert fingerprint(tiny_model("llama", seed=1)) != expected


def test_sums_do_not_depend_on_how_many_blocks_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = holder(w=torch.randn(5, 70_001, generator=torch.Generator().manual_seed(0)))
    expected = fingerprint(weights)
    for blocks in (2, 3, 256):
        monkeypatch.setattr(module, "_BLOCKS", {"cpu": blocks})
        assert fingerprint(weights) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_changes_that_sums_could_miss(dtype: torch.dtype) -> None:
    """Signs flipped everywhere, in pairs or in rectangles; rows, columns, blocks or single weights exchanged."""
    weights = torch.randn(192, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = {"as it is": fingerprint(holder(w=weights))}

    def changed(name: str, change: Any) -> None:
        other = weights.clone()
        change(other)
        assert not torch.equal(other, weights)
        found[name] = fingerprint(holder(w=other))

    changed("all signs", lambda w: w.neg_())
    changed("two signs of a row", lambda w: w[3, 10:12].neg_())
    changed("two signs of a column", lambda w: w[3:5, 10].neg_())
    changed("a rectangle of signs", lambda w: w[4:6, 20:22].neg_())
    changed("the same rectangle elsewhere", lambda w: w[6:8, 20:22].neg_())
    changed("rows", lambda w: w.__setitem__([0, 1], w[[1, 0]]))
    changed("rows of two blocks", lambda w: w.__setitem__([0, 64], w[[64, 0]]))
    changed("whole blocks", lambda w: w.copy_(w.roll(64, 0)))
    changed("all rows by one", lambda w: w.copy_(w.roll(1, 0)))
    changed("all columns by one", lambda w: w.copy_(w.roll(1, 1)))
    changed("two weights of a row", lambda w: w.__setitem__((7, [1, 2]), w[7, [2, 1]]))
    changed("two weights of a column", lambda w: w.__setitem__(([7, 8], 1), w[[8, 7], 1]))
    assert len(set(found.values())) == len(found), found


def test_empty_and_single_parameters() -> None:
    prints = {
        fingerprint(holder(w=torch.empty(0))),
        fingerprint(holder(w=torch.tensor(1.0))),
        fingerprint(holder(w=torch.tensor(2.0))),
        fingerprint(holder(w=torch.tensor([1.0]))),
    }
    assert len(prints) == 4


def test_another_process_finds_the_same() -> None:
    code = (
        "from tests.helpers.tiny import tiny_model\n"
        "from align_audit.models.weights.fingerprint import fingerprint\n"
        "print(fingerprint(tiny_model('llama')))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(tiny_model("llama"))


# -- adapters ------------------------------------------------------------------------------------------------------------


def adapted(*names: str, **options: Any) -> PeftModel:
    """A PEFT model with adapters of these names, each moved by its own noise."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(tiny_model("llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        shift(model, name, 1.0)
    return model


def shift(model: PeftModel, adapter: str, by: float) -> None:
    seen = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter in name.split(".")[-2:]:
                parameter.add_(by)
                seen += 1
    assert seen


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_inactive_adapters_do_not_count(options: dict[str, Any]) -> None:
    model = adapted("default", "ref", **options)
    policy, reference = policy_fingerprint(model), Reference("", adapter_of=model).fingerprint()
    assert policy != reference
    shift(model, "ref", 1.0)
    assert policy_fingerprint(model) == policy
    moved = Reference("", adapter_of=model).fingerprint()
    assert moved != reference
    shift(model, "default", 1.0)
    assert policy_fingerprint(model) != policy
    assert Reference("", adapter_of=model).fingerprint() == moved


def test_with_adapters_off_only_the_base_counts() -> None:
    model = adapted("default")
    reference = Reference("", adapter_of=model)
    expected = reference.fingerprint()
    shift(model, "default", 1.0)
    assert reference.fingerprint() == expected
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1.0)
    assert reference.fingerprint() != expected


def test_a_passed_peft_reference_counts_its_active_adapters() -> None:
    model = adapted("default", "spare")
    expected = Reference("", model=model).fingerprint()
    shift(model, "spare", 1.0)
    assert Reference("", model=model).fingerprint() == expected
    shift(model, "default", 1.0)
    assert Reference("", model=model).fingerprint() != expected


def test_an_adapter_may_be_called_like_a_module() -> None:
    """Inactive, and named as a part of every parameter's path: the rest of the model counts all the same."""
    model = adapted("default", "layers")
    expected = policy_fingerprint(model)
    shift(model, "layers", 1.0)
    assert policy_fingerprint(model) == expected
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert policy_fingerprint(model) != expected
