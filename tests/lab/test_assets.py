"""The shipped model: small, clean, able, and what its script makes. And the script, run for a few steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs, stories
from align_audit.lab.pretrain import HELD_OUT_SEED, batches, build_model, held_out_loss, pretrain, train_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return stories(40, HELD_OUT_SEED)


def test_size() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in files}
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20


def test_nothing_of_the_machine_that_made_it() -> None:
    for path in MODEL_DIR.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for word in ("_name_or_path", "name_or_path", "://"):
            assert word not in text, f"{path.name} holds {word}"
        if path.name != "tokenizer.json":  # whose vocabulary may hold a lone slash
            assert not re.search(r'"(/|~|[A-Za-z]:\\)', text), f"{path.name} holds a path"
    weights = (MODEL_DIR / "model.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_model_and_tokenizer_agree(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    special = [tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 4
    assert None not in special
    for config in (model.config, model.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == special[1:]


def test_tokens_of_a_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    """As DPOTrainer tokenizes: prompt alone, then prompt + completion + EOS as text."""
    for pair in preference_pairs(200, seed=0):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            whole = tokenizer(pair["prompt"] + pair[side] + tokenizer.eos_token)["input_ids"]
            assert whole[: len(prompt)] == prompt, "a token spans the boundary"
            assert whole.count(tokenizer.bos_token_id) == 1
            assert whole[0] == tokenizer.bos_token_id
            assert whole.count(tokenizer.eos_token_id) == 1
            assert whole[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in whole
            assert 20 <= len(whole) - len(prompt) <= 90
            assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == pair[side]


def test_it_predicts_stories_it_has_not_seen(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: list[str]
) -> None:
    loss = held_out_loss(model, tokenizer, held_out)
    assert loss < 0.7, f"nats per token; chance is {math.log(len(tokenizer)):.1f}"


@torch.no_grad()
def test_it_looks_back(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The thing of the opening comes back where a sentence asks for one: without looking back it is one of twenty."""
    for thing in ("drum", "lamp", "flute", "whistle", "puppet", "map"):
        text = (
            f"One rainy day, Tom went to the pond. He met his cousin Anna on the way. He carried a red {thing} and two "
        )
        text += f'plums in his bag. "I like your red {thing}!" said Anna. Anna cleaned the'
        top = int(model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].argmax())
        assert tokenizer.decode([top]).strip() == thing


@torch.no_grad()
def test_every_layer_works(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: list[str]) -> None:
    """A layer that could be left out would hide mistakes of whoever patches it."""
    whole = held_out_loss(model, tokenizer, held_out)
    layers = model.model.layers
    try:
        for skipped in range(len(layers)):
            model.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(layers) if index != skipped)
            assert held_out_loss(model, tokenizer, held_out) > whole + 0.03, f"layer {skipped} does nothing"
    finally:
        model.model.layers = layers


@torch.no_grad()
def test_it_prefers_neither_side_yet(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = preference_pairs(48, seed=1)
    means = []
    for side in ("chosen", "rejected"):
        total = tokens = 0.0
        for pair in pairs:
            start = len(tokenizer(pair["prompt"])["input_ids"])
            ids = tokenizer(pair["prompt"] + pair[side] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            log_probs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            total += float(log_probs.gather(-1, ids[0, start:, None]).sum())
            tokens += ids.shape[1] - start
        means.append(total / tokens)
    assert abs(means[0] - means[1]) < 0.1, "nats per token"


def test_greedy_stories_end(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for pair in preference_pairs(4, seed=9):
        inputs = tokenizer(pair["prompt"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=120, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(tokens)
        assert text.endswith("." + tokenizer.eos_token), text
        assert len(set(tokens.tolist())) > 10, f"a loop: {text}"


def test_the_shipped_files_are_what_the_script_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer to the letter. The weights take minutes, so only what they were made from is compared."""
    again = train_tokenizer(stories(4000, 1))
    assert again.get_vocab() == tokenizer.get_vocab()
    untrained = build_model(again).config.to_diff_dict()
    shipped = AutoModelForCausalLM.from_pretrained(MODEL_DIR).config.to_diff_dict()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert untrained[name] == shipped[name]


def test_batches_ignore_padding_only(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["Tom ran.", "Tom ran to the pond with Anna."]
    ((ids, labels),) = batches(tokenizer, texts, size=2)
    assert ids.shape == labels.shape
    padding = ids == tokenizer.pad_token_id
    assert padding[0].any()
    assert not padding[1].any()
    assert torch.equal(labels[~padding], ids[~padding])
    assert (labels[padding] == -100).all()


def test_pretraining_runs_and_repeats(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    threads = torch.get_num_threads()
    try:
        state = torch.get_rng_state()
        losses = [pretrain(tmp_path / name, steps=2, seed=5) for name in ("one", "two")]
        assert torch.equal(torch.get_rng_state(), state), "the global random state is as it was"
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1]
    assert losses[0] < 2 * math.log(len(tokenizer))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) == len(tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.num_hidden_layers == 6
