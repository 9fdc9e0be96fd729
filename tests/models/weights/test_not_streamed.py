"""What cannot be streamed is said and loaded whole; files that fail surface where their layer is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.loading import load_model
from align_audit.models.reference import resolve_reference
from align_audit.models.weights import streaming as layer_stream
from align_audit.models.weights.from_disk import open_streamed
from align_audit.models.weights.streaming import NotStreamable, close, stream_of
from tests.helpers.tiny import perturbed, tiny_model
from tests.models.weights.saved import (
    _no_thread_is_left,  # noqa: F401
    layer,
    logits,
    save,
    wait_for_threads,
)

pytestmark = pytest.mark.device


# -- what cannot be streamed is said and loaded whole ---------------------------------------------------------------------

MOE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, vocab_size=61,
)  # fmt: skip


def save_moe(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MOE)).save_pretrained(folder)
    return folder


def test_fused_experts_are_refused_with_the_reason_and_loaded_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_moe(tmp_path / "moe")
    why = r"model\.layers\.0\.mlp\.experts\.gate_up_proj is put together from stored tensors when it is loaded"
    with pytest.raises(NotStreamable, match=why):
        open_streamed(folder, dtype=torch.float32)
    whole = load_model(folder, dtype=torch.float32)
    reference = resolve_reference(perturbed(whole), folder)
    assert reference.source == "streamed from moe"
    model = reference.model()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(whole))
    assert reference.source.startswith("loaded from moe (whole, not layer by layer: model.layers.0.mlp.experts.gate_up")
    assert "whole reference in memory" in caplog.text
    reference.release()
    assert reference.model() is not model


def test_other_refusals_have_their_reasons(tmp_path: Path) -> None:
    def refused(folder: Path | str, words: str, **options: Any) -> None:
        with pytest.raises(NotStreamable, match=words):
            open_streamed(folder, dtype=torch.float32, **options)

    refused(tmp_path / "nowhere", "neither a directory nor a hub name")
    folder = save(tmp_path / "model")
    refused(folder, "no submodule 'model.blocks'", layers="model.blocks")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")
    (folder / "adapter_config.json").unlink()
    torch.save(load_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "not in safetensors files")
    # Layers that are one module, and a key the file lacks.
    model = tiny_model("llama", dtype=torch.float32)
    model.model.layers[1] = model.model.layers[0]  # type: ignore[union-attr, index, operator]
    with pytest.raises(NotStreamable, match="one and the same"):
        layer_stream.own_tensors(model, layer_stream.find_layers(model)[1])
    tied: Any = tiny_model("llama", dtype=torch.float32)
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotStreamable, match="layer 0 shares a weight"):
        layer_stream.own_tensors(tied, layer_stream.find_layers(tied)[1])


def test_a_weight_that_no_file_has_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NotStreamable, match=r"its files lack model\.layers\.2\.mlp\.up_proj\.weight, which would be random"
    ):
        open_streamed(folder, dtype=torch.float32)


def test_a_model_without_its_head_is_not_given_a_random_one(tmp_path: Path) -> None:
    """As one that was saved without it, by AutoModel say; loading it whole says so."""
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotStreamable, match=r"its files lack lm_head\.weight, which would be random"):
        open_streamed(folder, dtype=torch.float32)
    with pytest.raises(ReferenceUnavailableError, match=r"lacks 1 of the weights of LlamaForCausalLM"):
        load_model(folder)


def test_layers_used_outside_their_forward_are_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def peeking(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        out.logits = out.logits + self.model.layers[0].mlp.up_proj.weight.sum()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", peeking)
    with pytest.raises(NotStreamable, match="forward"):
        open_streamed(folder, dtype=torch.float32)


def test_adapters_are_loaded_plainly(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = save(tmp_path / "base")
    adapted = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    adapted.save_pretrained(str(tmp_path / "adapter"))
    reference = resolve_reference(load_model(base), tmp_path / "adapter")
    assert reference.source == "loaded from adapter"
    assert stream_of(reference.model()) is None


def read_on(model: Any, indices: list[int]) -> None:
    for index in indices:
        layer(model, index)


@pytest.mark.parametrize("prefetched", [True, False])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("vanish", r"cannot read model\.layers\.\d.* from .*safetensors: .*No such file.*expected it to stay"),
        ("change", "was changed while the reference was being read"),
    ],
)
def test_files_that_fail_in_the_middle_surface_at_the_layer_call(
    harm: str, words: str, prefetched: bool, tmp_path: Path
) -> None:
    """In the thread that reads ahead, or in the call itself."""
    folder = save(tmp_path, num_hidden_layers=6)
    model: Any = open_streamed(folder, dtype=torch.float32)
    layer(model, 0)
    layer(model, 1)  # and 2 is on its way
    wait_for_threads()
    file = folder / "model.safetensors"
    if harm == "vanish":
        file.rename(folder / "elsewhere")
    else:
        file.write_bytes(file.read_bytes())
    with pytest.raises(ReferenceUnavailableError, match=words):
        read_on(model, [2, 3] if prefetched else [5])
    if harm == "vanish":
        (folder / "elsewhere").rename(file)
        assert torch.equal(logits(model), logits(load_model(folder)))
    close(model)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("truncated", r"not a whole safetensors file: .* takes \d+ bytes, of which the file has"),
        ("no header", "its header says"),
        ("garbage", "its header cannot be read"),
        ("missing shard", "lacks model-0000.*, which model.safetensors.index.json names"),
    ],
)
def test_broken_files_are_refused_at_opening(harm: str, words: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "base", max_shard_size="20KB" if harm == "missing shard" else None)
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    if harm == "truncated":
        file.write_bytes(content[:-100])
    elif harm == "no header":
        file.write_bytes(b"\xff" * 64)
    elif harm == "garbage":
        file.write_bytes(content[:8] + b"?" * (len(content) - 8))
    else:
        file.unlink()
    policy = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ReferenceUnavailableError, match=words):
        resolve_reference(policy, folder).model()
