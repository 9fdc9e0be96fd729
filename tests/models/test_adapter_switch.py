"""The way to the reference that is repeated by what it changed computes what peft's own switch does, and comes back."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from align_audit.models import adapters
from align_audit.models.guard import untouched
from align_audit.models.reference import Reference
from tests.helpers.states import changed, everything
from tests.helpers.tiny import tiny_model

PLACES = ["q_proj", "down_proj"]
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=PLACES, modules_to_save=["lm_head"]),
    "dora": LoraConfig(r=2, target_modules=PLACES, use_dora=True),
    "ia3": IA3Config(target_modules=PLACES, feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=PLACES),
    "oft": OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    "vera": VeraConfig(r=2, target_modules=["q_proj"]),
    "tokens": TrainableTokensConfig(token_indices=[3, 4]),
    "adaption prompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=3),
}


def adapted(kind: str = "lora") -> Any:
    """A model with an adapter that has been trained."""
    model = get_peft_model(tiny_model(dtype=torch.float32), KINDS[kind]).eval()
    _move(model)
    return model


def _move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def with_frozen_adapter() -> Any:
    model = adapted()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 3, 4, 8]]), use_cache=False).logits


def counted(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose adapters peft switches, from now on, under the eyes of what gives all of them back."""
    models: list[nn.Module] = []
    kept = adapters.adapters_kept

    def keep(model: nn.Module) -> Any:
        models.append(model)
        return kept(model)

    monkeypatch.setattr(adapters, "adapters_kept", keep)
    return models


@pytest.mark.filterwarnings("ignore::UserWarning")  # of adapters that cannot be merged, or compile nothing here
@pytest.mark.parametrize("kind", [*KINDS, "ref adapter"])
def test_each_turn_computes_what_peft_computes_and_leaves_the_policy(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = with_frozen_adapter() if kind == "ref adapter" else adapted(kind)
    reference = Reference("", adapter_of=policy)
    of_policy = logits(policy)
    with reference.active():
        expected = logits(policy)
    assert not torch.equal(expected, of_policy)
    before = everything(policy)
    by_peft = counted(monkeypatch)
    with untouched(policy), reference.often_active():
        inside = everything(policy)
        for _ in range(2):
            with reference.active():
                assert torch.equal(logits(policy), expected)
                assert changed(inside, everything(policy)) != []
            assert changed(inside, everything(policy)) == []
            assert torch.equal(logits(policy), of_policy)
    assert by_peft == [], "peft was asked once, and by nobody else"
    assert changed(before, everything(policy)) == []


def test_a_turn_that_fails_comes_back_too() -> None:
    policy = adapted()
    reference = Reference("", adapter_of=policy)
    with untouched(policy), reference.often_active():
        inside = everything(policy)
        with contextlib.suppress(ZeroDivisionError), reference.active():
            raise ZeroDivisionError
        assert changed(inside, everything(policy)) == []


def test_a_turn_inside_a_turn_stays_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = with_frozen_adapter()
    reference = Reference("", adapter_of=policy)
    by_peft = counted(monkeypatch)
    with untouched(policy), reference.often_active():
        inside = everything(policy)
        with reference.active():
            expected = logits(policy)
            with reference.active():
                assert torch.equal(logits(policy), expected)
            assert torch.equal(logits(policy), expected)
        assert changed(inside, everything(policy)) == []
    assert by_peft == [policy], "what is not the policy's state is no place to start from"


def test_merged_adapters_are_switched_by_peft_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn takes them out of copies of the weights, which nobody keeps until the next."""
    policy = adapted()
    reference = Reference("", adapter_of=policy)
    with reference.active():
        expected = logits(policy)
    policy.merge_adapter()
    by_peft = counted(monkeypatch)
    with untouched(policy), reference.often_active():
        inside = everything(policy)
        for _ in range(2):
            with reference.active():
                torch.testing.assert_close(logits(policy), expected, rtol=1e-3, atol=1e-3)
            assert changed(inside, everything(policy)) == []
    assert by_peft == [policy, policy]


def test_nothing_is_remembered_for_the_next_audit() -> None:
    """Between two, training may add an adapter, or switch to another."""
    policy = adapted()
    reference = Reference("", adapter_of=policy)
    with reference.active():
        expected = logits(policy)
    with untouched(policy), reference.often_active(), reference.active():
        assert torch.equal(logits(policy), expected)
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    policy.set_adapter("second")
    policy.eval()
    before = everything(policy)
    with untouched(policy), reference.often_active(), reference.active():
        assert torch.equal(logits(policy), expected)
    assert changed(before, everything(policy)) == []
