"""Finer sites inside a decoder layer: what its attention adds to the residual stream, what its MLP adds, each head's part.

A head's part is what its slice of the attention's output projection adds to the projection's output; the parts of all
heads, and the bias, sum to it (the "result" of a head: Elhage et al. 2021, transformer-circuits.pub/2021/framework). Where
the sites of a layer are is found by trying, in :mod:`~align_audit.models.find_sites`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from align_audit.errors import AnatomyError, SiteError
from align_audit.models.replay import Recording, Replay

Kind = Literal["attention_output", "mlp_output", "head"]


class Place(NamedTuple):
    """One site of a layer: an addend, or one head's part of the attention."""

    kind: Kind
    head: int | None = None


@dataclass(frozen=True)
class LayerSites:
    """Where one decoder layer's sites are: paths of modules within the layer; None where a site was not established.

    Attributes:
        attention, mlp: the module whose output is added to the stream.
        projection: the attention's output projection; its input is the heads side by side.
        heads: how many.
        addends: all modules whose outputs are added, in the order in which they run.
        missing: per kind of site, why the layer has none.
    """

    attention: str | None = None
    mlp: str | None = None
    projection: str | None = None
    heads: int = 0
    addends: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def path(self, kind: Kind) -> str | None:
        """Of the module at whose output the site is met."""
        return {"attention_output": self.attention, "mlp_output": self.mlp, "head": self.projection}[kind]

    @property
    def kinds(self) -> list[str]:
        """What there is to patch; a whole block there always is."""
        paths = {"attention_output": self.attention, "mlp_output": self.mlp, "head": self.projection}
        return ["block", *(kind for kind, path in paths.items() if path is not None)]


class Sites:
    """The sites of an opened model: recorded, swapped and differentiated during one call of one layer.

    :func:`~align_audit.models.find_sites.find_sites` makes them. Every use puts its hooks on for that call only and takes
    them off whatever happens; a site that was not met exactly once is an error. The layer always runs at all positions: a
    swap and narrowing (``Replay.layer``'s ``read``) never meet.

    Args:
        layers: where each decoder layer's sites are.
    """

    def __init__(self, replay: Replay, layers: list[LayerSites]) -> None:
        self.replay = replay
        self.layers = layers

    def check(self, kind: Kind, layer: int, head: int | None = None) -> None:
        """Raise unless the layer has the site.

        Raises:
            SiteError: saying what it has instead.
        """
        sites = self.layers[layer]
        if sites.path(kind) is None:
            raise SiteError(f"layer {layer} has {', '.join(sites.kinds)}; no {kind}: {sites.missing[kind]}")
        if head is not None and not 0 <= head < sites.heads:
            raise SiteError(f"layer {layer} has heads 0 to {sites.heads - 1}; no head {head}")

    def record(
        self,
        layer: int,
        recording: Recording,
        places: Collection[Place],
        keep: Callable[[Place, torch.Tensor], torch.Tensor] = lambda place, tensor: tensor.clone(),
    ) -> dict[Place, torch.Tensor]:
        """What stood at ``places`` of a layer in a recorded run, [R, T, d] each, from one call of the layer.

        Args:
            keep: what to keep of each tensor, called while one of them is there at a time.
        """
        kept: dict[Place, torch.Tensor] = {}

        def look(call: _Call) -> None:
            for place in places:
                if self.layers[layer].path(place.kind) == call.path and place.head is None:
                    kept[place] = keep(place, call.output)
            alone = [place for place in places if place.head is not None]
            if alone and call.path == self.layers[layer].projection:
                bias = call.bias()
                for place in alone:
                    kept[place] = keep(place, self._part(layer, call, place.head, bias))

        with self._hooks(layer, recording, {place.kind for place in places}, look):
            self.replay.layer(layer, recording.after(layer - 1), recording)
        return kept

    def swapped(
        self, layer: int, recording: Recording, place: Place, swap: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """h_layer [R, T, d] of a recorded run in which the tensor t [R, T, d] at ``place`` was ``swap(t)``.

        For a head, the attention's projection gives its output plus ``swap(t)`` − t.
        """

        def exchange(call: _Call) -> torch.Tensor:
            if place.head is None:
                return swap(call.output.clone()).clone()  # some layers write into what their modules return (Falcon)
            part = self._part(layer, call, place.head, call.bias())
            return call.output + (swap(part) - part)

        with self._hooks(layer, recording, {place.kind}, exchange):
            return self.replay.layer(layer, recording.after(layer - 1), recording)

    @contextlib.contextmanager
    def tapped(self, layer: int, recording: Recording, kinds: Collection[Kind]) -> Iterator[dict[Kind, torch.Tensor]]:
        """Inside, a call of the layer under autograd leaves behind the tensors at its sites, to be differentiated by.

        Yields:
            kind → the module's own output, in whatever shape it has; for ``head`` the projection's output, of which every
            head's part is a summand.
        """
        taps: dict[Kind, torch.Tensor] = {}

        def look(call: _Call) -> torch.Tensor:
            for kind in kinds:
                if self.layers[layer].path(kind) == call.path:
                    taps[kind] = call.raw
            # The layer goes on with a copy, which it may write into.
            return call.output.clone()

        with self._hooks(layer, recording, kinds, look):
            yield taps

    def _part(self, layer: int, call: _Call, head: int | None, bias: torch.Tensor) -> torch.Tensor:
        """What one head adds to the projection's output, [R, T, d]: the projection of its slice of the input alone."""
        assert head is not None
        width = call.input.shape[-1] // self.layers[layer].heads
        alone = torch.zeros_like(call.input)
        within = slice(head * width, (head + 1) * width)
        alone[..., within] = call.input[..., within]
        return call.again(alone) - bias

    @contextlib.contextmanager
    def _hooks(
        self, layer: int, recording: Recording, kinds: Collection[Kind], act: Callable[[_Call], torch.Tensor | None]
    ) -> Iterator[None]:
        paths = []
        for kind in kinds:
            self.check(kind, layer)
            paths.append(self.layers[layer].path(kind))
        # The attention's addend may be the output projection itself: one hook then does for both.
        with contextlib.ExitStack() as stack:
            for path in dict.fromkeys(paths):
                assert path is not None
                shape = recording.after(layer - 1).shape
                stack.enter_context(_met(self.replay.layers[layer], path, shape, act))
            yield


# -- hooks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A module's call: its path, first input [R, T, k], and its output as it is and as [R, T, d]."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raw: torch.Tensor
    shape: torch.Size

    @property
    def output(self) -> torch.Tensor:
        return self.raw.view(self.shape)

    @property
    def input(self) -> torch.Tensor:
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        assert isinstance(value, torch.Tensor)
        return value

    def again(self, value: torch.Tensor) -> torch.Tensor:
        """The module on another first input; without its hooks, so that this one is not called again."""
        if self.args:
            output = self.module.forward(value, *self.args[1:], **self.kwargs)
        else:
            output = self.module.forward(**{**self.kwargs, next(iter(self.kwargs)): value})
        tensor = first_tensor(output)
        assert tensor is not None
        return tensor.view(self.shape)

    def bias(self) -> torch.Tensor:
        """What the module makes of nothing, [R, T, d]."""
        return self.again(torch.zeros_like(self.input))


@contextlib.contextmanager
def _met(layer: nn.Module, path: str, shape: torch.Size, act: Callable[[_Call], torch.Tensor | None]) -> Iterator[None]:
    """Inside, ``act`` sees the output of the module at ``path`` and may give another [R, T, d] in its place.

    Raises:
        AnatomyError: the module did not run exactly once.
    """
    met = 0

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal met
        met += 1
        tensor = first_tensor(output)
        assert tensor is not None
        exchanged = act(_Call(path, module, args, kwargs, tensor, shape))
        return None if exchanged is None else with_first_tensor(output, exchanged.view(tensor.shape).to(tensor.dtype))

    handle = layer.get_submodule(path).register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if met != 1:
        raise AnatomyError(f"expected {path!r} to run once in a call of its decoder layer; it ran {met} times")


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first value a module returned, where it is a floating tensor."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def with_first_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """What a module returned, with another tensor in the first place."""
    return type(output)((tensor, *output[1:])) if type(output) in (tuple, list) else tensor
