"""Decoder layers are found by watching a forward; what has none that pass a stream along is refused, with advice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from align_audit.errors import AnatomyError
from align_audit.models.anatomy import Anatomy, describe, find_anatomy, unwrap
from align_audit.models.verify import open_replay
from tests.helpers.tiny import tiny_model
from tests.helpers.toys import Block, Toy, batch

pytestmark = pytest.mark.device

BERT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def lora(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize(
    "wrap",
    [
        lora,
        nn.DataParallel,
        lambda model: nn.DataParallel(lora(model)),
        lambda model: torch.compile(model, backend="eager"),
        lambda model: lora(torch.compile(model, backend="eager")._orig_mod),
    ],
    ids=["peft", "data parallel", "data parallel around peft", "compiled", "peft around what was compiled"],
)
def test_wrapped_models_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    wrapped = wrap(model)
    assert wrapped is not model
    assert unwrap(wrapped) is model
    assert open_replay(wrapped).anatomy == Anatomy("model.layers", 0, None, 4, 32, 61)


def test_an_unwrapped_model_is_itself() -> None:
    model = tiny_model("gpt2")
    assert unwrap(model) is model


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(kind: Any) -> None:
    model = get_peft_model(tiny_model("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(AnatomyError, match="prompt learning") as caught:
        open_replay(model)
    assert model.peft_config["default"].peft_type in str(caught.value)
    assert "LoRA" in str(caught.value)


# -- not a causal language model ---------------------------------------------------------------------------------------


def test_encoder_decoders_are_refused_before_they_run() -> None:
    config = AutoConfig.for_model("t5", vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.forward = lambda *args, **kwargs: pytest.fail("it ran")
    with pytest.raises(AnatomyError, match="T5ForConditionalGeneration is an encoder-decoder"):
        open_replay(model)


@pytest.mark.parametrize(
    ("auto", "words"),
    [
        (AutoModelForMaskedLM, "BertForMaskedLM is not a causal language model"),
        (AutoModelForCausalLM, "BertLMHeadModel is not a causal language model"),
        (AutoModel, "BertModel returned no next-token logits"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bert_is_refused(auto: Any, words: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model("bert", **BERT)).to(dtype).eval()
    with pytest.raises(AnatomyError, match=words):
        open_replay(model)


def test_bert_as_a_decoder_is_a_causal_language_model() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **BERT)).double().eval()
    assert open_replay(model).anatomy.layers == "bert.encoder.layer"


def test_other_modules_are_refused() -> None:
    with pytest.raises(AnatomyError, match=r"Linear is not a transformers model.*AutoModelForCausalLM"):
        open_replay(nn.Linear(2, 2))


# -- found -------------------------------------------------------------------------------------------------------------


class Plain(Toy):
    """The stream by position, returned as it is."""


class ByKeyword(Toy):
    """The stream by keyword, beside another tensor of its shape that does not flow, and returned second of a tuple."""

    class block(Block):
        def forward(self, *, places: torch.Tensor, flow: torch.Tensor, mask: torch.Tensor) -> Any:
            return places, flow + self.update(flow + places, mask), mask

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.ones_like(stream).cumsum(1)
        for deck in self.decks:
            stream = deck(places=places, flow=stream, mask=mask)[1]
        return stream


class SecondArgument(Toy):
    """A constant of the stream's shape stands where a stream usually does."""

    class block(Block):
        def forward(self, places: torch.Tensor, stream: torch.Tensor, mask: torch.Tensor) -> Any:
            return [stream + self.update(stream + places, mask)]

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.ones_like(stream).cumsum(1)
        for deck in self.decks:
            (stream,) = deck(places, stream, mask)
        return stream


class WithNorms(Toy):
    """A longer list of modules runs beside the layers."""

    def build(self) -> None:
        self.all_norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(9))

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        stream = stream + sum(norm(stream) for norm in self.all_norms[4:])
        for norm, deck in zip(self.all_norms, self.decks, strict=False):
            norm(stream)
            stream = deck(stream, mask)
        return stream


@pytest.mark.parametrize(
    ("toy", "stream", "output"),
    [(Plain, 0, None), (ByKeyword, "flow", 1), (SecondArgument, 1, 0), (WithNorms, 0, None)],
)
def test_the_stream_is_found_where_it_flows(toy: type[Toy], stream: int | str, output: int | None) -> None:
    model = toy()
    replay = open_replay(model)
    assert replay.anatomy == Anatomy("decks", stream, output, 4, 8, 23)
    recording = replay.record(batch(), keep_logits=True)
    rows = batch()["attention_mask"].bool()
    torch.testing.assert_close(replay.head(recording.after(3)[rows]), recording.logits[rows], rtol=1e-12, atol=1e-12)


def test_take_and_put_agree() -> None:
    one, two = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for anatomy, args, kwargs in (
        (Anatomy("x", 1), (5, one), {"mask": None}),
        (Anatomy("x", "flow"), (5,), {"flow": one, "mask": None}),
    ):
        changed = anatomy.put(args, kwargs, two)
        assert anatomy.take(args, kwargs) is one
        assert anatomy.take(*changed) is two
        assert changed[0][0] == 5
        assert changed[1]["mask"] is None
    assert Anatomy("x").stream(Anatomy("x").wrap(one, two)) is two
    boxed = Anatomy("x", output_index=1)
    assert boxed.stream(boxed.wrap((7, one, None), two)) is two
    assert boxed.wrap((7, one, None), two)[::2] == (7, None)


# -- given by hand -----------------------------------------------------------------------------------------------------


def test_a_given_path_is_enough() -> None:
    model = tiny_model("gpt2")
    assert open_replay(model, Anatomy("transformer.h")).anatomy == Anatomy("transformer.h", 0, None, 3, 32, 61)
    assert open_replay(ByKeyword(), Anatomy("decks")).anatomy == Anatomy("decks", "flow", 1, 4, 8, 23)


def test_layers_in_another_container_can_be_given() -> None:
    class InSequential(Toy):
        def build(self) -> None:
            self.decks = nn.Sequential(*self.decks)

    model = InSequential()
    with pytest.raises(AnatomyError, match="looked at 0 module lists"):
        open_replay(model)
    assert open_replay(model, Anatomy("decks")).num_layers == 4


class Twins(Toy):
    """Two equal streams flow side by side; only the description says which is meant."""

    class block(Block):
        def forward(self, one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> Any:
            return one + self.update(one, mask), other

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        other = torch.zeros_like(stream)
        for deck in self.decks:
            stream, other = deck(stream, other, mask)
        return stream


def test_what_is_given_is_not_found_otherwise() -> None:
    inputs = batch()
    assert find_anatomy(Twins(), inputs, Anatomy("decks")).output_index == 0
    assert find_anatomy(Twins(), inputs, Anatomy("decks", 1, 1)) == Anatomy("decks", 1, 1, 4, 8, 23)
    assert open_replay(Twins(), Anatomy("decks", 0, 0)).anatomy == Anatomy("decks", 0, 0, 4, 8, 23)
    for wrong in (Anatomy("decks", 2), Anatomy("decks", 7), Anatomy("decks", "flow"), Anatomy("decks", 0, 5)):
        with pytest.raises(AnatomyError, match=r"looked at the ModuleList 'decks'"):
            open_replay(Twins(), wrong)


def test_a_wrong_path_shows_what_there_is() -> None:
    model = tiny_model("llama")
    with pytest.raises(AnatomyError, match=r"no submodule 'model\.blocks'") as caught:
        open_replay(model, Anatomy("model.blocks"))
    message = str(caught.value)
    assert describe(model) in message
    assert "    layers: ModuleList" in message
    assert "      0..3: LlamaDecoderLayer" in message
    assert "  lm_head: Linear" in message


def test_a_list_that_passes_no_stream_shows_what_there_is_and_what_to_do() -> None:
    class Alternating(Toy):
        """Two lists take turns, so that neither passes a stream along; each member runs twice."""

        def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                stream = super().run(stream, mask)
            return stream

    with pytest.raises(AnatomyError, match="could not establish the decoder layers of Alternating") as caught:
        open_replay(Alternating())
    message = str(caught.value)
    assert "looked at 1 module lists" in message
    assert "Module tree of Alternating:\n  tokens: Embedding\n  decks: ModuleList\n    0..3: Block" in message
    assert 'Anatomy(layers="path.to.module_list"' in message


def test_the_module_tree_folds_equal_neighbours_only() -> None:
    model = nn.Module()
    model.parts = nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.GELU(), nn.ReLU()])
    model.first, model.second = nn.Linear(1, 1), nn.Linear(1, 1)
    assert describe(model).splitlines()[1:] == [
        "  parts: ModuleList",
        "    0..1: ReLU",
        "    2: GELU",
        "    3: ReLU",
        "  first: Linear",
        "  second: Linear",
    ]


# -- inert -------------------------------------------------------------------------------------------------------------


def test_no_hook_stays_behind_even_when_the_model_breaks() -> None:
    class Breaks(Toy):
        def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            super().run(stream, mask)
            raise ZeroDivisionError

    model = Breaks()
    with pytest.raises(ZeroDivisionError):
        find_anatomy(model, batch())
    assert hooks(model) == 0
    find_anatomy(Plain(), batch())


def test_logits_of_another_shape_are_refused() -> None:
    class Scorer(Toy):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids, attention_mask).logits[:, -1])

    with pytest.raises(AnatomyError, match=r"Scorer returned no next-token logits of shape \[batch, tokens, vocab"):
        open_replay(Scorer())
