"""Tiny models and random probe pairs, built from configs: no download, no data."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.probes.pairs import ProbePair, ProbeSet

DEVICE = torch.device(os.environ.get("ALIGN_AUDIT_TEST_DEVICE", "cpu"))
"""Where the models of the exactness tests compute, the oracle's too: ``make test-gpu`` sets it to ``cuda``."""

VOCABULARY = 61
WIDTH = 32

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, hidden_size=WIDTH
    ),
    "qwen3": dict(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        hidden_size=WIDTH,
    ),
    # A window as long as what a batch pads: in float64, transformers' eager attention gives NaN to a padding position all
    # of whose window is padding (its mask overflows in the softmax's float32), and to the row with it.
    "gemma2": dict(
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
        hidden_size=WIDTH, sliding_window=16, final_logit_softcapping=2.0, attn_logit_softcapping=5.0,
    ),
    "gpt2": dict(n_embd=WIDTH, n_layer=3, n_head=4, n_positions=64),
}  # fmt: skip


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A randomly initialized model, with weights large enough that every layer does visible work."""
    options = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**options, **FAMILIES[family], **changes})
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
                elif "norm" in name or "ln_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    finally:
        torch.set_rng_state(state)
    return model.to(DEVICE)


def perturbed(model: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    """A copy whose every weight matrix moved by ``scale`` of its own spread, at random."""
    like = next(model.parameters())
    other = type(model)(model.config).to(like.device, like.dtype).eval()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.add_(scale * noise * parameter.std() if parameter.dim() > 1 else scale * 0.1 * noise)
    return other


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit by bit; on an accelerator, where sums of atomic adds round as they fall, to some units of rounding."""
    if DEVICE.type == "cpu":
        return torch.equal(one, other)
    tolerance = max(2 * torch.finfo(one.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())


def random_pairs(count: int, seed: int = 0, longest: int = 12) -> ProbeSet:
    """Pairs with prompts and completions of unequal length; every third pair's completions share a first token."""
    generator = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return generator.integers(3, VOCABULARY, size=int(generator.integers(low, high + 1))).tolist()

    pairs = []
    for index in range(count):
        prompt, chosen, rejected = tokens(1, longest), tokens(2, longest), tokens(2, longest)
        if index % 3 == 0:
            rejected[0] = chosen[0]
        pairs.append(
            ProbePair(
                index=index,
                chosen_ids=tuple(prompt + chosen),
                rejected_ids=tuple(prompt + rejected),
                chosen_start=len(prompt),
                rejected_start=len(prompt),
            )
        )
    return ProbeSet(
        pairs=tuple(pairs),
        source="random tokens",
        dropped={},
        max_length=64,
        truncation_mode="keep_start",
        held_out=None,
    )
