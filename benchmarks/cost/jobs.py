"""Jobs to foresee and to measure: untrained models that a configuration makes, and pairs of random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.probes.pairs import ProbePair, ProbeSet

MAX_LENGTH = 512


@dataclass(frozen=True)
class JobSpec:
    """An untrained Llama, and pairs.

    Attributes:
        prompt, completion: tokens, from the fewest to the most; each length as likely.
        kind: ``full``, the first of a run; ``first look``, or ``later look``, which finds what is the reference's kept.
        ranks: processes.
    """

    layers: int
    width: int
    vocabulary: int
    pairs: int
    prompt: tuple[int, int] = (24, 72)
    completion: tuple[int, int] = (12, 48)
    kind: str = "full"
    ranks: int = 1

    @property
    def title(self) -> str:
        """In a table."""
        ranks = "" if self.ranks == 1 else f", {self.ranks} ranks"
        size = f"{self.layers} layers, {self.width} wide, vocabulary {self.vocabulary:,}"
        return f"{size}, {self.pairs} pairs, {self.kind}{ranks}"


def made_config(spec: JobSpec, layers: int | None = None) -> Any:
    """Of a Llama with heads of 64 and gated feed-forward parts of 8/3 of the width."""
    heads = max(1, spec.width // 64)
    return AutoConfig.for_model(
        "llama", vocab_size=spec.vocabulary, hidden_size=spec.width, intermediate_size=8 * spec.width // 3,
        num_hidden_layers=spec.layers if layers is None else layers, num_attention_heads=heads, num_key_value_heads=heads,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip


def made_model(spec: JobSpec, layers: int | None = None) -> Any:
    """With random weights, in float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made_config(spec, layers)).eval()


def moved(model: Any) -> Any:
    """A copy whose every weight has moved by a fiftieth of its spread."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    return copy


def made_pairs(spec: JobSpec, count: int | None = None) -> ProbeSet:
    """Random tokens with one prompt a pair."""
    generator = np.random.default_rng(0)

    def tokens(lengths: tuple[int, int]) -> tuple[int, ...]:
        return tuple(
            generator.integers(3, spec.vocabulary, size=int(generator.integers(*lengths, endpoint=True))).tolist()
        )

    pairs = []
    for index in range(spec.pairs if count is None else count):
        prompt = tokens(spec.prompt)
        pairs.append(
            ProbePair(
                index, prompt + tokens(spec.completion), prompt + tokens(spec.completion), len(prompt), len(prompt)
            )
        )
    return ProbeSet(
        pairs=tuple(pairs), source="random tokens", dropped={}, max_length=MAX_LENGTH, truncation_mode="keep_start",
        held_out=None,
    )  # fmt: skip
