"""What stands around a model computes nothing that an audit would miss, or it is refused by what was seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModelForCausalLM, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from align_audit.auditing.session import open_models
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.errors import AnatomyError
from align_audit.models import verify
from align_audit.models.reference import Reference
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

PAIRS = random_pairs(3).pairs

REFUSED = {
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
        "uses prompt learning",
    ),
    "LILY": "changing the last token changed the stream before it.* no adapter that mixes tokens",
}
"""By PEFT's name of a kind, words of the refusal; what is not here is audited."""

BROKEN: dict[str, type[Exception]] = {"POLY": ValueError, "SHADOW": AttributeError, "XLORA": KeyError}
"""What PEFT raises itself, called with tokens and a mask as ``DPOTrainer`` does: no training to audit."""

OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 3, "target_modules": None},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5], "target_modules": None},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 10},
}
"""What a kind of adapter cannot do without on a model this small."""


def _model() -> nn.Module:
    return tiny_model("llama", dtype=torch.float32, use_cache=False)


def _adapted(config: PeftConfig) -> nn.Module:
    """The model with an adapter that has been trained: everything that trains has moved."""
    model = get_peft_model(_model(), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _open(model: nn.Module, reference: nn.Module | None = None) -> None:
    source = Reference("a base", _model()) if reference is None else Reference("a wrapped base", reference)
    with OpenModels(model, source) as models:
        Session(models, PAIRS, AuditConfig())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of adapters that cannot be merged, or compile nothing here
@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_kind_of_adapter_is_replayed_as_its_wrapper_computes_or_refused(kind: str, tmp_path: Path) -> None:
    """All that PEFT knows. The right value is the wrapper's own logits, from one plain call."""
    model = _adapted(_configuration(kind, tmp_path))
    ids = torch.tensor([PAIRS[0].chosen_ids])
    if kind in BROKEN:
        with pytest.raises(BROKEN[kind]):
            model(ids)
        with pytest.raises(BROKEN[kind]):
            _open(model)
        return
    if kind in REFUSED:
        with pytest.raises(AnatomyError, match=REFUSED[kind]):
            _open(model)
        return
    with torch.no_grad():
        wanted, base = model(ids).logits[0], _model()(ids).logits[0]
    assert not torch.equal(wanted, base)
    with OpenModels(model, Reference("a base", _model())) as models:
        Session(models, PAIRS, AuditConfig())
        with models.as_policy() as replay, torch.no_grad():
            recording = replay.record({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            stream = recording.after(-1)
            for layer in range(replay.num_layers):
                stream = replay.layer(layer, stream, recording)
            torch.testing.assert_close(replay.head(stream[0]), wanted)


def _configuration(kind: str, folder: Path) -> PeftConfig:
    configuration = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    names = inspect.signature(configuration).parameters
    if "target_modules" in names and kind != "XLORA":
        options["target_modules"] = ["q_proj", "v_proj"]
    if "num_virtual_tokens" in names:
        options["num_virtual_tokens"] = 3
    if kind == "XLORA":
        get_peft_model(_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
        options.update(adapters={"first": str(folder), "second": str(folder)}, hidden_size=32)
    return configuration(**{**options, **OPTIONS.get(kind, {})})


# -- by what is seen ---------------------------------------------------------------------------------------------------

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])


class _Scaled(PeftModelForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1.01 * output.logits
        return output


class _Hooked(PeftModelForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hook changes nothing yet."""
        handle = self.get_base_model().model.layers[1].register_forward_hook(lambda *call: call[-1] * 1.0)
        try:
            return super().forward(*args, **kwargs)
        finally:
            handle.remove()


class _Cut(PeftModelForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[:, 1:]
        return output


class _Moved(PeftModelForCausalLM):
    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        places = 3 * torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, *args, position_ids=places, **kwargs)


class _Weighted(PeftModelForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        norm = self.get_base_model().model.layers[0].input_layernorm.weight
        norm.data.mul_(2.0)
        try:
            return super().forward(*args, **kwargs)
        finally:
            norm.data.div_(2.0)


class _Handing(PeftModelForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its layers want something of every call."""
        layer = self.get_base_model().model.layers[1]
        layer.mlp.asks = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            del layer.mlp.asks


WRAPPERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "logits scaled": (_Scaled, "the logits differ by up to"),
    "a hook for each call": (_Hooked, "it hooks 1 of its modules for the time of a call, such as model.layers.1"),
    "positions left out": (_Cut, r"the logits has the shape \[1, \d+, 61\] where"),
    "other positions": (_Moved, "the last layer's output differ"),
    "other weights for the time of a call": (_Weighted, "the last layer's output differ"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_wrapper_that_computes_around_the_forward_is_refused(name: str, role: str) -> None:
    kind, words = WRAPPERS[name]
    model = kind(_model(), LORA).eval()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(AnatomyError, match=words):
        _open(model) if role == "policy" else _open(perturbed(_model()), model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_without_its_wrapper_is_refused() -> None:
    model: Any = _Handing(_model(), LORA).eval()
    layer = model.get_base_model().model.layers[1].mlp

    def asked(module: Any, _: Any) -> None:
        assert module.asks

    layer.register_forward_pre_hook(asked)
    with pytest.raises(AnatomyError, match=r"inside fails \(AttributeError: .*asks.*through its wrapper it does not"):
        _open(model)


def test_an_error_that_does_not_come_again_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call that breaks once: the wrapper works afterwards, and so does the model inside."""
    real, calls = verify._check_head, []

    def once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("once")
        real(*args)

    monkeypatch.setattr(verify, "_check_head", once)
    model = get_peft_model(_model(), LORA).eval()
    with pytest.raises(ValueError, match=r"^once$"):
        _open(model)
    _open(model)


def test_an_error_of_the_model_itself_goes_through() -> None:
    """Training will meet it as well; whoever audits says so in its own words."""
    model: Any = get_peft_model(_model(), LORA).eval()
    model.get_base_model().model.layers[1].register_forward_pre_hook(lambda module, _: [][1])
    with pytest.raises(IndexError):
        _open(model)


def test_an_adapter_that_its_wrapper_switches_on_is_refused_before_it_has_learned_anything() -> None:
    """Activated LoRA, untrained: no logit differs yet, and none would in an audit, whatever it learns."""
    model = get_peft_model(
        _model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[6, 7])
    ).eval()
    ids = torch.tensor([PAIRS[0].chosen_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.get_base_model()(ids).logits)
    with pytest.raises(AnatomyError, match=r"PeftModelForCausalLM cannot be audited: .*it hooks 4 of its modules"):
        _open(model)


def test_a_model_that_has_overflowed_is_for_the_audit_to_report() -> None:
    model: Any = get_peft_model(_model(), LORA).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(float("nan"))
        assert torch.isnan(model(torch.tensor([PAIRS[0].chosen_ids])).logits).all()
    _open(model)  # does not refuse it


def test_a_wrapper_is_called_with_some_tokens_of_a_long_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its logits are in memory then: of a long pair and a large vocabulary, gigabytes."""
    called: list[torch.Size] = []
    monkeypatch.setattr(
        open_models, "check_wrapper", lambda model, replay, inputs, tolerance: called.append(inputs["input_ids"].shape)
    )
    monkeypatch.setattr(open_models, "_CALLED", 5)
    _open(_model(), perturbed(_model()))
    assert called == [(1, 5), (1, 5)]
    assert min(len(pair.chosen_ids) for pair in PAIRS) > 5
