"""``untouched`` gives everything back as it was, also when its body raises."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.models.guard import untouched
from tests.helpers.tiny import DEVICE, tiny_model
from tests.helpers.toys import Toy

pytestmark = pytest.mark.device

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])


def two_adapters() -> Any:
    model = get_peft_model(tiny_model("llama"), LORA)
    model.add_adapter("other", LORA)
    return model


def run(model: nn.Module, body: Callable[[], object], breaks: bool) -> None:
    """The body under the guard, raising at its end if asked to."""
    with contextlib.suppress(ZeroDivisionError), untouched(model):
        body()
        if breaks:
            raise ZeroDivisionError


def test_an_error_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), untouched(Toy()):
        raise ZeroDivisionError


@pytest.mark.parametrize("breaks", [False, True])
def test_modes_come_back_module_by_module(breaks: bool) -> None:
    model = Toy().train()
    model.decks[1].eval()
    model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    seen = []
    run(model, lambda: seen.extend(module.training for module in model.modules()), breaks)
    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before
    run(model, lambda: model.train(), breaks)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("breaks", [False, True])
def test_several_models_come_back(breaks: bool) -> None:
    one, two = Toy().train(), Toy()
    with contextlib.suppress(ZeroDivisionError), untouched(one, two):
        assert not one.training
        two.train()
        two.out.weight.requires_grad_(False)
        if breaks:
            raise ZeroDivisionError
    assert one.training
    assert not two.training
    assert two.out.weight.requires_grad


def test_weights_in_4_bits_are_not_packed_for_inference_inside() -> None:
    """bitsandbytes would do it at the first forward in eval mode, for good, where this attribute of its layers is true."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].support_avx512bf16_for_cpu, model[1].support_avx512bf16_for_cpu = True, False
    with untouched(model):
        assert not any(module.support_avx512bf16_for_cpu for module in model)
    assert [module.support_avx512bf16_for_cpu for module in model] == [True, False]


def test_without_models_random_state_still_comes_back() -> None:
    torch.manual_seed(0)
    with untouched():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand(), lambda: torch.rand(()).item()])  # noqa: NPY002
@pytest.mark.parametrize("disturb", ["draw", "seed"])
def test_random_state_comes_back(draw: Callable[[], float], disturb: str, breaks: bool) -> None:
    def disturbance() -> None:
        if disturb == "draw":
            draw()
        else:
            random.seed(1)
            np.random.seed(1)  # noqa: NPY002
            torch.manual_seed(1)

    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    expected = [draw() for _ in range(3)]
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    found = []
    for _ in range(3):
        run(Toy(), disturbance, breaks)
        found.append(draw())
    assert found == expected


@pytest.mark.parametrize("breaks", [False, True])
def test_adapters_and_what_trains_come_back(breaks: bool) -> None:
    model = two_adapters()
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A.default" in name)
    frozen.requires_grad = False  # as a user may have it, against what PEFT would set
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(set(before.values())) == 2
    with torch.no_grad():
        own = model(torch.tensor([[3, 4, 5]], device=DEVICE)).logits

    def switch() -> None:
        model.set_adapter("other")
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} != before

    run(model, switch, breaks)
    assert (model.active_adapter, list(model.active_adapters)) == ("default", ["default"])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[3, 4, 5]], device=DEVICE)).logits, own)


def test_adapters_of_the_inner_model_alone_come_back() -> None:
    """As the reference's own context switches them: beneath the wrapper, which keeps its name for the active one."""
    model = two_adapters()
    with untouched(nn.DataParallel(model)):
        model.base_model.set_adapter(["other"])
        assert model.active_adapters == ["other"]
    assert (model.active_adapter, list(model.active_adapters)) == ("default", ["default"])


def test_parameters_and_their_gradients_are_the_same_objects() -> None:
    model = Toy()
    model.out.weight.grad = torch.ones_like(model.out.weight)
    before = {name: (id(value), value._version, id(value.grad)) for name, value in model.named_parameters()}
    run(model, lambda: None, False)
    assert {name: (id(value), value._version, id(value.grad)) for name, value in model.named_parameters()} == before
