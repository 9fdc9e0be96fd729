"""Gradients of numbers that are read at the top, by the streams below and by tensors inside layers, one layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from align_audit.models.replay import Recording, Replay


def _no_taps(layer: int) -> AbstractContextManager[Mapping[Any, torch.Tensor]]:
    return contextlib.nullcontext({})


def stream_gradients(
    replay: Replay,
    recording: Recording,
    objectives: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    *,
    down_to: int = 0,
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """∂ objective / ∂ h_l, a list of [R, T, d] (one an objective), for l = L−1 … ``down_to``, one layer at a time.

    ``objectives`` takes h_{L−1} and gives scalars. Each layer is run again with its input as a leaf, so the graph
    of one layer lives at a time and no parameter's ``.grad`` is written.
    """
    for layer, gradients, _ in inner_gradients(replay, recording, objectives, down_to=down_to):
        yield layer, gradients


def inner_gradients(
    replay: Replay,
    recording: Recording,
    objectives: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    tap: Callable[[int], AbstractContextManager[Mapping[Any, torch.Tensor]]] = _no_taps,
    *,
    down_to: int = 0,
) -> Iterator[tuple[int, list[torch.Tensor], dict[Any, list[torch.Tensor]]]]:
    """:func:`stream_gradients`, and on the way the gradients at tensors inside the layers.

    Args:
        tap: for a layer, a context in which a call of it leaves tensors of its graph in the mapping it yields.

    Yields:
        l, ∂ objective / ∂ h_l, and for layer l + 1 (empty at the top) the gradients by what its tap left: by key, one
        an objective.
    """
    # Grad mode is switched around each step, not around the yields: a generator must not leak it to its consumer.
    with torch.enable_grad():
        top = recording.after(replay.num_layers - 1).detach().requires_grad_()
        gradients = [gradients_of[0] for gradients_of in _each_gradient(objectives(top), [top], None)]
    yield replay.num_layers - 1, gradients, {}
    for index in range(replay.num_layers - 1, down_to, -1):
        with torch.enable_grad():
            leaf = recording.after(index - 1).detach().requires_grad_()
            with tap(index) as inside:
                output = replay.layer(index, leaf, recording)
            each = _each_gradient([output] * len(gradients), [leaf, *inside.values()], gradients)
        gradients = [gradients_of[0] for gradients_of in each]
        inner = {key: [gradients_of[place + 1] for gradients_of in each] for place, key in enumerate(inside)}
        del output, inside, each
        replay.layer_tokens += len(gradients) * leaf.shape[0] * leaf.shape[1]
        yield index - 1, gradients, inner


def _each_gradient(
    outputs: Sequence[torch.Tensor], by: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor] | None
) -> list[tuple[torch.Tensor, ...]]:
    """∂ output / ∂ each of ``by`` for each of several outputs of one graph, each times its ``upstream`` gradient."""
    gradients = []
    for place, output in enumerate(outputs):
        gradients.append(
            torch.autograd.grad(
                output,
                by,
                grad_outputs=None if upstream is None else upstream[place].to(output.dtype),
                retain_graph=place + 1 < len(outputs),
            )
        )
    return gradients
