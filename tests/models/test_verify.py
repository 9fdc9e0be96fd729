"""Opening a model: the trainer's numerics are adopted, and what cannot be replayed is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from align_audit.errors import AnatomyError
from align_audit.models.guard import untouched
from align_audit.models.replay import Recording, Replay, equal_streams
from align_audit.models.verify import open_replay
from tests.helpers.states import left_on
from tests.helpers.tiny import DEVICE, VOCABULARY, tiny_model
from tests.helpers.toys import Block, Toy, batch

pytestmark = pytest.mark.device


def tops(replay: Replay, recording: Recording) -> list[torch.Tensor]:
    """h_{L−1} continued from every layer, by calling the layers one by one."""
    found = []
    with torch.no_grad():
        for start in range(-1, replay.num_layers):
            stream = recording.after(start)
            for layer in range(start + 1, replay.num_layers):
                stream = replay.layer(layer, stream, recording)
            found.append(stream)
    return found


# -- the trainer's numerics --------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield Accelerator(mixed_precision="bf16", cpu=DEVICE.type == "cpu")
    reset()


def test_mixed_precision_is_detected_and_replayed(accelerator: Accelerator) -> None:
    """accelerate wraps the model's own forward in autocast; layers called outside it would compute in float32."""
    model = tiny_model("llama", dtype=torch.float32)
    plain = open_replay(model)
    assert plain.compute_dtype == torch.float32
    model = accelerator.prepare_model(model, evaluation_mode=True)
    before = left_on(model)
    replay = open_replay(model)
    assert replay.compute_dtype == torch.bfloat16

    inputs = batch(VOCABULARY)
    recording = replay.record(inputs, keep_logits=True)
    with torch.no_grad():
        assert torch.equal(recording.logits, model(**inputs).logits)
        for top in tops(replay, recording):
            assert torch.equal(top, recording.streams[-1])
        valid = inputs["attention_mask"].bool()
        own, headed = recording.logits[valid], replay.head(recording.streams[-1][valid])
        torch.testing.assert_close(headed, own, rtol=2**-7, atol=2**-7 * float(own.abs().max()))
        outside = plain.layer(0, recording.after(-1), recording)
    assert not torch.equal(outside, recording.after(0))
    assert left_on(model) == before


def test_the_head_check_allows_for_the_rounding_of_the_dtype_that_computes(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    """Rows fed one by one may round otherwise than rows of a sequence; in bf16 that is far above float32's rounding."""
    real = Replay.head

    def rounded_otherwise(self: Replay, rows: torch.Tensor) -> torch.Tensor:
        return real(self, rows) * (1 + 2**-7)

    monkeypatch.setattr(Replay, "head", rounded_otherwise)
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(AnatomyError, match="its norm and head depend on more than that stream"):
        open_replay(model)
    assert open_replay(accelerator.prepare_model(model, evaluation_mode=True)).compute_dtype == torch.bfloat16


def test_an_autocast_that_is_passed_is_used() -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    inputs = batch(VOCABULARY)
    replay = open_replay(model, autocast=lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16))
    assert replay.compute_dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        logits = model(**inputs).logits
    recording = replay.record(inputs, keep_logits=True)
    assert torch.equal(recording.logits, logits)
    for top in tops(replay, recording):
        assert torch.equal(top, recording.streams[-1])
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        headed = replay.head(recording.streams[-1][valid])
    assert headed.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(headed, logits[valid], rtol=2**-7, atol=2**-7 * float(logits.abs().max()))
    assert not torch.is_autocast_enabled(DEVICE.type)


def test_the_fused_head_of_dpo_trainer_does_not_disturb() -> None:
    model = tiny_model("gemma2")
    inputs = batch(VOCABULARY)
    bare = open_replay(model).record(inputs, keep_logits=True)
    add_fused_lm_head(model)
    patched_forward = model.forward
    replay = open_replay(model)
    recording = replay.record(inputs, keep_logits=True)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(recording.logits, bare.logits)
    assert equal_streams(recording.streams, bare.streams, valid)
    with torch.no_grad():
        torch.testing.assert_close(replay.head(recording.streams[-1][valid]), bare.logits[valid], rtol=1e-6, atol=1e-6)
    assert model.forward == patched_forward
    labels = inputs["input_ids"].masked_fill(~valid, -100)
    fused = model(**inputs, labels=labels, fused_lm_head=True)
    expected = torch.log_softmax(bare.logits[:, :-1], -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    torch.testing.assert_close(fused.log_probs[valid[:, 1:]].double(), expected[valid[:, 1:]], rtol=1e-4, atol=1e-4)


# -- what cannot be replayed is refused, with the layer's number -------------------------------------------------------


class Rescaled(Toy):
    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for index, deck in enumerate(self.decks):
            stream = deck(stream, mask) / (2 if index == 1 else 1)
        return stream


class Noisy(Toy):
    class block(Block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return stream + self.update(stream, mask) + torch.rand(())


class HandedOn(Toy):
    """Layers above the first receive what the first computed from the stream, as RWKV-7's do."""

    class block(Block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor, first: torch.Tensor | None) -> Any:
            update = self.update(stream, mask)
            return stream + update + (0 if first is None else first), update if first is None else first

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first = None
        for deck in self.decks:
            stream, first = deck(stream, mask, first)
        return stream


class SharedState(Toy):
    """Layer 1 leaves in a shared dictionary what layer 3 reads, as layers that share keys and values do."""

    class block(Block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor, index: int, shared: dict[str, Any]) -> torch.Tensor:
            update = self.update(stream, mask)
            if index == 1:
                shared["keys"] = update
            return stream + (shared["keys"] if index == 3 else update)

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shared: dict[str, Any] = {}
        for index, deck in enumerate(self.decks):
            stream = deck(stream, mask, index, shared)
        return stream


class HiddenState(Toy):
    """The same, kept on the model instead of in the arguments."""

    class block(SharedState.block):
        pass

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.shared = getattr(self, "shared", {})
        for index, deck in enumerate(self.decks):
            stream = deck(stream, mask, index, self.shared)
        return stream


class WideHead(Toy):
    """The head reads an average over the sequence."""

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        top = super().run(stream, mask)
        return top.cumsum(1)


class LooksAhead(Toy):
    class block(Block):
        def update(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().update(stream.flip(1), mask.flip(1)).flip(1)


class Learns(Toy):
    """Each call of a layer moves the embedding."""

    def build(self) -> None:
        def learn(module: nn.Module, args: Any, output: Any) -> None:
            self.tokens.weight.data.mul_(1.01)

        self.decks[2].register_forward_hook(learn)


@pytest.mark.parametrize(
    ("toy", "words"),
    [
        (Rescaled, "between layer 1 and layer 2 the model changes the residual stream itself"),
        (Noisy, "layer 3, called again with the arguments it received, gave another output"),
        (HandedOn, r"layer 3, called again .* more from those below it than the residual stream"),
        (SharedState, r"layer 3, called again .* more from those below it than the residual stream"),
        (HiddenState, r"layer 3, called again .* hand something on beside the residual stream"),
        (WideHead, "its norm and head depend on more than that stream"),
        (LooksAhead, "is not a causal language model: changing the last token changed the stream before it"),
        (Learns, "replaying its layers changed what the model computes"),
    ],
)
def test_what_cannot_be_replayed_is_refused(toy: type[Toy], words: str) -> None:
    open_replay(Toy())  # the same without what is refused
    model = toy()
    hooked = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(AnatomyError, match=words) as caught:
        open_replay(model)
    assert type(model).__name__ in str(caught.value)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooked
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_refused_in_training_mode_and_replayed_under_the_guard() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train()
    with pytest.raises(AnatomyError, match=r"layer \d, called again .* Dropout"):
        open_replay(model)
    with untouched(model):
        replay = open_replay(model)
        recording = replay.record(batch(VOCABULARY))
        assert all(torch.equal(top, recording.streams[-1]) for top in tops(replay, recording))
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(open_replay(model).record(batch(VOCABULARY)).streams[-1], recording.streams[-1])


def test_a_model_that_has_overflowed_can_be_opened() -> None:
    """NaN is for the audit to report, not for the engine to misread as another kind of model."""
    for part, value in (("lm_head", torch.nan), ("lm_head", torch.inf), ("model.layers.1.mlp.up_proj", torch.nan)):
        model = tiny_model("llama")
        with torch.no_grad():
            model.get_submodule(part).weight[3] = value
        replay = open_replay(model)
        recording = replay.record(batch(VOCABULARY), keep_logits=True)
        assert not torch.isfinite(recording.logits).all()
        assert (replay.anatomy.layers, replay.num_layers) == ("model.layers", 4)


def test_work_is_counted_from_after_the_check() -> None:
    replay = open_replay(tiny_model("llama"))
    assert replay.layer_tokens == 0
    with contextlib.suppress(StopIteration):
        replay.record(batch(VOCABULARY))
    assert replay.layer_tokens == 4 * 33
