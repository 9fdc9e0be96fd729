"""A saved model is opened as it was saved, or refused in one sentence: damaged files, models of text and images, code of
their own, adapters whose base moved, and adapters with added tokens."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from align_audit import audit
from align_audit.errors import ReferenceUnavailableError
from align_audit.models.loading import load_model
from align_audit.models.reference import load_policy, resolve_reference
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import VOCABULARY, perturbed, random_pairs, tiny_model

IDS = torch.arange(3, 15).view(2, 6)
LORA: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def full(folder: Path) -> Path:
    tiny_model(dtype=torch.float32).save_pretrained(folder)  # type: ignore[operator]
    return folder


def adapter(folder: Path, **lora: Any) -> Path:
    """An adapter that moves what its base computes, saved; its base is beside it."""
    base: Any = AutoModelForCausalLM.from_pretrained(full(folder.parent / f"{folder.name}-base"))
    torch.manual_seed(1)
    get_peft_model(base, LoraConfig(**{**LORA, **lora})).save_pretrained(folder)
    return folder


# -- damaged files -----------------------------------------------------------------------------------------------------


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def without_last_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


def of_other_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
FULL_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut off": cut("model.safetensors"),
    "weights of zeros": put("model.safetensors", bytes(4096)),
    "no bytes of weights": put("model.safetensors", b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a weight is not there": without_last_weight,
    "weights of another width": of_other_width,
    "configuration cut off": cut("config.json"),
    "configuration is no text": put("config.json", b"\xff\xfe\x00\x9c"),
    "configuration is a list": put("config.json", b"[1]"),
    "configuration too deep": put("config.json", DEEP),
    "configuration of no model": put("config.json", b"{}"),
    "an index that is no index": lambda folder: (
        (folder / "model.safetensors").unlink(), (folder / "model.safetensors.index.json").write_text('{"a": 1}'),
    ),
}  # fmt: skip
ADAPTER_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "weights cut off": cut("adapter_model.safetensors"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "weights of another rank": of_other_rank,
    "configuration cut off": cut("adapter_config.json"),
    "configuration is no text": put("adapter_config.json", b"\xff\xfe\x00\x9c"),
    "configuration is a list": put("adapter_config.json", b"[1]"),
    "configuration too deep": put("adapter_config.json", DEEP),
    "of an unknown kind": put("adapter_config.json", b'{"peft_type": "ABACUS", "base_model_name_or_path": "/no/base"}'),
}


def one_sentence(refusal: pytest.ExceptionInfo[ReferenceUnavailableError], *words: str) -> None:
    text = str(refusal.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("damage", FULL_DAMAGE)
def test_a_damaged_model_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    """As the policy, and as a reference that is streamed or loaded whole."""
    folder = full(tmp_path / "damaged")
    FULL_DAMAGE[damage](folder)
    with pytest.raises(ReferenceUnavailableError) as refusal:
        load_policy(folder)
    one_sentence(refusal, str(folder), "save")
    with pytest.raises(ReferenceUnavailableError) as refusal:
        audit(tiny_model(dtype=torch.float32), folder, random_pairs(2), quick(), 0)
    one_sentence(refusal, str(folder), "save")


@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_a_damaged_adapter_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "damaged")
    ADAPTER_DAMAGE[damage](folder)
    with pytest.raises(ReferenceUnavailableError) as refusal:
        load_policy(folder)
    one_sentence(refusal, str(folder))


@pytest.mark.parametrize("damage", ["weights cut off", "weights of another rank", "configuration is no text"])
def test_a_damaged_frozen_adapter_is_refused_too(damage: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "policy")
    ref = shutil.copytree(adapter(tmp_path / "frozen"), folder / "ref")
    ADAPTER_DAMAGE[damage](ref)
    with pytest.raises(ReferenceUnavailableError) as refusal:
        load_policy(folder)
    one_sentence(refusal, str(ref))


def test_the_librarys_error_is_the_cause(tmp_path: Path) -> None:
    folder = full(tmp_path / "damaged")
    cut("model.safetensors")(folder)
    with pytest.raises(ReferenceUnavailableError, match="SafetensorError: ") as refusal:
        load_model(folder)
    assert type(refusal.value.__cause__).__name__ == "SafetensorError"


def test_a_model_without_head_gets_no_random_one(tmp_path: Path) -> None:
    LlamaModel(tiny_model().config).save_pretrained(tmp_path)
    with pytest.raises(ReferenceUnavailableError, match=r"lacks 1 of the weights of LlamaForCausalLM, such as lm_head"):
        load_model(tmp_path)


# -- models of text and something else ---------------------------------------------------------------------------------

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2,
)  # fmt: skip
SIGHT: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SIGHT, projection_dim=16)


MIXED: dict[str, Callable[[], Any]] = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=clip(), text_config=LlamaConfig(**TEXT), image_token_id=63)
    ),
    "vipllava": lambda: VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=clip(), text_config=LlamaConfig(**TEXT), image_token_id=63, vision_feature_layers=[-1, 1]
        )
    ),
    "paligemma": lambda: PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=SiglipVisionConfig(**SIGHT), text_config=GemmaConfig(**TEXT, head_dim=8), image_token_id=63,
            projection_dim=32,
        )
    ),
    "qwen2_audio": lambda: Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={
                "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
            },
            text_config={"model_type": "qwen2", **TEXT},
            audio_token_index=63,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_a_model_of_text_and_something_else_is_opened_as_its_own_class(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MIXED[kind]().eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is type(model)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_on_such_a_model_is_audited_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MIXED["llava"]().eval()
    model.save_pretrained(tmp_path / "base")
    lora = {**LORA, "target_modules": r".*language_model.*\.q_proj"}
    adapted = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), LoraConfig(**lora)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = random_pairs(4)
    here, there = (audit(policy, None, pairs, quick()) for policy in (adapted, tmp_path / "adapter"))
    assert there.margins.shift.mean == here.margins.shift.mean != 0.0
    assert there.patching.effect == here.patching.effect


# -- code of their own -------------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder: Path) -> Path:
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config.update(model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["full", "adapter", "reference"])
def test_code_of_its_own_runs_only_where_it_is_trusted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    if kind == "adapter":
        folder = adapter(tmp_path / "policy")
        with_code(tmp_path / "policy-base")
    else:
        folder = with_code(full(tmp_path / "policy"))
    whole = tiny_model(dtype=torch.float32)
    models = {"full": (folder, whole), "adapter": (folder, None), "reference": (whole, folder)}[kind]
    with pytest.raises(ReferenceUnavailableError, match="--trust-remote-code") as refusal:
        audit(*models, random_pairs(2), quick())
    one_sentence(refusal, "trust_remote_code=True")
    trusted: Any = load_policy(folder, trust_remote_code=True)
    inner = trusted.get_base_model() if kind == "adapter" else trusted
    assert type(inner).__name__ == "OwnForCausalLM"
    if kind != "adapter":
        assert torch.equal(logits(trusted), logits(tiny_model(dtype=torch.float32)))


# -- the dtype under an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "trained", "asked", "expected"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.float32, None, torch.float32),
        (torch.float64, torch.float32, None, torch.float64),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_base_in_16_bits_is_read_in_float32_under_an_adapter_of_float32(
    base: torch.dtype, trained: torch.dtype, asked: torch.dtype | None, expected: torch.dtype, tmp_path: Path
) -> None:
    """As a trainer reads it. Bit for bit the adapter on the base that is loaded so by hand."""
    tiny_model(dtype=base).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=trained)
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False).save_pretrained(tmp_path / "adapter")
    loaded: Any = load_policy(tmp_path / "adapter", dtype=asked)
    inner: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=expected)
    assert loaded.get_input_embeddings().weight.dtype == expected
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(inner, tmp_path / "adapter").eval()))
    with loaded.disable_adapter():
        assert torch.equal(
            logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=expected).eval())
        )


# -- a base that moved -------------------------------------------------------------------------------------------------


def test_a_base_that_moved_is_found_at_the_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = adapter(tmp_path / "policy")
    expected = logits(load_policy(folder))
    (tmp_path / "policy-base").rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "align_audit"):
        moved = load_policy(folder, reference=tmp_path / "elsewhere")
    assert torch.equal(logits(moved), expected)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("align_audit")]
    assert f"the base of policy from {tmp_path / 'elsewhere'}" in line
    assert f"{tmp_path / 'policy-base'}, which its adapter_config.json names, is not there" in line
    pairs = random_pairs(4)
    by_path = audit(folder, str(tmp_path / "elsewhere"), pairs, quick())
    by_model = audit(moved, None, pairs, quick())
    assert by_path.margins.shift.mean == pytest.approx(by_model.margins.shift.mean, rel=1e-4)


def test_a_base_that_is_there_is_taken_whatever_the_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = adapter(tmp_path / "policy")
    other: Any = perturbed(tiny_model(dtype=torch.float32))
    other.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING, "align_audit"):
        assert torch.equal(logits(load_policy(folder, reference=tmp_path / "other")), logits(load_policy(folder)))
    assert not [record for record in caplog.records if record.name.startswith("align_audit")]


@pytest.mark.parametrize("instead", ["none", "a model in memory", "an adapter", "an empty folder", "a lost folder"])
def test_a_base_that_is_nowhere_is_asked_for(instead: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "policy")
    shutil.rmtree(tmp_path / "policy-base")
    (tmp_path / "empty").mkdir()
    reference = {
        "none": None, "a model in memory": tiny_model(), "an adapter": folder, "an empty folder": tmp_path / "empty",
        "a lost folder": tmp_path / "lost",
    }[instead]  # fmt: skip
    with pytest.raises(ReferenceUnavailableError, match=r"the base model of .*policy-base, is not there") as refusal:
        load_policy(folder, reference=reference)
    one_sentence(refusal, "--reference", "base_model_name_or_path")


# -- added tokens ------------------------------------------------------------------------------------------------------

ADDED = 5
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "trained": {"modules_to_save": ["embed_tokens"]},
    "trained with the head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "some tokens trained": {"trainable_token_indices": [VOCABULARY, VOCABULARY + ADDED - 1]},
    "low rank": {"target_modules": ["q_proj", "embed_tokens"]},
}


def with_added_tokens(folder: Path, tied: bool, added: int = ADDED, **lora: Any) -> nn.Module:
    """An adapter on a base that got more embeddings in memory only, or fewer; saved, and as it computes."""
    tiny_model(dtype=torch.float32, tie_word_embeddings=tied).save_pretrained(folder.parent / "base")  # type: ignore[operator]
    base: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    torch.manual_seed(2)
    base.resize_token_embeddings(VOCABULARY + added)
    adapted = get_peft_model(base, LoraConfig(**{**LORA, **lora})).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_that_was_cut_to_its_tokenizer_is_cut_again(tied: bool, tmp_path: Path) -> None:
    """As bases whose embeddings are padded are by scripts, and by a trainer that takes over a chat template."""
    trained: Any = with_added_tokens(tmp_path / "adapter", tied, -5)
    ids = torch.arange(VOCABULARY - 5)[None, -12:]
    loaded: Any = load_policy(tmp_path / "adapter")
    assert loaded.config.vocab_size == VOCABULARY - 5
    assert torch.equal(logits(loaded, ids), logits(trained, ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "tied"), [(kind, tied) for kind in EMBEDDINGS for tied in (False, True) if tied or kind != "low rank"]
)
def test_added_tokens_come_with_the_adapter(kind: str, tied: bool, tmp_path: Path) -> None:
    """Bit for bit what was trained, as the policy and with the adapter off."""
    trained: Any = with_added_tokens(tmp_path / "adapter", tied, **EMBEDDINGS[kind])
    ids = torch.arange(VOCABULARY + ADDED)[None, -12:]
    loaded: Any = load_policy(tmp_path / "adapter")
    assert loaded.config.vocab_size == VOCABULARY + ADDED
    assert torch.equal(logits(loaded, ids), logits(trained, ids))
    with loaded.disable_adapter(), trained.disable_adapter():
        off = logits(loaded, ids)
        assert torch.equal(off, logits(trained, ids))
    assert not torch.equal(off, logits(loaded, ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dropped"),
    [("trained", "original_module"), ("trained", "lm_head"), ("frozen", "lm_head"), ("low rank", "")],
)
def test_added_tokens_that_the_adapter_does_not_hold_are_refused(kind: str, dropped: str, tmp_path: Path) -> None:
    """peft itself leaves out the head where the embedding is low rank."""
    with_added_tokens(tmp_path / "adapter", False, **EMBEDDINGS[kind])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if not dropped or dropped not in key}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(
        ReferenceUnavailableError, match=f"{VOCABULARY + ADDED} embeddings, .*base has {VOCABULARY}"
    ) as refusal:
        load_policy(tmp_path / "adapter")
    one_sentence(refusal, "base_model_name_or_path", "resized embeddings")


# -- what loading leaves -----------------------------------------------------------------------------------------------


def with_frozen(folder: Path) -> Path:
    shutil.copytree(adapter(folder), folder / "ref")
    return folder


def of_another_rank(folder: Path) -> Path:
    of_other_rank(adapter(folder))
    return folder


LOADED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "a policy": (full, load_policy),
    "an adapter": (adapter, load_policy),
    "an adapter with a copy of its head": (lambda folder: adapter(folder, modules_to_save=["lm_head"]), load_policy),
    "an adapter and the frozen one beside it": (with_frozen, load_policy),
    "an adapter that is refused": (of_another_rank, load_policy),
    "a reference": (full, lambda folder: resolve_reference(tiny_model(), folder).model()),
    "a reference that is an adapter": (adapter, lambda folder: resolve_reference(tiny_model(), folder).model()),
}


@pytest.mark.parametrize("kind", LOADED)
def test_loading_draws_no_random_number_of_the_callers(kind: str, tmp_path: Path) -> None:
    """peft draws the weights of an adapter before it reads those that were saved."""
    make, load = LOADED[kind]
    folder = make(tmp_path / "saved")
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.get_rng_state(), random.getstate()
    with contextlib.suppress(ReferenceUnavailableError):
        load(folder)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
