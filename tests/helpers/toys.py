"""Hand-made causal language models with odd names and calling conventions, and a batch to feed them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.helpers.tiny import DEVICE

VOCABULARY = 23
WIDTH = 8


class Block(nn.Module):
    """h + tanh W(mean of h at and before the position)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def update(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight = mask[..., None].to(stream.dtype)
        seen = (stream * weight).cumsum(1) / weight.cumsum(1).clamp_min(1.0)
        return torch.tanh(self.inner(seen))

    def forward(self, stream: torch.Tensor, mask: torch.Tensor) -> Any:
        return stream + self.update(stream, mask)


class Toy(nn.Module):
    """A causal LM of ``depth`` blocks; subclasses change how the stream passes through them."""

    block: type[nn.Module] = Block

    def __init__(self, depth: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy", is_encoder_decoder=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
            self.decks = nn.ModuleList(self.block() for _ in range(depth))
            self.norm = nn.LayerNorm(WIDTH)
            self.out = nn.Linear(WIDTH, VOCABULARY)
            self.build()
        self.double().to(DEVICE).eval()

    def build(self) -> None:
        """More modules, in a subclass."""

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def run(self, stream: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for deck in self.decks:
            stream = deck(stream, mask)
        return stream

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.out(self.norm(self.run(self.tokens(input_ids), attention_mask))))


def batch(vocabulary: int = VOCABULARY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three right-padded rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 6, 9])
    mask = (torch.arange(11)[None] < lengths[:, None]).long()
    ids = torch.randint(3, vocabulary, (3, 11), generator=generator)
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}
