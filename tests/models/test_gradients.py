"""Gradients by streams equal plain autograd's, and nothing is left behind by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align_audit.models.gradients import stream_gradients
from align_audit.models.verify import open_replay
from tests.helpers.states import left_on
from tests.helpers.tiny import VOCABULARY, tiny_model
from tests.helpers.toys import batch

pytestmark = pytest.mark.device


@pytest.mark.parametrize("adapters", [False, True])
def test_stream_gradients_equal_plain_autograd(adapters: bool) -> None:
    model: Any = tiny_model("gpt2")
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).double().eval()
    core = model.get_base_model() if adapters else model
    inputs = batch(VOCABULARY)
    valid = inputs["attention_mask"].bool()
    target = inputs["input_ids"].roll(-1, 1)[valid]

    # Plainly: one forward with a graph, and the streams kept by hooks.
    kept: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in core.transformer.h
    ]
    logits = model(**inputs).logits[valid]
    for handle in handles:
        handle.remove()
    expected = torch.autograd.grad(torch.log_softmax(logits, -1).gather(-1, target[:, None]).sum(), kept)

    replay = open_replay(model)
    recording = replay.record(inputs)
    marked = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    marked.grad = torch.full_like(marked, 0.5)
    before = left_on(model)

    def objective(top: torch.Tensor) -> list[torch.Tensor]:
        logp = torch.log_softmax(replay.head(top[valid]), -1).gather(-1, target[:, None])
        return [logp.sum(), -2 * logp[:5].sum(), 2 * logp[:5].sum()]

    layers = []
    with torch.no_grad():
        for layer, (gradient, one, other) in stream_gradients(replay, recording, objective):
            assert not torch.is_grad_enabled(), "the generator leaked its grad mode"
            assert torch.equal(one, -other)
            assert not torch.allclose(one, gradient)
            scale = float(expected[layer].abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(gradient, expected[layer], rtol=1e-9, atol=1e-9 * scale)
            layers.append(layer)
    assert layers == [2, 1, 0]
    assert torch.is_grad_enabled()
    assert left_on(model) == before
    assert torch.equal(marked.grad, torch.full_like(marked, 0.5))
    assert not any(stream.requires_grad for stream in recording.streams)


def test_gradients_that_are_not_asked_for_are_not_computed() -> None:
    replay = open_replay(tiny_model("gpt2"))
    recording = replay.record(batch(VOCABULARY))
    work = replay.layer_tokens
    found = stream_gradients(replay, recording, lambda top: [top.square().sum()])
    layer, (gradient,) = next(found)
    assert layer == 2
    assert torch.equal(gradient, 2 * recording.after(2))
    assert replay.layer_tokens == work
    found.close()
    assert torch.is_grad_enabled()
