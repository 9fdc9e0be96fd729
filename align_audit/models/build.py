"""A hash of what a model computes with beside its parameters: two models of equal weights may compute different things."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from align_audit.models.adapters import is_adapted
from align_audit.models.weights.fingerprint import belongs_to, summed
from align_audit.models.weights.streaming import stored_tensors
from align_audit.models.weights.zero3 import is_deepspeeds

_ELSEWHERE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Of a configuration: where it is from, what saving a model writes into it (classes and dtypes of tensors are hashed by
themselves), and what an audit passes by itself."""

_WORDS_OF_TRAINING = ("checkpointing", "dropout")
_WORDS_OF_FORWARDS = (
    "cache",
    "rescaled",
    "recurrent_states",
    "conv1d_state",
    "conv_state",
    "long_inv_freq",
    "original_inv_freq",
)
"""Parts of the names of what a forward leaves for the next one. It depends on what was computed before, is computed again
where it is needed, and is given back after an audit."""
_NOT_COMPUTED_WITH = {
    "training", "forward", "name_or_path", "model_tags", "warnings_issued", "hf_device_map", "is_parallelizable",
    "model_parallel", "device_map", "_is_hf_initialized", "all_tied_weights_keys",
}  # fmt: skip
_STATE_OF_ADAPTERS = {
    "_active_adapter", "active_adapter", "_disable_adapters", "_adapters", "merged_adapters", "targeted_module_names",
    "targeted_parameter_names", "modules_to_save",
}  # fmt: skip
"""Names of adapters, in one form or another; which of them compute is told by what is left when the others are skipped."""

_OF_QUANTIZED = ("quant_state", "SCB", "quant_type", "blocksize")
"""What a quantized weight carries as attributes and is read with."""

_PLAIN = (bool, int, float, str, torch.dtype)


def build_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of what a model computes with beside its parameters.

    That is its configuration, its buffers, the classes of its modules and their plain attributes (numbers, flags, names,
    dtypes, functions, tensors, and collections of these; the scale of an adapter and the ε of a norm are such), what
    quantized weights are read with, and whether adapters are merged. Adapters count that compute now: of one that is
    inactive or switched off nothing does. Not counted are modes and other settings of training, what a forward leaves for
    the next one, and where the model is from. A model read from disk once more, in another process or streamed, has the
    same hash.

    Two models of equal :func:`~align_audit.models.weights.fingerprint.fingerprint` and equal ``build_fingerprint`` compute
    the same function, and the same bits where library versions, device and number of threads are the same too. It sees no
    code: a method or hook that was replaced does not count.
    """
    digest = hashlib.blake2b(digest_size=8)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        values = {name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE}
        digest.update(_written(values).encode())
    digest.update(str(getattr(config, "_attn_implementation", None)).encode())
    stored = stored_tensors(model)
    idle = _idle_adapters(model)
    for name, buffer in sorted(model.named_buffers(remove_duplicate=False), key=lambda item: item[0]):
        if any(word in name.rsplit(".", 1)[-1] for word in _WORDS_OF_FORWARDS) or belongs_to(model, name, idle):
            continue
        content = _of_tensor(stored[name]() if name in stored else buffer)
        digest.update(f"{name}|{content};".encode())
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if not belongs_to(model, name, idle):
            for line in _of_module(module, idle):
                digest.update(f"{name}|{line};".encode())
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        for attribute in _OF_QUANTIZED:
            value = getattr(parameter, attribute, None)
            if value is not None:
                values = vars(value) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else value
                digest.update(f"{name}|{attribute}|{_written(values)};".encode())
    return digest.hexdigest()


def _idle_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the PEFT adapters that do not compute now."""
    adapters: set[str] = set()
    active: set[str] = set()
    for module in model.modules():
        if is_adapted(module):
            layer: Any = module
            for registry in layer.adapter_layer_names:
                held = getattr(layer, registry, None)
                if isinstance(held, nn.ModuleDict | nn.ParameterDict):
                    adapters.update(held.keys())
            if not layer.disable_adapters:
                active.update(layer.active_adapters, layer.merged_adapters)
    return tuple(sorted(adapters - active))


def _of_module(module: nn.Module, idle: tuple[str, ...]) -> Iterator[str]:
    """What a module is and computes with, a line each, in an order of its own."""
    yield type(module).__qualname__
    is_model = hasattr(module, "config") and hasattr(module, "save_pretrained")
    wrapper = hasattr(module, "active_adapter") and not is_adapted(module)
    if wrapper:  # of peft: what it holds says which adapters there are, and its layers say which compute
        return
    if isinstance(module, nn.modules.dropout._DropoutNd):  # does nothing in eval mode, and trainers set it to 0
        return
    if is_adapted(module):
        layer: Any = module
        yield f"off {bool(layer.disable_adapters)}, merged {sorted(layer.merged_adapters)}"
    for name, value in sorted(vars(module).items()):
        if name in _TORCHS_OWN or name in _NOT_COMPUTED_WITH or (is_model and name.startswith("_")):
            continue
        if is_deepspeeds(name) or any(word in name for word in (*_WORDS_OF_TRAINING, *_WORDS_OF_FORWARDS)):
            continue
        if is_adapted(module):
            if name in _STATE_OF_ADAPTERS:
                continue
            if type(value) is dict:
                value = {key: item for key, item in value.items() if key not in idle}
        if value is not None and _is_plain(value):
            yield f"{name}={_written(value)}"


_TORCHS_OWN = set(vars(nn.Module()))


def _is_plain(value: Any) -> bool:
    """Whether a value says the same in every process; of an instance of another class nobody can tell."""
    if value is None or isinstance(value, (*_PLAIN, torch.Tensor)):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, functools.partial):
        return _is_plain(value.func) and _is_plain(value.args) and _is_plain(value.keywords)
    # Functions that were made at run time stand for somebody's wrapper, as a trainer's around ``forward``.
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return "<" not in value.__qualname__ and not hasattr(value, "__wrapped__")
    return False


def _written(value: Any) -> str:
    """A value in characters that depend on nothing else: not on the process, nor on the order in which it was put together."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, dict):
        items = sorted((_written(key), _written(item)) for key, item in value.items())
        return "{" + ",".join(f"{key}:{item}" for key, item in items) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(_written, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, functools.partial):
        return f"{_written(value.func)}({_written(value.args)}{_written(value.keywords)})"
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    return type(value).__qualname__


def _of_tensor(tensor: torch.Tensor) -> str:
    plain = not tensor.is_meta and tensor.numel() and tensor.layout is torch.strided
    sums = summed(tensor.detach())[2] if plain and not tensor.is_complex() else None
    return f"{tuple(tensor.shape)}|{tensor.dtype}|{sums}"
