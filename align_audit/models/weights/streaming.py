"""A model whose decoder layers are in memory only while they compute, two of them at most.

The model is the ordinary transformers class. Only its decoder layers' weights are absent (on the meta device, or on the
CPU); an instance ``forward`` on each layer brings that layer's weights in before it computes, has a thread bring in the
next one, and lets go of the one before. So at most two layers are held, and a layer that is called many times in a row
is brought in once. It hangs on ``forward``, not on a module hook, so that whoever replaces a layer's ``forward`` (as the
engine does to run norm and head alone) brings in nothing.

Where weights come from: :mod:`align_audit.models.weights.from_disk` (a checkpoint), :mod:`align_audit.models.weights.from_host`
(the CPU).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from align_audit.models.weights.sharded import whole_size

_ALIGNMENT = 64
"""Bytes; kernels may round differently on weights that start elsewhere."""


class NotStreamable(Exception):
    """This model cannot be streamed; the message says why, in words that fit into a record. Load it whole instead."""


class Stopped(Exception):
    """What a thread was reading is no longer wanted."""


Fill = Callable[[torch.Tensor, Callable[[], bool]], None]
"""Writes a weight into a tensor of its shape and dtype on the CPU; leaves with ``Stopped`` when the second says so."""

Copy = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[], None]]]
"""Bytes on the CPU → the bytes where the model computes, and a function to call before they are used there."""


@dataclass(frozen=True)
class Weight:
    """One parameter or buffer of a layer: what stands in the module while the layer is not held, and how to get it."""

    module: nn.Module
    name: str
    resting: torch.Tensor
    fill: Fill

    def put(self, value: torch.Tensor) -> None:
        place: Any = self.module._parameters if isinstance(self.resting, nn.Parameter) else self.module._buffers
        place[self.name] = value


# -- bringing layers in -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """How to bring one layer in: a thread holds this and so no module."""

    parts: list[tuple[torch.Size, torch.dtype, Fill]]
    copy: Copy
    pinned: bool

    def make(self, stopped: Callable[[], bool] = lambda: False) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """New tensors, all in one block of memory of their own: a graph may still use those of an earlier call."""
        offsets, size = [], 0
        for shape, dtype, _ in self.parts:
            offsets.append(size)
            size += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        host = _block(size, self.pinned)
        for tensor, (_, _, fill) in zip(self._views(host, offsets), self.parts, strict=True):
            fill(tensor, stopped)
        there, ready = self.copy(host)
        return self._views(there, offsets), ready

    def _views(self, block: torch.Tensor, offsets: list[int]) -> list[torch.Tensor]:
        return [
            block[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for offset, (shape, dtype, _) in zip(offsets, self.parts, strict=True)
        ]


def _block(size: int, pinned: bool) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class _Prefetch:
    """One layer on its way in, by a thread that ends with it."""

    def __init__(self, recipe: _Recipe, index: int) -> None:
        self.index = index
        self._recipe = recipe
        self._made: tuple[list[torch.Tensor], Callable[[], None]] | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"align_audit-layer-{index}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made = self._recipe.make(self._stop.is_set)
        except BaseException as error:  # raised again where the layer is called
            self._error = error

    def take(self) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """The layer, once it is there.

        Raises:
            whatever stopped the thread.
        """
        self._thread.join()
        made, self._made = self._made, None
        if self._error is not None:
            raise self._error
        assert made is not None
        return made

    def discard(self) -> None:
        """Stop, wait until nothing is held any more. What went wrong with a layer nobody called is nobody's concern."""
        self._stop.set()
        self._thread.join()
        self._made = self._error = None  # an error's traceback would keep what had been read until then


class LayerStream:
    """Holds at most two of a model's layers: the one called last, and the one that is likely called next.

    Args:
        layers: the decoder layers, bottom first.
        weights: what each of them needs brought in.
        copy: how bytes come to where the model computes.
        pinned: whether ``copy`` wants page-locked memory.

    Attributes:
        loads: layers brought in so far, called or not.
    """

    def __init__(
        self, layers: list[nn.Module], weights: list[list[Weight]], copy: Copy, *, pinned: bool = False
    ) -> None:
        self.loads = 0
        self._weights = weights
        self._recipes = [
            _Recipe([(weight.resting.shape, weight.resting.dtype, weight.fill) for weight in layer], copy, pinned)
            for layer in weights
        ]
        self._current: int | None = None
        self._next: _Prefetch | None = None
        self._step = 1
        self._followed: dict[int, int] = {}
        self._installed: list[tuple[nn.Module, Any]] = []
        for index, layer in enumerate(layers):
            self._installed.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._wrapped(index, layer.forward)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def streamed(*args: Any, **kwargs: Any) -> Any:
            self.need(index)
            return forward(*args, **kwargs)

        return streamed

    @property
    def held(self) -> set[int]:
        """The layers in memory, or on their way there."""
        return {index for index in (self._current, self._next.index if self._next else None) if index is not None}

    def need(self, index: int) -> None:
        """Bring layer ``index`` in, let go of the one before, and send for the next.

        Raises:
            ReferenceUnavailableError: its weights can no longer be read.
        """
        if index == self._current:
            return
        coming, self._next = self._next, None
        if coming is not None and coming.index == index:
            made, ready = coming.take()
            self._drop(successor=index)
        else:
            # Let go first: what is held plus what was sent for in vain would make three.
            if coming is not None:
                coming.discard()
            self._drop(successor=index)
            self.loads += 1
            made, ready = self._recipes[index].make()
        ready()
        for weight, tensor in zip(self._weights[index], made, strict=True):
            parameter = isinstance(weight.resting, nn.Parameter)
            weight.put(nn.Parameter(tensor, weight.resting.requires_grad) if parameter else tensor)
        self._current = index
        del made
        if (following := self._predict(index)) != index:
            self.loads += 1
            self._next = _Prefetch(self._recipes[following], following)

    def _drop(self, successor: int | None = None) -> None:
        if self._current is None:
            return
        for weight in self._weights[self._current]:
            weight.put(weight.resting)
        if successor is not None:
            self._followed[self._current] = successor
            if abs(successor - self._current) == 1:
                self._step = successor - self._current
        self._current = None

    def _predict(self, index: int) -> int:
        """The neighbour in the direction of travel; at either end what followed there the last time.

        Walks climb, some checks descend. Walks that begin in the middle are repeated, so the end of one tells where
        the next begins.
        """
        ahead = index + self._step
        last = len(self._recipes) - 1
        if 0 <= ahead <= last:
            return ahead
        return self._followed.get(index, 0 if index == last else min(1, last))

    def rest(self) -> None:
        """Hold nothing; the next call brings its layer in again."""
        coming, self._next = self._next, None
        if coming is not None:
            coming.discard()
        self._drop()

    def close(self) -> None:
        """Hold nothing, run no thread, and give every layer the ``forward`` and the tensors it was found with."""
        self.rest()
        for layer, forward in self._installed:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        self._installed = []


def stay(host: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    return host, lambda: None


def copy_to(device: torch.device) -> Copy:
    """The one thing that depends on the device."""
    if device.type == "cpu":
        return stay
    if device.type != "cuda":
        return lambda host: (host.to(device), lambda: None)
    # A stream of its own, else the copy would queue behind the layer that computes.
    side = torch.cuda.Stream(device)

    def copied(host: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        with torch.cuda.stream(side):
            there = host.to(device, non_blocking=True)
            done = side.record_event()

        def ready() -> None:
            computing = torch.cuda.current_stream(device)
            computing.wait_event(done)
            there.record_stream(computing)

        return there, ready

    return copied


# -- which model is streamed --------------------------------------------------------------------------------------------


Files = frozenset[tuple[Path, tuple[int, int, int]]]
"""The files that a model is read from, each with what it looked like when it was opened."""


class LayerHolder(Protocol):
    """Has a model's decoder layers in memory while they compute: :class:`LayerStream`, and whoever gathers them."""

    def need(self, index: int) -> None:
        """Have layer ``index`` in memory."""

    def rest(self) -> None:
        """Hold no layer."""

    def close(self) -> None:
        """Hold nothing any more, and leave no trace on the layers."""


_streams: weakref.WeakKeyDictionary[nn.Module, LayerHolder] = weakref.WeakKeyDictionary()
_stored: weakref.WeakKeyDictionary[nn.Module, dict[str, Weight]] = weakref.WeakKeyDictionary()
_files: weakref.WeakKeyDictionary[nn.Module, Files] = weakref.WeakKeyDictionary()


def stream_of(model: nn.Module) -> LayerHolder | None:
    """What holds the layers of a model that are brought in one at a time; None for any other."""
    return _streams.get(model)


def close(model: nn.Module) -> None:
    """End the streaming of a model, if it is streamed: nothing is held for its layers and no thread runs."""
    stream = _streams.pop(model, None)
    _stored.pop(model, None)
    _files.pop(model, None)
    if stream is not None:
        stream.close()


def register(
    model: nn.Module, stream: LayerHolder, stored: dict[str, Weight] | None = None, files: Files | None = None
) -> None:
    """From now on ``stream`` is the model's.

    Args:
        stored: its parameters and buffers that are not in memory, by name.
        files: that all of its weights are read from.
    """
    _streams[model] = stream
    if stored is not None:
        _stored[model] = stored
    if files is not None:
        _files[model] = files


def files_of(model: nn.Module) -> Files | None:
    """The files that a model streamed from disk is read from, as they were when it was opened; None for any other."""
    return _files.get(model)


def stored_tensors(model: nn.Module) -> Mapping[str, Callable[[], torch.Tensor]]:
    """For a model streamed from disk: by name, how to read each parameter or buffer not in memory, one at a time."""
    stored = _stored.get(model, {})
    stream = _streams.get(model)
    if stream is not None and stored:
        stream.rest()  # what is read here would come on top of the layers that are held

    def reader(weight: Weight) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            value = torch.empty(weight.resting.shape, dtype=weight.resting.dtype)
            weight.fill(value, lambda: False)
            return value

        return read

    return {name: reader(weight) for name, weight in stored.items()}


def find_layers(model: nn.Module, path: str | None = None) -> tuple[str, list[nn.Module]]:
    """The ``ModuleList`` of decoder layers and its dotted path: the given one, else the one that holds most weights.

    Raises:
        NotStreamable: there is none.
    """
    if path is not None:
        try:
            return path, _members(model.get_submodule(path))
        except AttributeError:
            raise NotStreamable(f"{type(model).__name__} has no submodule {path!r}") from None
    lists = [
        (sum(map(whole_size, module.parameters())), -index, name, module)
        for index, (name, module) in enumerate(model.named_modules())
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if not lists:
        raise NotStreamable(f"{type(model).__name__} keeps no layers in a ModuleList")
    _, _, name, module = max(lists, key=lambda item: item[:2])
    return name, _members(module)


def _members(container: nn.Module) -> list[nn.Module]:
    """All of them: ``children`` names a module that stands in two places once."""
    return [module for module in container._modules.values() if module is not None]


def own_tensors(model: nn.Module, layers: list[nn.Module]) -> list[list[tuple[nn.Module, str, torch.Tensor]]]:
    """Per layer, its parameters and persistent buffers with their places; nothing may have a second place elsewhere.

    Raises:
        NotStreamable: a layer, or a tensor of one, is used in two places.
    """
    places: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                places[id(tensor)] = places.get(id(tensor), 0) + 1
    by_layer = []
    if len({id(layer) for layer in layers}) < len(layers):
        raise NotStreamable("some layers are one and the same module")
    for index, layer in enumerate(layers):
        tensors: list[tuple[nn.Module, str, torch.Tensor]] = []
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tensors.append((module, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    tensors.append((module, name, buffer))
        if any(places[id(tensor)] > 1 for _, _, tensor in tensors):
            raise NotStreamable(f"layer {index} shares a weight with another part of the model")
        by_layer.append(tensors)
    return by_layer
