"""Bases to plant in: built as their family is, begun so that they learn, and measured block by block."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit.lab import MODEL_DIR
from align_audit.lab.bases import FAMILIES, base_dir, block_work, build_base, cache_dir, pretrain_base
from align_audit.lab.corpus import stories
from align_audit.lab.pretrain import HELD_OUT_SEED, held_out_loss
from align_audit.models.verify import open_replay


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_models_are_of_their_family_and_can_be_opened(family: str, tokenizer: Any) -> None:
    state = torch.get_rng_state()
    model: Any = build_base(family, tokenizer, seed=4).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.model_type == family
    assert open_replay(model).num_layers == 6
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    again = build_base(family, tokenizer, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    loss = held_out_loss(model, tokenizer, stories(4, HELD_OUT_SEED))
    assert loss < 2.5 * math.log(len(tokenizer)), "it does not begin by being sure of what is wrong"


def test_pretraining_saves_what_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        loss = pretrain_base("gpt2", tmp_path / "bases" / "gpt2", steps=2)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ALIGN_AUDIT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path / "bases"
    folder = base_dir("gpt2")  # found, so not trained again
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = held_out_loss(model, AutoTokenizer.from_pretrained(folder), stories(100, HELD_OUT_SEED))
    assert again == pytest.approx(loss, abs=1e-5)
    assert base_dir("llama") == MODEL_DIR
    with pytest.raises(ValueError, match="expected a family of gpt2, gemma2, qwen3"):
        base_dir("bert")


def test_every_block_of_the_shipped_model_works(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
    texts = stories(8, HELD_OUT_SEED)
    worth = block_work(model, tokenizer, texts)
    assert len(worth) == 6
    assert min(worth) > 0.02
    # A block that adds the same to every token is worth nothing: its mean replaces it exactly.
    with torch.no_grad():
        for weight in (model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight):
            weight.zero_()
    assert abs(block_work(model, tokenizer, texts)[2]) < 1e-5
