"""The same weights under other names and in other dtypes are found again; other weights are not."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align_audit.models.reference import Reference, policy_fingerprint
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.models.weights.guises import plain_name, policy_is, reference_is
from tests.helpers.tiny import tiny_model


def adapted(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    return get_peft_model(model, config)  # type: ignore[arg-type,return-value]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """One weight of one parameter is another."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 0.5
    return model


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_base_and_the_same_base_under_an_adapter(saved: list[str] | None) -> None:
    base = tiny_model("llama", dtype=torch.float32)
    policy = adapted(copy.deepcopy(base), modules_to_save=saved)
    off = Reference("adapters off", adapter_of=policy)
    assert off.fingerprint() != fingerprint(base)
    assert reference_is({off.fingerprint()}, base, policy, shares_weights=False)
    assert reference_is({fingerprint(base)}, policy, policy, shares_weights=True)
    assert not reference_is({off.fingerprint()}, moved(base), policy, shares_weights=False)
    assert not reference_is({fingerprint(moved(base))}, policy, policy, shares_weights=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_were_widened_on_the_way(dtype: torch.dtype) -> None:
    narrow = tiny_model("llama", dtype=torch.float32).to(dtype)
    wide = copy.deepcopy(narrow).float()
    assert policy_is({fingerprint(narrow)}, wide)
    assert reference_is({fingerprint(narrow)}, wide, wide, shares_weights=False)
    assert not policy_is({fingerprint(moved(narrow))}, wide)


def test_an_adapter_in_float32_on_a_base_that_was_narrow_in_training() -> None:
    base = tiny_model("llama", dtype=torch.float32).to(torch.bfloat16)
    policy = adapted(copy.deepcopy(base))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    wide = copy.deepcopy(policy).float()
    assert policy_fingerprint(wide) != policy_fingerprint(policy)
    assert policy_is({policy_fingerprint(policy)}, wide)
    assert not policy_is({policy_fingerprint(policy)}, moved(wide))


def test_names_of_a_wrapper_are_taken_off() -> None:
    assert plain_name("base_model.model.lm_head.original_module.weight") == "lm_head.weight"
    assert plain_name("model.layers.0.weight") == "model.layers.0.weight"
    trainable = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert plain_name(trainable) == "model.embed_tokens.weight"
