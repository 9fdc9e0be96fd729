"""The state of PEFT adapters: which are active, which are switched off, and which are merged into the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from align_audit.models.module_change import ModuleChange
from align_audit.models.module_state import ModuleState
from align_audit.models.weights.sharded import has_engine
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


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into a weight of the model."""
    return any(is_adapted(module) and _is_merged(module) for module in model.modules())


def _is_merged(adapted: nn.Module) -> bool:
    return bool(getattr(adapted, "merged_adapters", None))


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
            if _is_merged(module):
                module.unmerge()  # type: ignore[operator]
        yield
    finally:
        if layers is not None:
            layers.rest()
        state.give_back()


class AdapterSwitch:
    """A switch of a model's adapters that is made by peft once, and repeated from then on by what it changed.

    PEFT's own looks at every module several times, and so does keeping what has to be given back: for an audit, which goes
    back and forth with each batch, it would come to more than what is computed. It stands inside an
    :func:`~align_audit.models.guard.untouched` of the model, which gives back all that forwards leave.

    Args:
        model: with adapters.
        switched: makes the context in which they are switched; it may leave them as it likes.

    A switch that does more than set attributes and ``requires_grad`` (that of adapters which are merged, or of weights that
    come and go) is made by peft every time.
    """

    def __init__(self, model: nn.Module, switched: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._model = model
        self._switched = switched
        self._adapted = [module for module in model.modules() if is_adapted(module)]
        self._change = self._seen()

    def _seen(self) -> ModuleChange | None:
        if stream_of(self._model) is not None or has_engine(self._model) or any(map(_is_merged, self._adapted)):
            return None
        state = ModuleState(self._model.modules(), contents=False)
        try:
            with self._switched():
                return state.change()
        finally:
            state.give_back()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the adapters are switched; after, they are as they were."""
        change = self._change
        if change is None or not change.fits or any(map(_is_merged, self._adapted)):
            with adapters_kept(self._model), self._switched():
                yield
            return
        change.put_on()
        try:
            yield
        finally:
            change.take_off()
