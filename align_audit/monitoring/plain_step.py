"""What training on a pair takes here, as a trainer would do it: the unit that an audit's cost is told in before training."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align_audit.models.guard import untouched
from align_audit.probes.batches import make_batch
from align_audit.probes.pairs import ProbePair

_BATCH = 4
"""Pairs that are computed together."""


@dataclass(frozen=True)
class StepOptions:
    """How the trainer trains.

    Attributes:
        lora: adapters only, so that no gradient of the model's own weights is made.
        checkpointing: activations are computed again in the backward pass.
        autocast: makes the context that the models compute in.
    """

    lora: bool = False
    checkpointing: bool = True
    beta: float = 0.1
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def seconds_per_pair(
    policy: nn.Module, reference: nn.Module, pairs: Sequence[ProbePair], options: StepOptions
) -> float:
    """Wall-clock seconds of the DPO loss on one pair: both models forward, the policy backward. The optimizer is not counted.

    The models' weights stay as they are; the policy is in eval mode afterwards, without gradients.
    """
    batches = [list(range(first, min(first + _BATCH, len(pairs)))) for first in range(0, len(pairs), _BATCH)]
    with untouched(), _training(policy, options):
        _step(policy, reference, pairs, batches[0], options)  # the first one is slower
        began = time.perf_counter()
        for places in batches:
            _step(policy, reference, pairs, places, options)
        return (time.perf_counter() - began) / len(pairs)


@contextlib.contextmanager
def _training(policy: Any, options: StepOptions) -> Iterator[None]:
    trains = [(weight, weight.requires_grad) for weight in policy.parameters()]
    policy.train()
    for weight, _ in trains:
        weight.requires_grad_(not options.lora and weight.is_floating_point())
    if options.lora:
        # An adapter's gradients need those of the streams and none of the weights.
        policy.enable_input_require_grads()
    checkpointing = options.checkpointing and getattr(policy, "supports_gradient_checkpointing", False)
    if checkpointing:
        _checkpoint(policy, True)
    try:
        yield
    finally:
        if checkpointing:
            _checkpoint(policy, False)
        if options.lora:
            policy.disable_input_require_grads()
        for weight, required in trains:
            weight.grad = None
            weight.requires_grad_(required)
        policy.eval()


def _checkpoint(policy: Any, on: bool) -> None:
    """Switch checkpointing, by the name that this version of transformers has for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # both names are there, and the older one everywhere
        if on:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            policy.gradient_checkpointing_disable()


def _step(
    policy: nn.Module, reference: nn.Module, pairs: Sequence[ProbePair], places: list[int], options: StepOptions
) -> None:
    device = next(policy.parameters()).device
    batch = make_batch([pairs[place] for place in places], places, 0)
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    scored = batch.in_completion[:, 1:].to(device)

    def margins(model: nn.Module) -> torch.Tensor:
        with options.autocast():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        chosen, rejected = (logps * scored).sum(-1).chunk(2)
        return chosen - rejected

    with torch.no_grad():
        reference_margins = margins(reference)
    with torch.enable_grad():
        loss = -nn.functional.logsigmoid(options.beta * (margins(policy) - reference_margins)).mean()
        loss.backward()


__all__ = ["StepOptions", "seconds_per_pair"]
