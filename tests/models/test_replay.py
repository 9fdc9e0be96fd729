"""Recording and replay: the trainer's numerics, what is left behind, gradients, the wavefront, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from align_audit.errors import AnatomyError
from align_audit.models.guard import untouched
from align_audit.models.replay import Recording, Replay, Stream, equal_streams
from tests.helpers.tiny import DEVICE, VOCABULARY, perturbed, tiny_model
from tests.helpers.toys import Block, Toy, batch

pytestmark = pytest.mark.device


def state(model: nn.Module) -> list[Any]:
    """Everything an observation might leave behind on a model."""
    modules = [
        (
            name,
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            vars(module).get("forward"),
        )
        for name, module in model.named_modules()
    ]
    return [
        *modules,
        *((name, value.requires_grad, value.grad is None, value._version) for name, value in model.named_parameters()),
    ]


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
    plain = Replay(model)
    assert plain.compute_dtype == torch.float32
    model = accelerator.prepare_model(model, evaluation_mode=True)
    before = state(model)
    replay = Replay(model)
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
    assert state(model) == before


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
        Replay(model)
    assert Replay(accelerator.prepare_model(model, evaluation_mode=True)).compute_dtype == torch.bfloat16


def test_an_autocast_that_is_passed_is_used() -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    inputs = batch(VOCABULARY)
    replay = Replay(model, autocast=lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16))
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
    bare = Replay(model).record(inputs, keep_logits=True)
    add_fused_lm_head(model)
    patched_forward = model.forward
    replay = Replay(model)
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


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model = tiny_model("llama")
    model.model.layers[1].forward = model.model.layers[1].forward  # somebody's own patch
    before = state(model)
    replay = Replay(model)
    recording = replay.record(batch(VOCABULARY))
    with torch.no_grad():
        replay.head(recording.streams[-1][0])
        list(replay.walk(recording, [Stream(0, 0, lambda: recording.after(0))], 1))
    assert state(model) == before
    assert "forward" in vars(model.model.layers[1])
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("where", ["inside a layer", "after the layers", "inside the head"])
def test_nothing_is_left_behind_when_the_model_breaks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    replay = Replay(model)
    recording = replay.record(batch(VOCABULARY))
    before = state(model)

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    part = {
        "inside a layer": model.model.layers[2].mlp,
        "after the layers": model.model.norm,
        "inside the head": model.lm_head,
    }
    monkeypatch.setattr(part[where], "forward", breaks)
    with pytest.raises(ZeroDivisionError):
        replay.record(batch(VOCABULARY), keep_logits=True)
    if where == "inside a layer":
        with pytest.raises(ZeroDivisionError):
            replay.layer(2, recording.after(1), recording)
    else:
        with pytest.raises(ZeroDivisionError):
            replay.head(recording.streams[-1][0])
    with pytest.raises(ZeroDivisionError):
        Replay(model)
    monkeypatch.undo()
    vars(part[where]).pop("forward", None)  # monkeypatch puts the bound method back as the instance's own
    assert state(model) == before
    assert torch.equal(replay.record(batch(VOCABULARY)).streams[-1], recording.streams[-1])


def test_dropout_is_refused_in_training_mode_and_replayed_under_the_guard() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train()
    with pytest.raises(AnatomyError, match=r"layer \d, called again .* Dropout"):
        Replay(model)
    with untouched(model):
        replay = Replay(model)
        recording = replay.record(batch(VOCABULARY))
        assert all(torch.equal(top, recording.streams[-1]) for top in tops(replay, recording))
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(Replay(model).record(batch(VOCABULARY)).streams[-1], recording.streams[-1])


# -- gradients ---------------------------------------------------------------------------------------------------------


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

    replay = Replay(model)
    recording = replay.record(inputs)
    marked = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    marked.grad = torch.full_like(marked, 0.5)
    before = state(model)

    def objective(top: torch.Tensor) -> list[torch.Tensor]:
        logp = torch.log_softmax(replay.head(top[valid]), -1).gather(-1, target[:, None])
        return [logp.sum(), -2 * logp[:5].sum(), 2 * logp[:5].sum()]

    layers = []
    with torch.no_grad():
        for layer, (gradient, one, other) in replay.stream_gradients(recording, objective):
            assert not torch.is_grad_enabled(), "the generator leaked its grad mode"
            assert torch.equal(one, -other)
            assert not torch.allclose(one, gradient)
            scale = float(expected[layer].abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(gradient, expected[layer], rtol=1e-9, atol=1e-9 * scale)
            layers.append(layer)
    assert layers == [2, 1, 0]
    assert torch.is_grad_enabled()
    assert state(model) == before
    assert torch.equal(marked.grad, torch.full_like(marked, 0.5))
    assert not any(stream.requires_grad for stream in recording.streams)


def test_gradients_that_are_not_asked_for_are_not_computed() -> None:
    replay = Replay(tiny_model("gpt2"))
    recording = replay.record(batch(VOCABULARY))
    work = replay.layer_tokens
    found = replay.stream_gradients(recording, lambda top: [top.square().sum()])
    layer, (gradient,) = next(found)
    assert layer == 2
    assert torch.equal(gradient, 2 * recording.after(2))
    assert replay.layer_tokens == work
    found.close()
    assert torch.is_grad_enabled()


# -- the wavefront -----------------------------------------------------------------------------------------------------


def streams_from(source: Recording, depth: int) -> list[Stream]:
    return [
        Stream((copy, layer), layer, lambda layer=layer, copy=copy: source.after(layer) * (1 + copy))
        for layer in range(depth - 1, -2, -1)
        for copy in range(2)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_group_size_changes_no_bit(family: str) -> None:
    model = tiny_model(family)
    replay = Replay(model)
    inputs = batch(VOCABULARY)
    recording, source = replay.record(inputs), Replay(perturbed(model)).record(inputs)
    depth = replay.num_layers
    with torch.no_grad():
        found = [dict(replay.walk(recording, iter(streams_from(source, depth)), size)) for size in (1, 3, 100)]
        for stream in streams_from(source, depth):
            expected = stream.make()
            for layer in range(stream.start + 1, depth):
                expected = replay.layer(layer, expected, recording)
            for walked in found:
                assert torch.equal(walked[stream.key], expected), stream.key
    assert [len(walked) for walked in found] == [2 * depth + 2] * 3
    assert list(replay.walk(recording, [], 3)) == []


def test_a_walk_computes_nothing_below_where_streams_join_and_makes_them_only_then() -> None:
    replay = Replay(tiny_model("llama"))
    recording = replay.record(batch(VOCABULARY))
    tokens = recording.after(0).shape[:2].numel()
    assert replay.layer_tokens == 4 * tokens
    made: list[int] = []

    def make(layer: int) -> torch.Tensor:
        made.append(layer)
        return recording.after(layer) + 1.0

    streams = [Stream(layer, layer, lambda layer=layer: make(layer)) for layer in (3, 0, 2)]
    with torch.no_grad():
        walk = replay.walk(recording, streams, 2)
        assert made == []
        next(walk)
        assert made == [0, 2]  # the third waits for the next group
        list(walk)
    assert made == [0, 2, 3]
    assert replay.layer_tokens == (4 + 3 + 1) * tokens


def test_streams_that_equal_the_base_are_not_walked() -> None:
    replay = Replay(tiny_model("llama"))
    recording = replay.record(batch(VOCABULARY))
    work = replay.layer_tokens
    same = [Stream(layer, layer, lambda layer=layer: recording.after(layer).clone()) for layer in range(-1, 4)]

    def nudged() -> torch.Tensor:
        stream = recording.after(1).clone()
        stream[0, 0, 0] = torch.nextafter(stream[0, 0, 0], torch.tensor(torch.inf, dtype=stream.dtype))
        return stream

    with torch.no_grad():
        assert dict(replay.walk(recording, same, 2, same_as=recording)) == dict.fromkeys(range(-1, 4))
        assert replay.layer_tokens == work
        ((_, top),) = replay.walk(recording, [Stream("nudged", 1, nudged)], 2, same_as=recording)
        assert top is not None
        walked = dict(replay.walk(recording, same, 2))
    assert all(torch.equal(walked[layer], recording.after(3)) for layer in range(-1, 4))
    assert replay.layer_tokens > work


def test_equal_streams_looks_at_the_mask() -> None:
    replay = Replay(tiny_model("llama"))
    inputs = batch(VOCABULARY)
    valid = inputs["attention_mask"].bool()
    recording = replay.record(inputs)
    padding, token = recording.after(2).clone(), recording.after(2).clone()
    padding[1, -1] += 1.0
    token[1, 0] += 1.0
    for changed, same in ((padding, True), (token, False)):
        streams = [*recording.streams[:3], changed, *recording.streams[4:]]
        assert equal_streams(recording.streams, streams, valid) is same


# -- the head ----------------------------------------------------------------------------------------------------------


def test_head_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(tiny_model("llama"))
    assert list(replay.head_blocks(10)) == [slice(0, 10)]
    assert list(replay.head_blocks(0)) == []
    monkeypatch.setattr("align_audit.models.replay._HEAD_ROWS", 1)
    monkeypatch.setattr("align_audit.models.replay._HEAD_BYTES", {"cpu": 4 * VOCABULARY * 4})
    assert list(replay.head_blocks(10)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    rows = replay.record(batch(VOCABULARY)).after(3)[0]
    with torch.no_grad():
        whole = replay.head(rows)
        parts = torch.cat([replay.head(rows[block]) for block in replay.head_blocks(len(rows))])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("align_audit.models.replay._HEAD_BYTES", {"cpu": 1})
    assert len(list(replay.head_blocks(3))) == 3


def test_a_recording_ends_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and head run only for logits, and no layer above the last one that was asked for."""
    model = tiny_model("gpt2")
    replay = Replay(model)
    whole = replay.record(batch(VOCABULARY), keep_logits=True)
    assert whole.logits.shape == (3, 11, VOCABULARY)
    ran: list[str] = []
    for name in ("transformer.h.0", "transformer.h.1", "transformer.h.2", "transformer.ln_f", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    before = state(model)
    work = replay.layer_tokens
    recording = replay.record(batch(VOCABULARY))
    assert recording.logits is None
    assert ran == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert replay.layer_tokens == work + 3 * 33
    part = replay.record(batch(VOCABULARY), until=1)
    assert ran[3:] == ["transformer.h.0", "transformer.h.1"]
    for found, depth in ((recording, 4), (part, 3)):
        assert len(found.streams) == depth
        assert len(found.calls) == depth - 1
        assert all(torch.equal(*both) for both in zip(found.streams, whole.streams[:depth], strict=True))
    assert state(model) == before


def test_calls_above_a_layer_are_recorded_and_do_not_compute() -> None:
    model = tiny_model("llama")
    replay = Replay(model)
    ran: list[int] = []
    for index, layer in enumerate(replay.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    before, work = state(model), replay.layer_tokens
    inputs = batch(VOCABULARY)
    recording = replay.record(inputs, until=1, calls_above=True)
    assert ran == [0, 1]
    assert replay.layer_tokens - work == 2 * inputs["input_ids"].numel()
    assert (len(recording.streams), len(recording.calls)) == (3, replay.num_layers)
    assert state(model) == before
    whole = replay.record(inputs)
    stream = recording.after(1)
    for layer in range(2, replay.num_layers):
        stream = replay.layer(layer, stream, recording)
    assert torch.equal(stream, whole.after(replay.num_layers - 1))


class Biased(Toy):
    """The first layer makes of the mask what it and all layers above add, as T5's make their position biases."""

    class block(Block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None) -> Any:
            if bias is None:
                bias = 0.1 * mask.cumsum(1)[..., None].to(stream.dtype)
            return stream + self.update(stream, mask) + bias, bias

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = None
        for deck in self.decks:
            stream, bias = deck(stream, mask, bias)
        return stream


class Counting(Biased):
    """Each layer hands on another number than it was given."""

    class block(Biased.block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None) -> Any:
            stream, bias = super().forward(stream, mask, bias)
            return stream, bias + 1


@pytest.mark.parametrize(("toy", "computed"), [(Biased, 1), (Counting, 4)])
def test_what_layers_hand_on_beside_the_stream_is_recorded_above(toy: type[Toy], computed: int) -> None:
    """From the layer below where it stays what it was; where each layer changes it, all of them compute."""
    replay = Replay(toy())
    inputs = batch(23)
    whole, work = replay.record(inputs), replay.layer_tokens
    begun = replay.record(inputs, until=0, calls_above=True)
    assert replay.layer_tokens - work == computed * inputs["input_ids"].numel()
    assert (len(begun.streams), len(begun.calls)) == (computed + 1, 4)
    stream = begun.after(0)
    for layer in range(1, 4):
        stream = replay.layer(layer, stream, begun)
    assert torch.equal(stream, whole.after(3))


def test_logits_of_layers_that_do_not_run_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1"):
        Replay(tiny_model("llama")).record(batch(VOCABULARY), keep_logits=True, until=1, calls_above=True)


def test_a_model_that_has_overflowed_can_be_opened() -> None:
    """NaN is for the audit to report, not for the engine to misread as another kind of model."""
    for part, value in (("lm_head", torch.nan), ("lm_head", torch.inf), ("model.layers.1.mlp.up_proj", torch.nan)):
        model = tiny_model("llama")
        with torch.no_grad():
            model.get_submodule(part).weight[3] = value
        replay = Replay(model)
        recording = replay.record(batch(VOCABULARY), keep_logits=True)
        assert not torch.isfinite(recording.logits).all()
        assert (replay.anatomy.layers, replay.num_layers) == ("model.layers", 4)


# -- layers that write into their input --------------------------------------------------------------------------------


class InPlace(Toy):
    """Every layer adds its update to the very tensor it was given."""

    class block(Block):
        def forward(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return stream.add_(self.update(stream, mask))


class HalfInPlace(InPlace):
    """Only the upper half does."""

    def build(self) -> None:
        for index in range(2):
            self.decks[index] = Block()


@pytest.mark.parametrize("toy", [InPlace, HalfInPlace])
def test_layers_that_write_into_their_input(toy: type[Toy]) -> None:
    """The same weights without writing in place are the oracle."""
    model, oracle = toy(), Toy()
    oracle.load_state_dict(model.state_dict())
    inputs = batch()
    replay, plain = Replay(model), Replay(oracle)
    assert replay.anatomy == plain.anatomy
    recording, expected = replay.record(inputs, keep_logits=True), plain.record(inputs, keep_logits=True)
    assert equal_streams(recording.streams, expected.streams, inputs["attention_mask"].bool())
    assert len({stream.data_ptr() for stream in recording.streams}) == 5
    with torch.no_grad():
        for size in (1, 100):
            walked = dict(replay.walk(recording, streams_from(expected, 4), size))
            for key, top in plain.walk(expected, streams_from(expected, 4), 100):
                assert torch.equal(walked[key], top), key
        assert torch.equal(replay.head(recording.after(1)[0]), plain.head(expected.after(1)[0]))
    assert equal_streams(recording.streams, expected.streams, inputs["attention_mask"].bool()), "replay wrote into it"
    ours = dict(replay.stream_gradients(recording, lambda top: [replay.head(top[:, 2]).square().sum()]))
    theirs = dict(plain.stream_gradients(expected, lambda top: [plain.head(top[:, 2]).square().sum()]))
    for layer in range(4):
        torch.testing.assert_close(ours[layer][0], theirs[layer][0], rtol=1e-12, atol=1e-12)


def test_writing_in_place_that_begins_later_is_noticed() -> None:
    class Sometimes(Toy):
        class block(Block):
            def forward(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                update = self.update(stream, mask)
                return stream.add_(update) if stream.shape[1] > 9 else stream + update

    model, oracle = Sometimes(), Toy()
    recording = Replay(model).record(batch())
    expected = Replay(oracle).record(batch())
    assert equal_streams(recording.streams, expected.streams, batch()["attention_mask"].bool())


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
    Replay(Toy())  # the same without what is refused
    model = toy()
    hooked = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(AnatomyError, match=words) as caught:
        Replay(model)
    assert type(model).__name__ in str(caught.value)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooked
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_layers_that_do_not_run_every_time_are_refused() -> None:
    class Skips(Toy):
        """Leaves its last layer out for long inputs."""

        def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for deck in list(self.decks)[: 3 if stream.shape[1] > 9 else 4]:
                stream = deck(stream, mask)
            return stream

    replay = Replay(Skips())
    with pytest.raises(AnatomyError, match=r"each of the 4 layers in 'decks' to run once .*; 3 calls were seen"):
        replay.record(batch())


def test_work_is_counted_from_after_the_check() -> None:
    replay = Replay(tiny_model("llama"))
    assert replay.layer_tokens == 0
    with contextlib.suppress(StopIteration):
        replay.record(batch(VOCABULARY))
    assert replay.layer_tokens == 4 * 33
