"""A model whose weights are spread over processes, brought together while it is audited: a decoder layer at a time.

All processes call the same layers in the same order. None of the engine's own machinery runs: its hooks are out of the way,
and whole tensors stand where its shards do, so that no root is chosen, nothing is prefetched and nothing is left half done.
What is outside of the decoder layers is whole for as long as the model is open (the head is called thousands of times); a
layer is from when it is called until another one is. Graphs keep the tensors that they were made with.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from align_audit.errors import ConfigurationError
from align_audit.models.anatomy import unwrap
from align_audit.models.weights.sharded import (
    compute_dtypes,
    has_engine,
    is_spread,
    reshard,
    whole_size,
    whole_tensors,
    without_engine,
)
from align_audit.models.weights.streaming import NotStreamable, close, find_layers, register
from align_audit.ranks import Ranks


@dataclass
class _Weight:
    """One spread parameter, and wherever it stands."""

    resting: nn.Parameter
    dtype: torch.dtype
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return whole_size(self.resting) * self.dtype.itemsize

    def rest(self) -> None:
        self.put(self.resting)

    def put(self, value: nn.Parameter) -> None:
        for module, name in self.places:
            module._parameters[name] = value


class GatheredLayers:
    """Holds one of a model's layers: the one called last.

    Attributes:
        outside: bytes of what is outside of the layers, whole as long as this is open.
        layers: bytes of each layer.
        most: bytes that were whole at once, at most.
        gathers: how many layers were brought together so far.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        inside: list[list[_Weight]],
        outside: list[_Weight],
        ranks: Ranks,
        number: int,
    ) -> None:
        self.outside = sum(weight.bytes for weight in outside)
        self.layers = [sum(weight.bytes for weight in weights) for weights in inside]
        self.most = self.gathers = 0
        self._inside, self._outside = inside, outside
        self._ranks, self._number = ranks, number
        self._held: int | None = None
        self._installed: list[tuple[nn.Module, Any]] = []
        self._members = members

    def open(self) -> None:
        """Bring what is outside of the layers together; from now on calls of layers bring them."""
        self._bring(self._outside, self._number)
        for index, layer in enumerate(self._members):
            self._installed.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._wrapped(index, layer.forward)

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def gathered(*args: Any, **kwargs: Any) -> Any:
            self.need(index)
            return forward(*args, **kwargs)

        return gathered

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers that it holds."""
        return list(layers) == list(self._members)

    def need(self, index: int) -> None:
        """Bring layer ``index`` together, and let go of the one before.

        Raises:
            Agreed: another process cannot go on.
        """
        if index == self._held:
            return
        self.rest()
        self._bring(self._inside[index], 2 * (index + 1) + self._number)
        self._held = index
        self.gathers += 1

    def _bring(self, weights: list[_Weight], place: int) -> None:
        size = sum(weight.bytes for weight in weights)
        values = whole_tensors(
            [weight.resting for weight in weights],
            [weight.dtype for weight in weights],
            ready=lambda: self._ranks.check(place),
        )
        for weight, each in zip(weights, values, strict=True):
            weight.put(nn.Parameter(each, weight.resting.requires_grad))
        self.most = max(self.most, size + (0 if weights is self._outside else self.outside))

    def rest(self) -> None:
        """Hold no layer; the next call brings its layer together again."""
        if self._held is not None:
            for weight in self._inside[self._held]:
                weight.rest()
            self._held = None

    def close(self) -> None:
        """Give every layer its ``forward`` back, and every module its shards."""
        self.rest()
        for weight in self._outside:
            weight.rest()
        for layer, forward in self._installed:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        self._installed = []


@contextlib.contextmanager
def gathered_by_layer(
    model: nn.Module, ranks: Ranks, layers: str | None = None, *, number: int = 0
) -> Iterator[GatheredLayers | None]:
    """Inside, the model computes on every process as if its weights were all there. A model whose weights are is left alone.

    Args:
        ranks: the processes that call this, and every layer, together.
        layers: dotted path of the decoder layers in the causal LM; None: the ``ModuleList`` that holds most weights.
        number: 0 or 1, different for two models that are open at once.

    Raises:
        ConfigurationError: adapters are merged into weights that are spread.
        Agreed: another process cannot go on.
    """
    if not has_engine(model):
        yield None
        return
    reshard(model)
    _refuse_merged(model)
    try:
        _, members = find_layers(unwrap(model), layers)
    except NotStreamable:
        members = []
    gathered = GatheredLayers(members, *_weights(model, members), ranks, number)
    put_back = without_engine(model)
    register(model, gathered)
    try:
        gathered.open()
        yield gathered
    finally:
        close(model)
        put_back()


def _weights(model: nn.Module, members: Sequence[nn.Module]) -> tuple[list[list[_Weight]], list[_Weight]]:
    """The spread parameters of each layer, and all others: those outside, and those that several layers share."""
    layer_of = {module: index for index, layer in enumerate(members) for module in layer.modules()}
    dtypes = compute_dtypes(model)
    weights: dict[int, _Weight] = {}
    owners: dict[int, set[int | None]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_spread(parameter):
                continue
            dtype = dtypes[module] if parameter.is_floating_point() else None
            weight = weights.setdefault(id(parameter), _Weight(parameter, dtype or parameter.dtype))
            weight.places.append((module, name))
            owners.setdefault(id(parameter), set()).add(layer_of.get(module))
    inside: list[list[_Weight]] = [[] for _ in members]
    outside: list[_Weight] = []
    for key, weight in weights.items():
        owner = owners[key].pop() if len(owners[key]) == 1 else None
        (outside if owner is None else inside[owner]).append(weight)
    return inside, outside


def _refuse_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None) and any(map(is_spread, module.parameters())):
            raise ConfigurationError(
                f"an adapter is merged into {name}, whose weights are spread over processes; they could not be given back "
                "as they are. Unmerge the adapters (unmerge_adapter) before training"
            )
