"""What one writes without a tool: forward hooks; and, with more work, a forward restarted at the patched layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.contenders.common import Batch, Contender, Pair


def stream_of(output: Any) -> Tensor:
    """A decoder layer returns its stream, in older transformers as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Hooks(Contender):
    """Plain PyTorch forward hooks, one full forward a layer."""

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        return self._recorded(self.policy, batch)[1]

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._recorded(self.reference, batch)

    def base_logits(self, batch: Batch) -> Tensor:
        return self._forward(self.reference, batch)

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        def swap(module: Any, args: Any, output: Any) -> Any:
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = self.reference.model.layers[layer].register_forward_hook(swap)
        try:
            return self._forward(self.reference, batch)
        finally:
            handle.remove()

    @staticmethod
    def _forward(model: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    def _recorded(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        streams: list[Tensor] = []
        keep: Callable[..., None] = lambda module, args, output: streams.append(stream_of(output))  # noqa: E731
        handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
        try:
            return self._forward(model, batch), streams
        finally:
            for handle in handles:
                handle.remove()


class Restart(Hooks):
    """Continues the reference's own layers above the patched one, with the arguments its own run gave them."""

    def __init__(self, policy: Any, reference: Any) -> None:
        super().__init__(policy, reference)
        self._kwargs: list[dict[str, Any]] = []

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        with self._watched():
            return super().reference_run(batch)

    def base_logits(self, batch: Batch) -> Tensor:
        with self._watched():
            return super().base_logits(batch)

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        stream = value
        for module, kwargs in zip(self.reference.model.layers[layer + 1 :], self._kwargs[layer + 1 :], strict=True):
            stream = stream_of(module(stream, **kwargs))
        return self.reference.lm_head(self.reference.model.norm(stream))

    def _watched(self) -> _Watch:
        self._kwargs = []
        return _Watch(self.reference.model.layers, self._kwargs)


class RestartSorted(Restart):
    """The same with pairs batched by length: the most that is still written in an afternoon."""

    def batches(self, pairs: Sequence[Pair], size: int | None = None) -> list[Batch]:
        order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i].sides)))
        batches = super().batches([pairs[i] for i in order], size)
        return [replace(batch, index=[order[place] for place in batch.index]) for batch in batches]


class _Watch:
    """While open, each layer's keyword arguments go to ``kept``."""

    def __init__(self, layers: Any, kept: list[dict[str, Any]]) -> None:
        self._layers, self._kept = layers, kept
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._kept.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        self._handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self._layers]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
