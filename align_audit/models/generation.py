"""Greedy continuations by a model itself, whatever its own generation settings say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

_PAD = 0
"""Any token of any vocabulary: what stands there is masked."""


def can_generate(model: Any) -> bool:
    """Whether the model brings what it takes to continue text."""
    return bool(callable(getattr(model, "generate", None)) and getattr(model, "can_generate", lambda: True)())


def end_tokens(model: Any, completions: Sequence[Sequence[int]] = ()) -> frozenset[int]:
    """The tokens that end a text: those the model names, and the one that ends all ``completions`` and stands nowhere else.

    Trainers append such a token to every completion, also where a base model's configuration names none; and a chat template
    may put something behind it, such as a newline, which ends no text.

    Args:
        completions: without their prompts.
    """
    named: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            named |= set(ends) if isinstance(ends, list | tuple) else {ends}
    return frozenset(named | _common_end(completions))


def _common_end(completions: Sequence[Sequence[int]]) -> set[int]:
    """The last of the tokens that all completions end with which occurs in each of them once; empty: there is none."""
    if len(completions) < 2 or not all(completions):
        return set()
    for place in range(1, min(map(len, completions)) + 1):
        token = completions[0][-place]
        if any(completion[-place] != token for completion in completions):
            break
        if all(completion.count(token) == 1 for completion in completions):
            return {token}
    return set()


def continue_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    device: torch.device,
    suppressed: Collection[int] = (),
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[list[int]]:
    """The most likely next token, again and again: for each prompt the new tokens, at most ``max_new_tokens``.

    A row goes on after its end until all have ended; what stands behind an end means nothing.

    Args:
        suppressed: tokens that are never written.
        autocast: makes the context that the model computes in.
    """
    # Eager attention of a sliding window gives NaN in float64 where the padding is longer than the window.
    alone = next(model.parameters()).dtype == torch.float64
    groups = [[prompt] for prompt in prompts] if alone else [prompts]
    with autocast():
        return [row for group in groups for row in _continued(model, group, max_new_tokens, ends, device, suppressed)]


def _continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    device: torch.device,
    suppressed: Collection[int],
) -> list[list[int]]:
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    # Positions count from a row's first token, so padding stands in front.
    ids = torch.tensor([[_PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=_PAD,
        eos_token_id=sorted(ends) or None,
        suppress_tokens=sorted(suppressed) or None,
        use_cache=True,
    )
    with _bare_settings(model), torch.no_grad():
        # Whoever gathers weights says himself where processes wait for each other.
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, synced_gpus=False)
    rows: list[list[int]] = out[:, longest:].tolist()
    return rows


@contextlib.contextmanager
def _bare_settings(model: Any) -> Iterator[None]:
    """Without the model's own settings, which fill in whatever is not given: penalties and the like are not greedy."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
