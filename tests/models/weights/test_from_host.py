"""A reference on the CPU, copied to a device layer by layer, computes the same and gives its objects back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from align_audit.errors import ConfigurationError
from align_audit.models.loading import load_model
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.models.weights.from_disk import open_streamed
from align_audit.models.weights.from_host import _moved, copied_by_layer, placed, refuse_scattered
from align_audit.models.weights.streaming import close, stream_of
from tests.helpers.tiny import tiny_model
from tests.models.weights.saved import (
    IDS,
    _no_thread_is_left,  # noqa: F401
    layer,
    logits,
    save,
)

pytestmark = pytest.mark.device


# -- from the CPU to a device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [False, True])
def test_a_model_that_moves_whole_has_its_own_tensors_again(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there was no room for all of it."""
    model: Any = tiny_model("llama", dtype=torch.float32)
    model.register_buffer("beside", torch.ones(3))
    tensors = [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor.data_ptr()) for tensor in tensors]

    def moves(self: torch.nn.Module, device: torch.device) -> None:
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    parameter.data = parameter.data.clone()
                if breaks and name == "weight" and module is self.model.layers[1].mlp.up_proj:
                    raise torch.OutOfMemoryError("planted")
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    monkeypatch.setattr(type(model), "to", moves)
    with contextlib.suppress(torch.OutOfMemoryError), _moved(model, torch.device("cpu")):
        assert model.beside is not tensors[-1]
    after = [*model.parameters(), *model.buffers()]
    assert all(one is other and one.data_ptr() == place for one, (other, place) in zip(after, before, strict=True))


def test_a_model_on_several_accelerators_is_refused_and_one_that_is_partly_on_the_cpu_is_not() -> None:
    cpu, meta, *cuda = map(torch.device, ("cpu", "meta", "cuda:0", "cuda:1"))
    with pytest.raises(
        ConfigurationError, match=r"the reference are spread over cuda:0, cuda:1, as .*accelerate launch"
    ):
        refuse_scattered({cpu, *cuda}, "the reference")
    refuse_scattered({cpu, meta, cuda[0]}, "the reference")


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
