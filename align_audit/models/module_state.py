"""What modules hold beside the values of their parameters, kept so that it can be given back.

A forward may leave things in a model: frequencies of a dynamic rotary embedding, running statistics, a cached mask, a
counter. Whoever switches adapters or modes leaves more. Nothing here names such a thing: all of a module's attributes,
its registries (parameters, buffers, children, hooks) among them, are looked at before and after.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from align_audit.models.module_change import ABSENT, ModuleChange

logger = logging.getLogger(__name__)

_COPIED_BYTES = 2**28
"""Of tensors that are no parameters, how much is copied at most, smallest first."""

_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
"""Subclasses (distributed or quantized tensors) know best what they hold: of them only the object is kept."""

_VALUES = frozenset((bool, int, float, str, type(None)))
"""Types of most of what a module has: nothing is in them that could be kept."""

_MAPPINGS = frozenset((dict, OrderedDict, defaultdict))
_CONTAINERS = _MAPPINGS | {list, deque, set}

_NO_CONFIGURATION = (type, nn.Module)


class ModuleState:
    """Every attribute of every module: which object it is, and what containers, configurations and tensors hold.

    Kept are references, and copies of the tensors that are no parameters (buffers, and tensors in plain attributes): up to
    256 MiB together, smallest first, since a quantized model may keep its weights in buffers. Of a larger tensor it is kept
    which object and memory it is; a warning says so if it was written to. Of parameters nothing is copied: kept are the
    object, the memory it lies in, its ``requires_grad`` and its ``.grad``, so that one that was replaced comes back, and one
    that was written to in place does not. RWKV does so: it scales its weights at the first forward in another mode, and back
    in the old one. Numbers and flags of modules above such a parameter stay as they are, for they may say what was done.

    Args:
        modules: each for itself, without its children.
        contents: False: no tensor is copied.
    """

    def __init__(self, modules: Iterable[nn.Module], *, contents: bool = True) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        """By id: a mutable container and what it held, shallowly."""
        self._empty: dict[int, Any] = {}
        """By id: a mutable container that held nothing, as most registries of most modules do."""
        self._tensors: dict[int, _KeptTensor] = {}
        self._modules = list(modules)
        for module in self._modules:
            self._keep(vars(module), module._parameters)
        if contents:
            room = _COPIED_BYTES
            for kept in sorted(self._tensors.values(), key=lambda kept: kept.tensor.nbytes):
                if kept.may_copy:
                    room -= kept.copy(room)

    def _keep(self, value: Any, parameters: Any) -> None:
        """Keep what ``value`` holds; ``parameters``, too, of whatever class they are: an engine may have one of its own."""
        waiting = [value]  # a configuration may refer to itself, and lists may be nested deeply
        while waiting:
            value = waiting.pop()
            if type(value) in _VALUES:
                continue
            if isinstance(value, torch.Tensor):
                if id(value) not in self._tensors:
                    self._tensors[id(value)] = _KeptTensor(value)
            elif type(value) is tuple:
                waiting.extend(value)
            elif id(value) in self._containers or id(value) in self._empty:
                continue
            elif type(value) in _CONTAINERS and not value:
                self._empty[id(value)] = value
            elif type(value) in _MAPPINGS or value is parameters:
                self._containers[id(value)] = value, dict(value.items())
                waiting.extend(value.values())
            elif type(value) in (list, deque):
                self._containers[id(value)] = value, list(value)
                waiting.extend(value)
            elif type(value) is set:
                self._containers[id(value)] = value, set(value)
            elif _is_configuration(value):
                waiting.append(vars(value))

    def give_back(self) -> None:
        """Everything as it was; what did not change is not written to."""
        written = {id(kept.tensor) for kept in self._tensors.values() if kept.written_parameter}
        if written:
            self._accept_numbers(written)
        for container in filter(None, self._empty.values()):
            container.clear()
        for container, held in self._containers.values():
            if isinstance(container, dict):
                _give_back_mapping(container, held)
            elif isinstance(container, set):
                if container != held:
                    container.clear()
                    container.update(held)
            elif len(container) != len(held) or any(map(_is_not, container, held)):
                container.clear()
                container.extend(held)
        for kept in self._tensors.values():
            kept.give_back()

    def change(self) -> ModuleChange | None:
        """What is otherwise than it was kept; None where that is more than values of attributes and ``requires_grad``.

        Seen of a tensor is what :meth:`give_back` would give back of it, and of parameters that they were written to.
        """
        values: list[tuple[dict[Any, Any], Any, Any, Any]] = []
        for container in filter(None, self._empty.values()):
            if not isinstance(container, dict):
                return None
            values.extend((container, key, ABSENT, value) for key, value in container.items())
        for container, held in self._containers.values():
            if isinstance(container, dict):
                if any(key not in container for key in held):
                    return None
                differ = [key for key, value in container.items() if held.get(key, ABSENT) is not value]
                values.extend((container, key, held.get(key, ABSENT), container[key]) for key in differ)
            elif isinstance(container, set):
                if container != held:
                    return None
            elif len(container) != len(held) or any(map(_is_not, container, held)):
                return None
        if any(kept.written for kept in self._tensors.values()):
            return None
        flags = ((kept.tensor, kept.required_grad, kept.tensor.requires_grad) for kept in self._tensors.values())
        return ModuleChange(tuple(values), tuple(each for each in flags if each[1] != each[2]))

    def _accept_numbers(self, written: set[int]) -> None:
        """Numbers and flags of the modules that hold one of the ``written`` parameters are to be given back as they are now.

        Modes and the state of adapters are not among them: these say what is to be done, not what was.
        """
        for module in self._modules:
            now, (_, held) = vars(module), self._containers[id(vars(module))]
            for name, value in held.items():
                if (
                    isinstance(value, bool | int | float)
                    and isinstance(now.get(name), bool | int | float)
                    and now[name] is not value
                    and name != "training"
                    and "adapter" not in name
                    and any(id(parameter) in written for parameter in module.parameters())
                ):
                    held[name] = now[name]


class _KeptTensor:
    """One tensor: the memory it lies in, its flags, and (once copied) what it holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._parameter = isinstance(tensor, nn.Parameter)
        self.required_grad = tensor.requires_grad
        self._grad = tensor.grad if self._parameter else None
        plain = type(tensor) in _TENSORS and type(tensor.data) is torch.Tensor
        plain = plain and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
        self._data = tensor.data if plain else None
        self._content: torch.Tensor | None = None
        self._version = None if tensor.is_inference() else tensor._version
        self._too_large = False

    @property
    def written(self) -> bool:
        """Whether the tensor was written to, lies elsewhere or has another gradient; so it is said of all that cannot tell."""
        tensor = self.tensor
        if self._version is None or tensor.is_inference() or tensor._version != self._version:
            return True
        if self._data is not None and not _in_place_of(tensor, self._data):
            return True
        return self._parameter and tensor.grad is not self._grad

    @property
    def written_parameter(self) -> bool:
        """Whether this is a parameter that was written to where it lies."""
        if not self._parameter or self._data is None or self._version is None:
            return False
        return self.tensor._version != self._version and _in_place_of(self.tensor, self._data)

    @property
    def may_copy(self) -> bool:
        """An expanded tensor cannot be written to."""
        data = self._data
        return data is not None and not self._parameter and 0 not in data.stride()

    def copy(self, room: int) -> int:
        """Keep what the tensor holds, where it takes no more than ``room`` bytes; how many it took."""
        assert self._data is not None
        self._too_large = self.tensor.nbytes > room
        if self._too_large:
            return 0
        self._content = self._data.clone()
        return self.tensor.nbytes

    def give_back(self) -> None:
        tensor, data = self.tensor, self._data
        if data is not None and not _in_place_of(tensor, data):
            tensor.data = data
        if self._content is not None:
            assert data is not None
            if not _equal_bits(data, self._content):
                with torch.inference_mode(data.is_inference()), torch.no_grad():
                    data.copy_(self._content)
        elif self._too_large and not tensor.is_inference() and tensor._version != self._version:
            logger.warning(
                "a tensor of shape %s that is no parameter was written to during an audit; it is too large to be kept "
                "(%.0f MiB), so it cannot be given back as it was",
                tuple(tensor.shape),
                tensor.nbytes / 2**20,
            )
        if self._parameter:
            if tensor.requires_grad != self.required_grad:
                tensor.requires_grad = self.required_grad
            if tensor.grad is not self._grad:
                tensor.grad = self._grad


def _give_back_mapping(mapping: dict[Any, Any], held: dict[Any, Any]) -> None:
    for key in [key for key in mapping if key not in held]:
        del mapping[key]
    for key, value in held.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value
    if any(map(_is_not, mapping, held)):  # hooks and children run in their order
        mapping.clear()
        mapping.update(held)


def _is_not(a: Any, b: Any) -> bool:
    return a is not b


def _is_configuration(value: Any) -> bool:
    """A configuration of transformers or peft: it speaks of itself as a dictionary, and computes nothing."""
    return not isinstance(value, _NO_CONFIGURATION) and hasattr(value, "to_dict") and hasattr(value, "__dict__")


def _in_place_of(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether the tensor still lies where ``data`` does."""
    return (
        tensor.device == data.device
        and tensor.dtype == data.dtype
        and tensor.shape == data.shape
        and tensor.stride() == data.stride()
        and tensor.data_ptr() == data.data_ptr()
    )


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals NaN, and 0 is not −0."""
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
