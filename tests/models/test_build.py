"""The hash of what a model computes with beside its parameters: all that decides the function counts, nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.models.build import build_fingerprint
from align_audit.models.loading import load_model
from align_audit.models.reference import Reference, policy_fingerprint
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.models.weights.from_disk import open_streamed
from align_audit.models.weights.streaming import NotStreamable, close
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model
from tests.models.test_families import FAMILIES, build
from tests.models.test_guard_state import DYNAMIC, LONG, forward, rotary

TARGETS = ["q_proj", "v_proj"]


def adapted(alpha: int = 16, *names: str, **options: Any) -> Any:
    names = names or ("default",)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=TARGETS, **options)
    model = get_peft_model(tiny_model("llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def quantized(scale: float) -> nn.Module:
    model = tiny_model("llama")
    weight: Any = model.get_submodule("model.layers.0.mlp.up_proj").weight
    weight.quant_state = SimpleNamespace(absmax=torch.tensor([scale]), blocksize=64)
    return model


# -- what counts ---------------------------------------------------------------------------------------------------------


def at(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def scaled(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


DECIDES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "ε of a norm": (tiny_model, at("model.norm", "variance_epsilon", 1e-3)),
    "ε of a torch norm": (lambda: tiny_model("gpt2"), at("transformer.ln_f", "eps", 1e-3)),
    "scale of attention": (tiny_model, at("model.layers.1.self_attn", "scaling", 0.7)),
    "scale of rotary embeddings": (tiny_model, at("model.rotary_emb", "attention_scaling", 1.3)),
    "soft cap": (lambda: tiny_model("gemma2"), at("model.layers.0.self_attn", "attn_logit_softcapping", 9.0)),
    "window": (lambda: tiny_model("gemma2"), at("model.layers.0.self_attn", "sliding_window", 4)),
    "no window": (lambda: tiny_model("gemma2"), at("model.layers.0.self_attn", "sliding_window", None)),
    "configuration": (tiny_model, lambda model: setattr(model.config, "rms_norm_eps", 0.5)),
    "attention kernel": (tiny_model, lambda model: model.set_attn_implementation("eager")),
    "frequencies": (tiny_model, scaled),
    "another module": (tiny_model, at("model.layers.0.mlp", "act_fn", nn.GELU())),
    "another function": (tiny_model, at("model.norm", "after", nn.functional.gelu)),
    "tensor attribute": (tiny_model, at("model.norm", "gain", torch.tensor(2.0))),
    "list attribute": (tiny_model, at("model.norm", "gains", [1.0, (2.0, {"a": torch.float16})])),
    "scale of an adapter": (adapted, at("base_model.model.model.layers.0.self_attn.q_proj", "scaling", {"default": 9.0})),
    "adapters off": (adapted, lambda model: model.base_model.disable_adapter_layers()),
    "adapters merged": (adapted, lambda model: model.merge_adapter()),
    "another adapter": (lambda: adapted(16, "default", "other"), lambda model: model.set_adapter("other")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECIDES)
def test_what_decides_the_function_counts(kind: str) -> None:
    make, change = DECIDES[kind]
    model = make()
    before = build_fingerprint(model)
    change(model)
    assert build_fingerprint(model) != before


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"r": 4}])
def test_how_adapters_are_configured_counts(options: dict[str, Any]) -> None:
    config = {"r": 2, "target_modules": TARGETS}
    one = get_peft_model(tiny_model(), LoraConfig(**config))
    other = get_peft_model(tiny_model(), LoraConfig(**{**config, **options}))
    assert build_fingerprint(one) != build_fingerprint(other)


def test_the_scale_of_an_adapter_counts_though_weights_are_equal() -> None:
    one, other = adapted(16), adapted(64)
    assert policy_fingerprint(one) == policy_fingerprint(other)
    assert build_fingerprint(one) != build_fingerprint(other)
    with one.disable_adapter(), other.disable_adapter():
        assert build_fingerprint(one) == build_fingerprint(other)


def test_what_quantized_weights_are_read_with_counts() -> None:
    assert (
        len({build_fingerprint(quantized(1.0)), build_fingerprint(quantized(2.0)), build_fingerprint(tiny_model())})
        == 3
    )
    assert build_fingerprint(quantized(1.0)) == build_fingerprint(quantized(1.0))


# -- what does not -------------------------------------------------------------------------------------------------------


def idle_scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["other"] = 7.0


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


DECIDES_NOTHING: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "modes": (tiny_model, lambda model: model.train()),
    "what trains": (tiny_model, lambda model: model.requires_grad_(False)),
    "checkpointing": (tiny_model, lambda model: model.gradient_checkpointing_enable()),
    "its path": (tiny_model, lambda model: setattr(model, "name_or_path", "elsewhere")),
    "its tags": (tiny_model, lambda model: model.add_model_tags(["dpo"])),
    "a cache": (tiny_model, at("model.layers.0.self_attn", "_seq_len_cached", 9)),
    "a forward of a wrapper": (tiny_model, lambda model: setattr(model, "forward", lambda *_: None)),
    "a hook": (tiny_model, lambda model: model.register_forward_hook(lambda *_: None)),
    "the number of an object": (tiny_model, at("model.norm", "friend", object())),
    "dropout, which is off": (lambda: tiny_model("gpt2", attn_pdrop=0.1), without_dropout),
    "weights": (tiny_model, lambda model: model.model.norm.weight.data.add_(1.0)),
    "the scale of an idle adapter": (lambda: adapted(16, "default", "other"), idle_scaled),
    "one more adapter": (
        adapted, lambda model: model.add_adapter("other", LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS)),
    ),
    "one adapter in a list": (adapted, lambda model: model.base_model.set_adapter(["default"])),
    "dynamic frequencies, reset": (lambda: rotary(DYNAMIC), lambda model: [forward(model, 40), forward(model, 5)]),
    "long frequencies, short again": (lambda: rotary(LONG), lambda model: [forward(model, 40), forward(model, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECIDES_NOTHING)
def test_what_decides_nothing_does_not_count(kind: str) -> None:
    make, change = DECIDES_NOTHING[kind]
    model = make()
    before = build_fingerprint(model)
    change(model)
    assert build_fingerprint(model) == before


# -- the same model again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_read_again_has_the_same(name: str, tmp_path: Path) -> None:
    """Loaded twice, after a forward, and with its layers left on disk."""
    build(name, torch.float32).save_pretrained(tmp_path)
    loaded, again = (load_model(tmp_path, dtype=torch.float32) for _ in range(2))
    key = fingerprint(loaded), build_fingerprint(loaded)
    forward(again, 7)
    assert (fingerprint(again), build_fingerprint(again)) == key
    try:
        streamed = open_streamed(tmp_path, dtype=torch.float32)
    except NotStreamable:
        return
    assert (fingerprint(streamed), build_fingerprint(streamed)) == key
    forward(streamed, 7)
    assert build_fingerprint(streamed) == key[1]
    close(streamed)


def test_an_adapter_read_again_has_the_same(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    trained = get_peft_model(
        load_model(tmp_path / "base"), LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    )
    trained.save_pretrained(tmp_path / "adapter")
    read = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert build_fingerprint(read) == build_fingerprint(trained)
    with read.disable_adapter(), trained.disable_adapter():
        assert build_fingerprint(read) == build_fingerprint(trained)


def test_another_process_finds_the_same() -> None:
    """Whatever order its sets and dictionaries have."""
    code = (
        "from tests.models.test_build import adapted\n"
        "from align_audit.models.build import build_fingerprint\n"
        "print(build_fingerprint(adapted()))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == build_fingerprint(adapted())


# -- what is kept under it -----------------------------------------------------------------------------------------------


def with_reference(model: Any, folder: Path | None) -> Any:
    """An audit of a policy against ``model``, which keeps what it can in ``folder``."""
    config = AuditConfig.from_dict(
        {
            "max_pairs": 12, "low_rank": {"enabled": False}, "localization": {"enabled": False},
            "patching": {"noise_draws": 1, "exact_pairs": 8, "keep_reference": folder is not None},
            "statistics": {"bootstrap_resamples": 100}, "progress": False, "generations": QUICK_GENERATIONS,
        }
    )  # fmt: skip
    reference = Reference("a model that was passed", model=model)
    record, _ = audited(
        perturbed(tiny_model()), reference, random_pairs(12), config, step=1, cache=ReferenceCache(folder)
    )
    return record.model_dump(exclude={"cost", "provenance"})


def changed_epsilon(model: Any) -> Any:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.3
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [(lambda: adapted(16), lambda: adapted(64)), (tiny_model, lambda: changed_epsilon(tiny_model()))],
    ids=["alpha", "epsilon"],
)
def test_what_is_kept_of_another_function_is_not_taken(one: Any, other: Any, tmp_path: Path) -> None:
    first = with_reference(one(), tmp_path)
    found = with_reference(other(), tmp_path)
    alone = with_reference(other(), None)
    assert found["spinal"]["reference"] == alone["spinal"]["reference"] != first["spinal"]["reference"]
    assert found["margins"] == alone["margins"] != first["margins"]
    assert len(set(tmp_path.glob("reference-*"))) == 2
