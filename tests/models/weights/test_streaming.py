"""A reference streamed layer by layer computes what the loaded one computes, holds two layers, and leaves nothing."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align_audit.auditing.audit import audit
from align_audit.config import AuditConfig
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
from align_audit.models.weights.streaming import close, stream_of
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model
from tests.models.weights.saved import (
    IDS,
    MASK,
    _no_thread_is_left,  # noqa: F401
    logits,
    our_threads,
    save,
    wait_for_threads,
)

pytestmark = pytest.mark.device


FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")


INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def both(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    return load_model(folder, dtype=dtype), open_streamed(folder, dtype=dtype, **options)


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
        {
            "batch_tokens": 120,
            "low_rank": {"ranks": [1, 4], "layers": [1]},
            "statistics": {"bootstrap_resamples": 100},
            "generations": QUICK_GENERATIONS,
        }
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
