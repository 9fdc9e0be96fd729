"""Recording and replay: what is left behind, the wavefront, the head, and layers that write into their input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from align_audit.errors import AnatomyError
from align_audit.models.gradients import stream_gradients
from align_audit.models.replay import Recording, Stream, equal_streams
from align_audit.models.verify import open_replay
from tests.helpers.states import left_on
from tests.helpers.tiny import VOCABULARY, perturbed, tiny_model
from tests.helpers.toys import Block, Toy, batch

pytestmark = pytest.mark.device

# -- what is left behind -----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model = tiny_model("llama")
    model.model.layers[1].forward = model.model.layers[1].forward  # somebody's own patch
    before = left_on(model)
    replay = open_replay(model)
    recording = replay.record(batch(VOCABULARY))
    with torch.no_grad():
        replay.head(recording.streams[-1][0])
        list(replay.walk(recording, [Stream(0, 0, lambda: recording.after(0))], 1))
    assert left_on(model) == before
    assert "forward" in vars(model.model.layers[1])
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("where", ["inside a layer", "after the layers", "inside the head"])
def test_nothing_is_left_behind_when_the_model_breaks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    replay = open_replay(model)
    recording = replay.record(batch(VOCABULARY))
    before = left_on(model)

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
        open_replay(model)
    monkeypatch.undo()
    vars(part[where]).pop("forward", None)  # monkeypatch puts the bound method back as the instance's own
    assert left_on(model) == before
    assert torch.equal(replay.record(batch(VOCABULARY)).streams[-1], recording.streams[-1])


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
    replay = open_replay(model)
    inputs = batch(VOCABULARY)
    recording, source = replay.record(inputs), open_replay(perturbed(model)).record(inputs)
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
    replay = open_replay(tiny_model("llama"))
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
    replay = open_replay(tiny_model("llama"))
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
    replay = open_replay(tiny_model("llama"))
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
    replay = open_replay(tiny_model("llama"))
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
    replay = open_replay(model)
    whole = replay.record(batch(VOCABULARY), keep_logits=True)
    assert whole.logits.shape == (3, 11, VOCABULARY)
    ran: list[str] = []
    for name in ("transformer.h.0", "transformer.h.1", "transformer.h.2", "transformer.ln_f", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    before = left_on(model)
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
    assert left_on(model) == before


def test_calls_above_a_layer_are_recorded_and_do_not_compute() -> None:
    model = tiny_model("llama")
    replay = open_replay(model)
    ran: list[int] = []
    for index, layer in enumerate(replay.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    before, work = left_on(model), replay.layer_tokens
    inputs = batch(VOCABULARY)
    recording = replay.record(inputs, until=1, calls_above=True)
    assert ran == [0, 1]
    assert replay.layer_tokens - work == 2 * inputs["input_ids"].numel()
    assert (len(recording.streams), len(recording.calls)) == (3, replay.num_layers)
    assert left_on(model) == before
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
    replay = open_replay(toy())
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
        open_replay(tiny_model("llama")).record(batch(VOCABULARY), keep_logits=True, until=1, calls_above=True)


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
    replay, plain = open_replay(model), open_replay(oracle)
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
    ours = dict(stream_gradients(replay, recording, lambda top: [replay.head(top[:, 2]).square().sum()]))
    theirs = dict(stream_gradients(plain, expected, lambda top: [plain.head(top[:, 2]).square().sum()]))
    for layer in range(4):
        torch.testing.assert_close(ours[layer][0], theirs[layer][0], rtol=1e-12, atol=1e-12)


def test_writing_in_place_that_begins_later_is_noticed() -> None:
    class Sometimes(Toy):
        class block(Block):
            def forward(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                update = self.update(stream, mask)
                return stream.add_(update) if stream.shape[1] > 9 else stream + update

    model, oracle = Sometimes(), Toy()
    recording = open_replay(model).record(batch())
    expected = open_replay(oracle).record(batch())
    assert equal_streams(recording.streams, expected.streams, batch()["attention_mask"].bool())


def test_layers_that_do_not_run_every_time_are_refused() -> None:
    class Skips(Toy):
        """Leaves its last layer out for long inputs."""

        def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for deck in list(self.decks)[: 3 if stream.shape[1] > 9 else 4]:
                stream = deck(stream, mask)
            return stream

    replay = open_replay(Skips())
    with pytest.raises(AnatomyError, match=r"each of the 4 layers in 'decks' to run once .*; 3 calls were seen"):
        replay.record(batch())


def test_the_device_is_that_of_an_embedding_whose_weight_is_made_anew() -> None:
    """As under PEFT's trainable tokens, which put the trained rows in whenever the weight is asked for."""

    class Made(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        @property
        def weight(self) -> torch.Tensor:
            raise AssertionError("made for nothing")

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)

    model: Any = tiny_model("llama")
    replay = open_replay(model)
    expected = replay.device
    model.set_input_embeddings(Made(model.get_input_embeddings()))
    assert replay.device == expected
