"""Everything a module holds beside the values of its parameters, as something two of which can be compared."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def bits(tensor: torch.Tensor) -> Any:
    if tensor.is_meta:
        return ("meta", tuple(tensor.shape), tensor.dtype)
    whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (tuple(tensor.shape), tensor.dtype, str(tensor.device), bytes(whole.cpu().numpy()))


def seen(value: Any, depth: int = 0) -> Any:
    """Objects by identity, and what tensors and containers hold."""
    if isinstance(value, torch.Tensor):
        parameter = (value.requires_grad, id(value.grad)) if isinstance(value, nn.Parameter) else None
        return (id(value), value.data_ptr(), bits(value), parameter)
    if type(value) in (dict, OrderedDict):
        return (id(value), [(seen(key), seen(item, depth + 1)) for key, item in value.items()])
    if type(value) in (list, tuple):
        return (id(value), [seen(item, depth + 1) for item in value])
    if isinstance(value, set):
        return (id(value), sorted(map(repr, value)))
    if isinstance(value, bool | int | float | str | None | torch.dtype):
        return (type(value), repr(value))
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return (id(value), repr(value.to_dict()))
    return id(value)


def everything(model: nn.Module) -> dict[str, Any]:
    """By module and attribute; a parameter's values and hooks included."""
    return {
        f"{name}.{attribute}": seen(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def left_on(model: nn.Module) -> list[Any]:
    """Everything an observation might leave behind on a model."""
    modules = [
        (
            name,
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            vars(module).get("forward"),
        )
        for name, module in model.named_modules()
    ]
    return [
        *modules,
        *((name, value.requires_grad, value.grad is None, value._version) for name, value in model.named_parameters()),
    ]
