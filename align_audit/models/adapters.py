"""The state of PEFT adapters: which are active, which are switched off, and which are merged into the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from align_audit.models.module_state import ModuleState
from align_audit.models.weights.streaming import stream_of


def is_adapted(module: nn.Module) -> bool:
    """Whether a module holds adapters beside what it wraps: a layer of a tuner, or a copy of a module to save."""
    return hasattr(module, "adapter_layer_names")


def protect_merges(model: nn.Module) -> None:
    """From now on merging and unmerging write to copies of the weights, made when they begin.

    To merge is to add to the weights in place, and to take the sum apart again rounds: only the weights themselves, left
    alone, are the same bits later. A :class:`~align_audit.models.module_state.ModuleState` that was taken before puts them
    back, and the modules' own ``merge`` and ``unmerge`` with them. Nothing is copied where nothing is merged or unmerged.
    """
    for module in model.modules():
        if not (is_adapted(module) and hasattr(module, "merged_adapters")):
            continue
        layer: Any = module
        for name in ("merge", "unmerge"):
            parameter = getattr(layer, name, None)
            if callable(parameter):
                setattr(layer, name, _on_copies(parameter, [(weight, weight.data) for weight in layer.parameters()]))


def _on_copies(change: Callable[..., Any], weights: list[tuple[nn.Parameter, torch.Tensor]]) -> Callable[..., Any]:
    @functools.wraps(change)
    def changed(*args: Any, **kwargs: Any) -> Any:
        for weight, data in weights:
            # Of subclasses (quantized weights) a merge makes new parameters; one that lies elsewhere is a copy already.
            plain = type(weight) is nn.Parameter and not weight.is_meta
            if plain and weight.data_ptr() == data.data_ptr():
                weight.data = data.clone()
        return change(*args, **kwargs)

    return changed


@contextlib.contextmanager
def adapters_kept(model: nn.Module) -> Iterator[None]:
    """Inside, adapters may be switched and unmerged; after, they are as they were, layer by layer and bit by bit.

    What is merged is unmerged inside, and its weights are there twice as long.
    """
    if (layers := stream_of(model)) is not None:
        layers.rest()  # what stands in modules now is what will be given back
    modules = list(model.modules())
    adapted = [module for module in modules if is_adapted(module)]
    tuners = [module for module in modules if hasattr(module, "active_adapter") and not is_adapted(module)]
    parts = {id(part): part for module in adapted for part in module.modules()}
    state = ModuleState([*parts.values(), *tuners], contents=False)
    protect_merges(model)
    try:
        for module in adapted:
            if getattr(module, "merged_adapters", None):
                module.unmerge()  # type: ignore[operator]
        yield
    finally:
        if layers is not None:
            layers.rest()
        state.give_back()
