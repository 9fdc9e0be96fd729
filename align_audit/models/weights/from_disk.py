"""A saved model whose decoder layers stay on disk, and are read from its safetensors files when they are called.

Which checkpoint tensor belongs to which parameter is not guessed: transformers' own loader lays the model out, with
hollow tensors in place of the layers' weights. A hollow tensor that arrives in the model untouched maps one to one; one
that was merged, split or transposed on its way (fused experts, say) does not, and streaming is refused with the reason.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from align_audit.errors import ReferenceUnavailableError
from align_audit.models.weights.streaming import (
    LayerStream,
    NotStreamable,
    Stopped,
    Weight,
    close,
    copy_to,
    find_layers,
    own_tensors,
    register,
)

_PIECE = 2**24
"""Bytes read at a time where the stored dtype is not the model's, and so needs room of its own."""

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
                        raise Stopped
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
    entries = {}
    for key, kind, shape, start, end in listed:
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise NotStreamable(f"{file.name} stores {key} as {kind}")
        size = torch.Size(shape).numel() * dtype.itemsize
        if end - start != size or 8 + length + end > stamp[1]:
            raise broken(f"{key} takes {size} bytes, of which the file has {max(0, stamp[1] - 8 - length - start)}")
        entries[key] = _Entry(file, key, dtype, shape, 8 + length + start, stamp)
    return entries


def _folder(path: str | Path) -> Path:
    """The local directory of a saved model; a hub name's is its snapshot in the cache. Nothing is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        saved = folder
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(str(path), "config.json")
        except HFValidationError:
            config = None
        if not isinstance(config, str):
            raise NotStreamable(f"{path} is neither a directory nor a hub name in the local cache")
        saved = Path(config).parent
    if (saved / "adapter_config.json").exists():
        raise NotStreamable("it is an adapter on top of another model")
    return saved


def _checkpoint(folder: Path) -> dict[str, _Entry]:
    """Every tensor of a saved model, by its key; the files are chosen as ``from_pretrained`` chooses them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _entries(single)
    if not index.is_file():
        raise NotStreamable("its weights are not in safetensors files")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReferenceUnavailableError(
            f"{index} cannot be read ({error!r}). Expected the index that `save_pretrained` writes beside its shards; save "
            "or download the model again"
        ) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ReferenceUnavailableError(
            f"{folder} lacks {', '.join(absent)}, which {index.name} names; expected every shard that `save_pretrained` "
            "wrote. Save or download the model again"
        )
    entries: dict[str, _Entry] = {}
    for name in names:
        entries.update(_entries(folder / name))
    return entries


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
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise NotStreamable("DeepSpeed ZeRO-3 shards what is loaded")
    folder = _folder(path)
    entries = _checkpoint(folder)
    lay_out = _Layout(entries, _configuration(folder, trust_remote_code), dtype, attention)
    # First everything is hollow, to learn which keys are the layers'; then all else is loaded for real, so that ties,
    # conversions and comparisons outside the layers are transformers' own.
    outline = lay_out(set(entries))
    name, members = find_layers(outline, layers)
    keys = {lay_out.key(outline, *place) for part in own_tensors(outline, members) for place in part}
    del outline, members
    model = lay_out(keys)
    _, members = find_layers(model, name)
    weights = [
        [
            Weight(module, place, _at_rest(tensor), entries[lay_out.key(model, module, place, tensor)].read)
            for module, place, tensor in part
        ]
        for part in own_tensors(model, members)
    ]
    stored = _put_to_rest(model, weights)
    there = torch.device(device) if device is not None else torch.device("cpu")
    _move(model, there)
    cast(Any, model).config.name_or_path = str(path)
    model.eval()
    stream = LayerStream(members, weights, copy_to(there), pinned=there.type == "cuda")
    register(model, stream, stored, frozenset((entry.file, entry.stamp) for entry in entries.values()))
    try:
        _try(model, there)
        stream.rest()
    except BaseException:
        close(model)
        raise
    return model


def _configuration(folder: Path, trust_remote_code: bool) -> Any:
    """Of a saved model whose class is transformers' own.

    Raises:
        NotStreamable: it cannot be read, or says that the weights are not what is computed with.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Of whatever kind: loading whole is what then shows the true error.
        raise NotStreamable(f"its configuration cannot be read ({error})") from error
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise NotStreamable("its class is code of its own")
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamable("its weights are quantized")
    return config


class _Layout:
    """Lays a saved model out as transformers loads it, some of its tensors hollow; and says which key each stands for."""

    def __init__(self, entries: dict[str, _Entry], config: Any, dtype: torch.dtype, attention: str | None) -> None:
        self._entries = entries
        self._config = config
        self._dtype = dtype
        self._options = {} if attention is None else {"attn_implementation": attention}
        self._touched: set[str] = set()
        """Keys of hollow tensors that were written to: what is in the model is then no longer what is stored."""

    def __call__(self, hollow: set[str]) -> nn.Module:
        """The model, with the tensors of the keys in ``hollow`` empty.

        Raises:
            NotStreamable: transformers does not take it.
            ReferenceUnavailableError: a file is broken.
        """
        from transformers import AutoModelForCausalLM

        values = {
            key: _Lazy(entry, self._dtype, self._touched if key in hollow else None)
            for key, entry in self._entries.items()
        }
        try:
            with torch.device("meta"):
                kind: Any = type(AutoModelForCausalLM.from_config(copy.deepcopy(self._config), **self._options))
            config = self._config if isinstance(self._config, kind.config_class) else self._config.get_text_config()
            model, report = kind.from_pretrained(
                None, config=config, state_dict=values, dtype=self._dtype, output_loading_info=True, **self._options
            )
        except ReferenceUnavailableError:
            raise
        except Exception as error:
            # Whatever a version of transformers does not take: loading whole is what then shows the true error.
            raise NotStreamable(f"transformers does not lay it out without its weights: {error!r}") from error
        if missing := sorted(report["missing_keys"]):
            raise NotStreamable(f"its files lack {missing[0]}, which would be random")
        return cast(nn.Module, model)

    def key(self, model: nn.Module, module: nn.Module, name: str, tensor: torch.Tensor) -> str:
        """The key under which exactly this tensor is stored.

        Raises:
            NotStreamable: there is none.
        """
        key = tensor.key if isinstance(tensor, _Hollow) else None
        if key is not None and key not in self._touched and self._entries[key].shape == tuple(tensor.shape):
            return key
        prefix = next(full for full, member in model.named_modules() if member is module)
        why = "is put together from stored tensors when it is loaded" if tensor.is_meta else "is not in its files"
        raise NotStreamable(f"{prefix}.{name} {why}")


def _put_to_rest(model: nn.Module, weights: list[list[Weight]]) -> dict[str, Weight]:
    """Every weight of a layer gives way to what stands for it; the weights by their full names in the model."""
    at: dict[int, Weight] = {}
    for layer in weights:
        for weight in layer:
            weight.put(weight.resting)
            at[id(weight.resting)] = weight
    tensors = (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))
    return {full: at[id(tensor)] for full, tensor in tensors if id(tensor) in at}


def _move(model: nn.Module, device: torch.device) -> None:
    """What is not at rest goes to the device."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


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
