"""A reference streamed layer by layer computes what the loaded one computes, holds two layers, and leaves nothing."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.auditing.audit import audit
from align_audit.config import AuditConfig
from align_audit.errors import ReferenceUnavailableError
from align_audit.models.gradients import stream_gradients
from align_audit.models.guard import untouched
from align_audit.models.loading import load_model
from align_audit.models.reference import Reference, resolve_reference
from align_audit.models.replay import Stream
from align_audit.models.verify import open_replay
from align_audit.models.weights import from_disk as stored_layers
from align_audit.models.weights import streaming as layer_stream
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.models.weights.from_disk import open_streamed
from align_audit.models.weights.from_host import copied_by_layer, placed
from align_audit.models.weights.streaming import NotStreamable, close, stream_of
from tests.helpers.audits import audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")
IDS = torch.arange(3, 21).view(2, 9)
MASK = torch.ones_like(IDS)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    wait_for_threads()


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("align_audit-layer")]


def wait_for_threads() -> None:
    """A thread ends with the layer it reads; a moment after its model is gone none may be left."""
    for _ in range(200):
        if not our_threads():
            return
        time.sleep(0.01)
    raise AssertionError(our_threads())


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    shards = options.pop("max_shard_size", None)
    model: Any = tiny_model(family, dtype=torch.float32, **options).to(dtype)
    model.save_pretrained(folder, **({} if shards is None else {"max_shard_size": shards}))
    return folder


def both(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    return load_model(folder, dtype=dtype), open_streamed(folder, dtype=dtype, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits  # type: ignore[no-any-return]


def held_layers(model: nn.Module) -> set[int]:
    """The layers of which any parameter is in memory, in the module itself."""
    _, layers = layer_stream.find_layers(model)
    return {i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())}


# -- the same numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["as saved", "shards", "bfloat16 in float32", "float32 in bfloat16"])
def test_logits_and_streams_are_bit_identical(family: str, kind: str, tmp_path: Path) -> None:
    stored = torch.bfloat16 if kind == "bfloat16 in float32" else torch.float32
    wanted = torch.bfloat16 if kind == "float32 in bfloat16" else torch.float32
    folder = save(tmp_path, family, stored, max_shard_size="20KB" if kind == "shards" else None)
    assert (len(list(folder.glob("*.safetensors"))) > 3) is (kind == "shards")
    whole, streamed = both(folder, wanted)
    assert not any(parameter.is_meta for parameter in whole.parameters())
    assert any(parameter.is_meta for parameter in streamed.parameters())
    assert torch.equal(logits(streamed), logits(whole))
    one, other = open_replay(whole), open_replay(streamed)
    assert one.anatomy == other.anatomy
    assert one.compute_dtype == other.compute_dtype == wanted
    ours, theirs = one.record(INPUTS, keep_logits=True), other.record(INPUTS, keep_logits=True)
    assert len(ours.streams) == one.num_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(ours.streams, theirs.streams, strict=True))
    assert not torch.equal(ours.streams[0], ours.streams[-1])
    assert dict(streamed.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    for name, buffer in streamed.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    close(streamed)


def test_weights_are_really_taken_from_the_files(tmp_path: Path) -> None:
    """The comparison above could fail: other files, other logits."""
    one = open_streamed(save(tmp_path / "one"), dtype=torch.float32)
    other = open_streamed(save(tmp_path / "other", seed=1), dtype=torch.float32)
    assert not torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family, tie_word_embeddings=True)
    whole, streamed = both(folder)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert torch.equal(logits(streamed), logits(whole))


def test_walks_heads_and_gradients_are_equal(tmp_path: Path) -> None:
    whole, streamed = both(save(tmp_path))
    results = []
    for model in (whole, streamed):
        replay = open_replay(model)
        recording = replay.record(INPUTS)
        starts = (-1, 0, 0, 2)
        moved = [
            Stream(i, start, lambda start=start, recording=recording: recording.after(start) * 1.5)
            for i, start in enumerate(starts)
        ]
        walked = dict(replay.walk(recording, moved, max_streams=2))
        assert len(walked) == len(starts)
        rows = recording.after(replay.num_layers - 1)[0]
        gradients = dict(
            stream_gradients(replay, recording, lambda top, replay=replay: [replay.head(top[:, -1]).square().sum()])
        )
        results.append([replay.head(rows), *walked.values(), *(gradients[i][0] for i in range(replay.num_layers))])
    assert len(results[0]) == 1 + 4 + 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(float(value.detach().abs().max()) > 0 for value in results[0])


def test_a_backward_after_other_layers_came_in_uses_the_old_weights(tmp_path: Path) -> None:
    """One graph over all layers: when it is walked back, the lower layers have long been let go of."""
    gradients = []
    for model in both(save(tmp_path)):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        out = model(inputs_embeds=embedded, attention_mask=MASK, use_cache=False).logits
        logits(model)
        gradients.append(torch.autograd.grad(out.square().sum(), embedded)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_an_audit_is_the_same_number_for_number(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    policy = perturbed(load_model(folder, dtype=torch.float32))
    policy.config.name_or_path = ""
    settings = AuditConfig.from_dict(
        {"batch_tokens": 120, "low_rank": {"ranks": [1, 4], "layers": [1]}, "statistics": {"bootstrap_resamples": 100}}
    )
    found = []
    for stream in (True, False):
        reference = resolve_reference(policy, folder, stream=stream)
        found.append(audited(policy, reference, random_pairs(5), settings))
    (streamed, arrays), (whole, others) = found
    assert streamed.reference_check.source == "streamed from base"
    assert whole.reference_check.source == "loaded from base"
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        assert values.tobytes() == others[name].tobytes(), name
    assert abs(arrays["per_pair.effect"]).max() > 0

    def numbers(record: Any) -> dict[str, Any]:
        told: dict[str, Any] = record.model_dump()
        del told["cost"]["seconds"], told["cost"]["peak_memory"], told["provenance"]["created"]
        del told["reference_check"]["source"]
        return told

    assert json.dumps(numbers(streamed), default=str) == json.dumps(numbers(whole), default=str)
    assert audit(policy, folder, random_pairs(5), settings).reference_check.source == "streamed from base"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_fingerprint_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", family, torch.bfloat16)
    whole, streamed = both(folder)
    expected = fingerprint(whole)
    assert fingerprint(streamed) == expected
    logits(streamed)
    assert fingerprint(streamed) == expected
    assert torch.equal(logits(streamed), logits(whole))
    assert fingerprint(streamed) == Reference("", model=streamed).fingerprint()
    moved = perturbed(whole, scale=1e-4)
    assert fingerprint(moved) != expected


# -- how much is held -----------------------------------------------------------------------------------------------------


def test_at_most_two_layers_are_held_and_many_calls_load_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the module itself, and by the blocks of memory that are alive."""
    alive, most = 0, 0

    class Block(np.ndarray[Any, Any]):
        """Memory that tells when the last tensor in it is gone."""

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def block(size: int, pinned: bool) -> torch.Tensor:
        nonlocal alive, most
        memory = np.zeros(size, dtype=np.uint8).view(Block)
        weakref.finalize(memory, gone)
        alive += 1
        most = max(most, alive)
        return torch.from_numpy(memory)

    monkeypatch.setattr(layer_stream, "_block", block)
    model = open_streamed(save(tmp_path, num_hidden_layers=6), dtype=torch.float32)
    stream = stream_of(model)
    assert stream is not None
    seen: set[int] = set()

    def look(module: nn.Module, args: Any) -> None:
        index = list(model.model.layers).index(module)  # type: ignore[union-attr]
        assert held_layers(model) == {index} or not seen
        assert len(stream.held) <= 2
        seen.add(index)

    # Inside the layer, after its weights came in.
    handles = [
        layer.mlp.register_forward_pre_hook(lambda m, a, layer=layer: look(layer, a)) for layer in model.model.layers
    ]  # type: ignore[union-attr]
    replay = open_replay(model)
    assert seen == set(range(6))
    recording = replay.record(INPUTS)
    before = stream.loads
    for _ in range(3):
        for index in range(6):
            for _ in range(20):
                replay.layer(index, recording.after(index - 1), recording)
    # 6 layers a pass, each once although called 20 times; one more may have been sent for at either end.
    assert 3 * 6 - 1 <= stream.loads - before <= 3 * 6 + 1
    for handle in handles:
        handle.remove()
    with untouched(model):  # keeps what it restores, but no weights
        logits(model)
    assert most == 2
    close(model)
    assert held_layers(model) == set()
    gc.collect()
    assert (most, alive) == (2, 0)
    # Jumps stop reads in the middle; what they had read goes at once, not when garbage is collected.
    real = stored_layers._Entry.read

    def slow(self: Any, out: torch.Tensor, stopped: Any = lambda: False) -> None:
        time.sleep(0.002)
        real(self, out, stopped)

    monkeypatch.setattr(stored_layers._Entry, "read", slow)
    slowed = open_streamed(tmp_path, dtype=torch.float32)
    gc.disable()
    try:
        for index in (0, 3, 1, 5, 2, 0):
            stream_of(slowed).need(index)  # type: ignore[union-attr]
        close(slowed)
        assert (most, alive) == (2, 0)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("order", "loads"),
    [
        (range(6), 7),  # up: one more is on its way at the end
        ([0, 1, 2, 3, 4, 5] * 4, 25),  # round and round: nothing is read in vain
        ([5, 4, 3, 2, 1, 0], 8),  # down: the first step is not foreseen
        ([0, 1, 2, 3, 4, 5, *[3, 4, 5] * 4], 6 + 1 + 12 + 1),  # from the middle: foreseen from the second time on
    ],
)
def test_the_next_layer_is_foreseen(order: Any, loads: int, tmp_path: Path) -> None:
    model = open_streamed(save(tmp_path, num_hidden_layers=6), dtype=torch.float32)
    close(model)
    layers = list(model.model.layers)  # type: ignore[union-attr]
    weights = [
        [layer_stream.Weight(layer.mlp.up_proj, "weight", layer.mlp.up_proj.weight, lambda out, stopped: None)]
        for layer in layers
    ]
    stream = layer_stream.LayerStream(layers, weights, layer_stream.stay)
    for index in order:
        stream.need(index)
        assert held_layers(model) == {index}
    assert stream.loads == loads
    stream.close()


def test_stubbed_layers_bring_nothing_in(tmp_path: Path) -> None:
    model = open_streamed(save(tmp_path), dtype=torch.float32)
    replay = open_replay(model)
    rows = replay.record(INPUTS).after(3)[0]
    stream = stream_of(model)
    assert stream is not None
    stream.rest()
    loads = stream.loads
    replay.head(rows)
    assert (stream.loads, held_layers(model), stream.held) == (loads, set(), set())
    replay.record(INPUTS, until=0, calls_above=True)
    stream.rest()
    assert stream.loads <= loads + 2, "layer 0, and the one that is fetched ahead of it"
    loads = stream.loads
    replay.record(INPUTS)
    assert stream.loads > loads, "after the stubs the layers stream again"


def test_the_guard_leaves_a_streamed_model_as_it_was(tmp_path: Path) -> None:
    whole, model = both(save(tmp_path))
    flags = {name: parameter.requires_grad for name, parameter in whole.named_parameters()}
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    assert (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    with untouched(model):
        logits(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not model.training


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
    with pytest.raises(NotStreamable, match=r"model\.layers\.2\.mlp\.up_proj\.weight is not in its files"):
        open_streamed(folder, dtype=torch.float32)


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


# -- files that fail ------------------------------------------------------------------------------------------------------


def layer(model: Any, index: int) -> torch.Tensor:
    stream_of(model).need(index)  # type: ignore[union-attr]
    return torch.cat([parameter.detach().flatten() for parameter in model.model.layers[index].parameters()])


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


# -- nothing is left ------------------------------------------------------------------------------------------------------


def test_release_leaves_no_thread_no_wrapper_and_no_model(tmp_path: Path) -> None:
    folder = save(tmp_path)
    reference = resolve_reference(tiny_model("llama", dtype=torch.float32), folder)
    model: Any = reference.model()
    kept = weakref.ref(model)
    layers = list(model.model.layers)
    logits(model)
    assert held_layers(model)
    assert all("forward" in vars(layer) for layer in layers)
    reference.release()
    assert our_threads() == []
    assert held_layers(model) == set()
    assert not any("forward" in vars(layer) for layer in layers)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert stream_of(model) is None
    del model, layers
    gc.collect()
    assert kept() is None
    assert torch.equal(logits(reference.model()), logits(load_model(folder))), "and it opens again"
    reference.release()


def test_a_model_that_is_dropped_takes_its_thread_along(tmp_path: Path) -> None:
    model: Any = open_streamed(save(tmp_path), dtype=torch.float32)
    logits(model)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
    wait_for_threads()


# -- from the CPU to a device -----------------------------------------------------------------------------------------------


def counting(copies: list[int]) -> Any:
    def copy(host: torch.Tensor) -> Any:
        copies.append(host.numel())
        return host.clone(), lambda: None

    return copy


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_copied_by_layer_computes_the_same_and_gives_back_the_same_objects(family: str, breaks: bool) -> None:
    model: Any = tiny_model(family, dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)

    def state() -> dict[str, Any]:
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {name: (id(t), t.data_ptr(), t._version, t.requires_grad, t.device) for name, t in tensors}

    before, expected, hash_before = state(), logits(model), fingerprint(model)
    copies: list[int] = []
    try:
        with copied_by_layer(model, torch.device("cpu"), copy=counting(copies)) as stream:
            assert torch.equal(logits(model), expected)
            assert stream.loads >= len(stream._recipes)
            assert state() != before
            assert fingerprint(model) == hash_before
            assert stream_of(model) is stream
            if breaks:
                raise KeyError("in the middle")
    except KeyError:
        assert breaks
    assert state() == before
    assert torch.equal(logits(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert stream_of(model) is None
    assert len(copies) >= len(stream._recipes)


def test_a_forward_that_was_there_before_is_kept() -> None:
    """Whoever wrapped a layer before us (accelerate's hooks do) is called, and found again afterwards."""
    model: Any = tiny_model("llama", dtype=torch.float32)
    first, calls = model.model.layers[0], []
    real = first.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    first.forward = own
    with copied_by_layer(model, torch.device("cpu")):
        logits(model)
    assert calls == [1]
    assert vars(first)["forward"] is own


def test_placed_copies_by_layer_to_another_device() -> None:
    """'meta' stands for a device: what is outside the layers is there inside, and the same objects are back after."""
    model: Any = tiny_model("llama", dtype=torch.float32)
    before = dict(model.named_parameters())
    with placed(model, torch.device("meta")):
        assert model.model.embed_tokens.weight.is_meta
        assert model.lm_head.weight.is_meta
        for index in (0, 1, 3):
            layer(model, index)
            assert [i for i, one in enumerate(model.model.layers) if one.mlp.up_proj.weight.is_meta] == [index]
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_placed_where_it_is_does_nothing() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with placed(model, torch.device("cpu")):
        assert stream_of(model) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_both_ways_give_the_loaded_models_streams(tmp_path: Path) -> None:
    folder = save(tmp_path)
    cuda = torch.device("cuda", torch.cuda.current_device())
    whole: Any = load_model(folder, dtype=torch.float32, device=cuda)
    streamed: Any = open_streamed(folder, dtype=torch.float32, device=cuda)
    resting: Any = load_model(folder, dtype=torch.float32)

    def on_device(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=IDS.to(cuda), use_cache=False).logits  # type: ignore[no-any-return]

    for _ in range(3):
        assert torch.equal(on_device(streamed), on_device(whole))
        with placed(resting, cuda):
            assert torch.equal(on_device(resting), on_device(whole))
        assert next(resting.parameters()).device.type == "cpu"
    assert fingerprint(streamed) == fingerprint(whole) == fingerprint(resting)
    close(streamed)
