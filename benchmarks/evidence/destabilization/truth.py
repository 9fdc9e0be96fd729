"""The ground truth of a policy: what it thinks of held-out texts and what it writes. No code and no text of the audit's."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from destabilization.lines import Truth
from destabilization.models import Texts, vocabulary, words

NEW_TOKENS = 80
GRAM = 4


class TruthMeter:
    """Measures policies of one model on the same held-out texts, tokenized once."""

    def __init__(self, model: str, tokenizer: Any, data: Texts) -> None:
        self._words = vocabulary(model)
        self._tokenizer = tokenizer
        begin = [] if model != "stories260k" else [tokenizer.bos_token_id]  # that tokenizer adds none by itself
        natural = [begin + tokenizer(text)["input_ids"] for text in data.natural]
        self._natural = [(row, 1) for row in natural]
        self._preferred = [self._answer(row["prompt"], row["chosen"]) for row in data.preferred]
        self._dispreferred = [self._answer(row["prompt"], row["rejected"]) for row in data.preferred]
        self._prompts = [tokenizer(prompt)["input_ids"] for prompt in data.prompts]

    def _answer(self, prompt: str, answer: str) -> tuple[list[int], int]:
        begin: list[int] = self._tokenizer(prompt)["input_ids"]
        whole: list[int] = self._tokenizer(prompt + answer)["input_ids"]
        return whole, min(len(begin), len(whole) - 1)

    def measure(self, policy: Any, step: int, weights: str) -> Truth:
        """All of it, for the policy as it stands, in eval mode."""
        ids, ended = self._continue(policy)
        written = [self._tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ids]
        joined = "\n".join(written).encode()
        said = [word for text in written for word in words(text)]
        return Truth(
            step=step,
            text=nats_per_token(policy, self._natural),
            preferred=nats_per_token(policy, self._preferred),
            dispreferred=nats_per_token(policy, self._dispreferred),
            distinct=sum(map(distinct, ids)) / len(ids),
            compression=len(zlib.compress(joined, 9)) / max(len(joined), 1),
            length=sum(map(len, ids)) / len(ids),
            ended=sum(ended) / len(ended),
            foreign=sum(word not in self._words for word in said) / max(len(said), 1),
            weights=weights,
        )

    def _continue(self, policy: Any) -> tuple[list[list[int]], list[bool]]:
        """Greedy continuations of all prompts: tokens without the one that ends them, and whether it came."""
        import torch

        end, prompts = self._tokenizer.eos_token_id, self._prompts
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        new: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        cache = None
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                output = policy(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                following = output.logits[:, -1].nan_to_num(nan=-1e9).argmax(-1)
                for row, token in enumerate(following.tolist()):
                    going[row] = going[row] and token != end
                    if going[row]:
                        new[row].append(token)
                if not any(going):
                    break
                tokens = following[:, None]
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
                positions = positions[:, -1:] + 1
        return new, [not on for on in going]


def distinct(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that are different; 1 where there are none."""
    grams = [tuple(tokens[place : place + GRAM]) for place in range(len(tokens) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def nats_per_token(policy: Any, rows: Sequence[tuple[list[int], int]], batch: int = 64) -> float:
    """−log p over all tokens of ``rows`` from the given place on, in nats per token. The right side is padded and ignored."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows), batch):
            group = rows[first : first + batch]
            longest = max(len(row) for row, _ in group)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])
            logits = policy(input_ids=ids, use_cache=False).logits
            logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for place, (row, begin) in enumerate(group):
                total -= float(logp[place, begin - 1 : len(row) - 1].double().sum())
                count += len(row) - begin
    return total / count
