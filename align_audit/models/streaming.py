"""A model whose decoder layers are in memory only while they compute: read from disk, or copied to a device, in turn.

The model is the ordinary transformers class. Only its decoder layers' weights are absent (on the meta device, or on the
CPU); an instance ``forward`` on each layer brings that layer's weights in before it computes, has a thread bring in the
next one, and lets go of the one before. So at most two layers are held, and a layer that is called many times in a row
is brought in once. It hangs on ``forward``, not on a module hook, so that whoever replaces a layer's ``forward`` (as the
engine does to run norm and head alone) brings in nothing.

Which checkpoint tensor belongs to which parameter is not guessed: transformers' own loader lays the model out, with
hollow tensors in place of the layers' weights. A hollow tensor that arrives in the model untouched maps one to one; one
that was merged, split or transposed on its way (fused experts, say) does not, and streaming is refused with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align_audit.errors import ReferenceUnavailableError

logger = logging.getLogger(__name__)

_PIECE = 2**24
"""Bytes read at a time where the stored dtype is not the model's, and so needs room of its own."""

_ALIGNMENT = 64
"""Bytes; kernels may round differently on weights that start elsewhere."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class NotStreamable(Exception):
    """This model cannot be streamed; the message says why, in words that fit into a record. Load it whole instead."""


class _Stopped(Exception):
    """What a thread was reading is no longer wanted."""


Fill = Callable[[torch.Tensor, Callable[[], bool]], None]
"""Writes a weight into a tensor of its shape and dtype on the CPU; leaves with ``_Stopped`` when the second says so."""

Copy = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[], None]]]
"""Bytes on the CPU → the bytes where the model computes, and a function to call before they are used there."""


@dataclass(frozen=True)
class _Weight:
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
        self, layers: list[nn.Module], weights: list[list[_Weight]], copy: Copy, *, pinned: bool = False
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
        for layer, own in self._installed:
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = own
        self._installed = []


def _stay(host: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    return host, lambda: None


def _copy_to(device: torch.device) -> Copy:
    """The one thing that depends on the device."""
    if device.type == "cpu":
        return _stay
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

_streams: weakref.WeakKeyDictionary[nn.Module, LayerStream] = weakref.WeakKeyDictionary()
_stored: weakref.WeakKeyDictionary[nn.Module, dict[str, _Weight]] = weakref.WeakKeyDictionary()


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model whose layers are brought in one at a time; None for any other."""
    return _streams.get(model)


def close(model: nn.Module) -> None:
    """End the streaming of a model, if it is streamed: nothing is held for its layers and no thread runs."""
    stream = _streams.pop(model, None)
    _stored.pop(model, None)
    if stream is not None:
        stream.close()


def stored_parameters(model: nn.Module) -> Mapping[str, Callable[[], torch.Tensor]]:
    """For a model streamed from disk: by name, how to read each parameter that is not in memory, one at a time."""
    stored = _stored.get(model, {})
    stream = _streams.get(model)
    if stream is not None and stored:
        stream.rest()  # what is read here would come on top of the layers that are held

    def reader(weight: _Weight) -> Callable[[], torch.Tensor]:
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
        (sum(parameter.numel() for parameter in module.parameters()), -index, name, module)
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


def _own_tensors(model: nn.Module, layers: list[nn.Module]) -> list[list[tuple[nn.Module, str, torch.Tensor]]]:
    """Per layer, its parameters and persistent buffers with their places; nothing may have a second place elsewhere.

    Raises:
        NotStreamable: a layer, or a tensor of one, is used in two places.
    """
    places: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                places[id(tensor)] = places.get(id(tensor), 0) + 1
    found = []
    if len({id(layer) for layer in layers}) < len(layers):
        raise NotStreamable("some layers are one and the same module")
    for index, layer in enumerate(layers):
        own: list[tuple[nn.Module, str, torch.Tensor]] = []
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    own.append((module, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    own.append((module, name, buffer))
        if any(places[id(tensor)] > 1 for _, _, tensor in own):
            raise NotStreamable(f"layer {index} shares a weight with another part of the model")
        found.append(own)
    return found


# -- from disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor in a safetensors file: where its bytes are, and what the file looked like when it was opened."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, int, int]

    def read(self, out: torch.Tensor, stopped: Callable[[], bool] = lambda: False) -> None:
        """Read into ``out``, in its dtype. Read, not mapped: mapped pages would count as this process's memory.

        Raises:
            ReferenceUnavailableError: the file is gone, was changed, or ends early.
        """
        try:
            with open(self.file, "rb", buffering=0) as file:
                if _stamp(file.fileno()) != self.stamp:
                    raise ReferenceUnavailableError(
                        f"{self.file} was changed while the reference was being read from it, so its layers would come "
                        "from two models. Keep the reference's directory as it is while an audit runs"
                    )
                file.seek(self.start)
                flat = out.view(-1)
                piece = max(1, _PIECE // self.dtype.itemsize)
                room = None if out.dtype == self.dtype else torch.empty(min(piece, flat.numel()), dtype=self.dtype)
                for first in range(0, flat.numel(), piece):
                    if stopped():
                        raise _Stopped
                    part = flat[first : first + piece]
                    target = part if room is None else room[: part.numel()]
                    self._fill(file, memoryview(target.view(torch.uint8).numpy().data))
                    if room is not None:
                        part.copy_(target)
        except OSError as error:
            raise ReferenceUnavailableError(
                f"cannot read {self.key} of the reference from {self.file}: {error}. The reference is streamed from its "
                "directory, layer by layer; expected it to stay there while an audit runs"
            ) from error

    def _fill(self, file: Any, view: memoryview) -> None:
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ReferenceUnavailableError(
                    f"{self.file} ends before the tensor {self.key} does: the file is incomplete. Expected a directory "
                    "written by `save_pretrained`; save or download it again"
                )
            view = view[count:]


def _stamp(file: int | Path) -> tuple[int, int, int]:
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _entries(file: Path) -> dict[str, _Entry]:
    """What a safetensors file holds, from its header: 8 bytes of length, then JSON, then the data.

    Raises:
        NotStreamable: a dtype that is not streamed (eight-bit floats, say).
        ReferenceUnavailableError: the file is not whole.
    """

    def broken(what: str) -> ReferenceUnavailableError:
        return ReferenceUnavailableError(
            f"{file} is not a whole safetensors file: {what}. Expected a directory written by `save_pretrained`; save or "
            "download it again"
        )

    stamp = _stamp(file)
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= stamp[1] - 8:
            raise broken(f"its header says {length} bytes, the file has {stamp[1]}")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            listed = [
                (key, value["dtype"], tuple(value["shape"]), *value["data_offsets"]) for key, value in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken(f"its header cannot be read ({error!r})") from error
    found = {}
    for key, kind, shape, start, end in listed:
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise NotStreamable(f"{file.name} stores {key} as {kind}")
        size = torch.Size(shape).numel() * dtype.itemsize
        if end - start != size or 8 + length + end > stamp[1]:
            raise broken(f"{key} takes {size} bytes, of which the file has {max(0, stamp[1] - 8 - length - start)}")
        found[key] = _Entry(file, key, dtype, shape, 8 + length + start, stamp)
    return found


def _folder(path: str | Path) -> Path:
    """The local directory of a saved model; a hub name's is its snapshot in the cache. Nothing is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        found = folder
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(str(path), "config.json")
        except HFValidationError:
            config = None
        if not isinstance(config, str):
            raise NotStreamable(f"{path} is neither a directory nor a hub name in the local cache")
        found = Path(config).parent
    if (found / "adapter_config.json").exists():
        raise NotStreamable("it is an adapter on top of another model")
    return found


def _checkpoint(folder: Path) -> dict[str, _Entry]:
    """Every tensor of a saved model, by its key; the files are chosen as ``from_pretrained`` chooses them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _entries(single)
    if not index.is_file():
        raise NotStreamable("its weights are not in safetensors files")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ReferenceUnavailableError(
            f"{folder} lacks {', '.join(absent)}, which {index.name} names; expected every shard that `save_pretrained` "
            "wrote. Save or download the model again"
        )
    found: dict[str, _Entry] = {}
    for name in names:
        found.update(_entries(folder / name))
    return found


class _Hollow(torch.Tensor):
    """A tensor without data that knows which checkpoint key it stands for, until something is computed with it."""

    key: str | None = None
    _touched: set[str]

    @staticmethod
    def of(entry: _Entry, dtype: torch.dtype, touched: set[str]) -> _Hollow:
        hollow = torch.empty(entry.shape, dtype=dtype, device="meta").as_subclass(_Hollow)
        hollow.key, hollow._touched = entry.key, touched
        return hollow

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        source = args[0] if args else None
        if not isinstance(source, _Hollow) or source.key is None:
            return result
        if name == "detach":  # how nn.Parameter wraps a tensor
            result = result.as_subclass(_Hollow)
            result.key, result._touched = source.key, source._touched
        elif name == "__set__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            source._touched.add(source.key)  # written to: it is no longer what is stored
        return result


class _Lazy:
    """Stands in a state dict for one stored tensor, as safetensors' own slices do: read (or hollow) when it is asked."""

    def __init__(self, entry: _Entry, dtype: torch.dtype, touched: set[str] | None) -> None:
        self._entry, self._dtype, self._touched = entry, dtype, touched
        self.shape, self.dtype = torch.Size(entry.shape), entry.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, item: Any) -> Any:
        if self._touched is not None:
            return self
        value = torch.empty(self._entry.shape, dtype=self._entry.dtype)
        self._entry.read(value)
        return value[item]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert self._touched is not None
        return _Hollow.of(self._entry, dtype or self._dtype, self._touched)


def open_streamed(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    layers: str | None = None,
) -> nn.Module:
    """A saved causal LM in eval mode with its decoder layers left on disk; see the module's docstring.

    Embeddings, final norm, head and all buffers that are not saved are in memory, as transformers makes them.

    Args:
        path: a directory written by ``save_pretrained`` (safetensors, in shards or not), or a hub name in the cache.
        dtype: of the weights, whatever they are stored in.
        device: where the model computes.
        attention: the attention implementation.
        layers: dotted path of the decoder layers; None: the ``ModuleList`` that holds most weights.

    Raises:
        NotStreamable: the model must be loaded whole; says why.
        ReferenceUnavailableError: its files are broken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise NotStreamable("DeepSpeed ZeRO-3 shards what is loaded")
    folder = _folder(path)
    entries = _checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise NotStreamable(f"its configuration cannot be read ({error})") from error
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise NotStreamable("its class is code of its own")
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamable("its weights are quantized")

    def lay_out(hollow: set[str], touched: set[str]) -> nn.Module:
        """The model as transformers loads it, with the tensors of the keys in ``hollow`` empty."""
        values = {key: _Lazy(entry, dtype, touched if key in hollow else None) for key, entry in entries.items()}
        options = {} if attention is None else {"attn_implementation": attention}
        try:
            with torch.device("meta"):
                kind: Any = type(AutoModelForCausalLM.from_config(copy.deepcopy(config), **options))
            own = config if isinstance(config, kind.config_class) else config.get_text_config()
            return kind.from_pretrained(None, config=own, state_dict=values, dtype=dtype, **options)
        except ReferenceUnavailableError:
            raise
        except Exception as error:
            # Whatever a version of transformers does not take: loading whole is what then shows the true error.
            raise NotStreamable(f"transformers does not lay it out without its weights: {error!r}") from error

    # First everything is hollow, to learn which keys are the layers'; then all else is loaded for real, so that ties,
    # conversions and comparisons outside the layers are transformers' own.
    touched: set[str] = set()
    outline = lay_out(set(entries), touched)
    name, members = find_layers(outline, layers)
    keys = {_key(outline, entries, touched, *place) for part in _own_tensors(outline, members) for place in part}
    del outline, members
    model: Any = lay_out(keys, touched)
    _, members = find_layers(model, name)
    weights = [
        [
            _Weight(module, place, _at_rest(tensor), entries[_key(model, entries, touched, module, place, tensor)].read)
            for module, place, tensor in part
        ]
        for part in _own_tensors(model, members)
    ]
    at: dict[int, _Weight] = {}
    for layer in weights:
        for weight in layer:
            weight.put(weight.resting)
            at[id(weight.resting)] = weight
    stored = {full: at[id(tensor)] for full, tensor in model.named_parameters() if id(tensor) in at}
    there = torch.device(device) if device is not None else torch.device("cpu")
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(there)
        for own, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[own] = buffer.to(there)
    model.config.name_or_path = str(path)
    model.eval()
    stream = LayerStream(members, weights, _copy_to(there), pinned=there.type == "cuda")
    _streams[model], _stored[model] = stream, stored
    try:
        _try(model, there)
        stream.rest()
    except BaseException:
        close(model)
        raise
    return model


def _key(
    model: nn.Module, entries: dict[str, _Entry], touched: set[str], module: nn.Module, name: str, tensor: torch.Tensor
) -> str:
    """The key under which exactly this tensor is stored.

    Raises:
        NotStreamable: there is none.
    """
    key = tensor.key if isinstance(tensor, _Hollow) else None
    if key is not None and key not in touched and entries[key].shape == tuple(tensor.shape):
        return key
    prefix = next(full for full, other in model.named_modules() if other is module)
    why = "is put together from stored tensors when it is loaded" if tensor.is_meta else "is not in its files"
    raise NotStreamable(f"{prefix}.{name} {why}")


def _at_rest(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a weight that is not held. It asks for gradients as a loaded one does: some kernels differ."""
    hollow = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def _try(model: Any, device: torch.device) -> None:
    """One forward of two tokens: does the model reach its layers' weights only through their ``forward``?"""
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except (RuntimeError, AttributeError, TypeError) as error:
        raise NotStreamable(f"a forward does not run with its layers on disk ({error})") from error
    if logits.is_meta:
        raise NotStreamable("a forward uses weights of its layers outside of them")


# -- from the CPU to a device ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model computes on ``device`` inside, and is as it was after: the same tensors, where they were.

    From the CPU its layers are copied over one at a time. Where that cannot be (and between other devices) the whole
    model moves.
    """
    devices = {tensor.device for tensor in model.parameters()}
    if stream_of(model) is not None or devices <= {device}:
        yield
        return
    here = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        try:
            if devices != {torch.device("cpu")}:
                raise NotStreamable(f"it is on {', '.join(sorted(map(str, devices)))}")
            stack.enter_context(copied_by_layer(model, device))
        except NotStreamable as reason:
            logger.info("the reference moves to %s whole, not layer by layer: %s", device, reason)
            stack.callback(model.to, here)
            model.to(device)
        yield


@contextlib.contextmanager
def copied_by_layer(
    model: nn.Module, device: torch.device, layers: str | None = None, copy: Copy | None = None
) -> Iterator[LayerStream]:
    """``model``'s layers are copied to ``device`` when they are called, two at a time; all else for the duration.

    Args:
        layers: dotted path of the decoder layers; None: the ``ModuleList`` that holds most weights.
        copy: how; by default as suits the device.

    Raises:
        NotStreamable: weights that are shared between layers, or are no plain tensors.
    """
    _, members = find_layers(model, layers)
    own = _own_tensors(model, members)
    for tensors in own:
        for module, name, tensor in tensors:
            if type(tensor) not in (nn.Parameter, torch.Tensor) or type(tensor.data) is not torch.Tensor:
                raise NotStreamable(f"{name} of {type(module).__name__} is a {type(tensor).__name__}")
    weights = [[_Weight(module, name, tensor, _copier(tensor)) for module, name, tensor in part] for part in own]
    inside = {id(tensor) for part in own for _, _, tensor in part}
    moved: dict[int, torch.Tensor] = {}
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    stream = LayerStream(members, weights, copy or _copy_to(device), pinned=device.type == "cuda")
    try:
        for module in model.modules():
            places: list[dict[str, Any]] = [module._parameters, module._buffers]
            for place in places:
                for name, tensor in place.items():
                    if tensor is None or id(tensor) in inside:
                        continue
                    if id(tensor) not in moved:
                        there = tensor.detach().to(device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                    before.append((place, name, tensor))
        for place, name, tensor in before:
            place[name] = moved[id(tensor)]
        _streams[model] = stream
        yield stream
    finally:
        _streams.pop(model, None)
        stream.close()
        for place, name, tensor in before:
            place[name] = tensor


def _copier(tensor: torch.Tensor) -> Fill:
    def fill(out: torch.Tensor, stopped: Callable[[], bool]) -> None:
        if stopped():
            raise _Stopped
        out.copy_(tensor.detach())

    return fill
