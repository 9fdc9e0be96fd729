"""Run parts of a layer at some positions only.

After the last layer the stream is read at prediction positions alone. Its attention needs keys and values from every
position, but the rest of it (the feed-forward part, the query and output projections, norms between them) treats each
position by itself and need not run elsewhere. Which modules these are is found by trying, not by their names: a module
may be narrowed when the layer's output at the wanted positions stays what it was, whatever stands at the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from align_audit.models.weights.sharded import whole_size

_SHARE = 0.03
"""A module with fewer of the layer's parameters than this is not worth gathering and scattering for."""


@contextlib.contextmanager
def narrowed(
    modules: Sequence[nn.Module], read: torch.Tensor, shape: tuple[int, int], fill: float = 0.0
) -> Iterator[list[nn.Module]]:
    """Inside, each of ``modules`` runs at the positions ``read`` [n] only and gives ``fill`` elsewhere.

    Args:
        read: places among the R·T positions of a stream, each once.
        shape: (R, T).

    Yields:
        a list that fills with the modules as they are called.

    Raises:
        NotPointwise: from a module that was called with something other than a tensor [R, T, k].
    """
    forwards = [module.__dict__.get("forward") for module in modules]
    called: list[nn.Module] = []
    try:
        for module in modules:
            module.forward = _narrow(module, read, shape, fill, called)
        yield called
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


class NotPointwise(Exception):
    """The module takes or returns something that is not one vector a position."""


def _narrow(
    module: nn.Module, read: torch.Tensor, shape: tuple[int, int], fill: float, called: list[nn.Module]
) -> Callable[..., Any]:
    forward: Callable[..., Any] = module.forward
    places = shape[0] * shape[1]

    def at_some_positions(*args: Any, **kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs), None)
        stream = args[0] if args else kwargs.get(name) if name is not None else None
        called.append(module)
        if not isinstance(stream, torch.Tensor) or stream.dim() != 3 or stream.shape[:2] != shape:
            raise NotPointwise
        inside = stream.reshape(places, -1).index_select(0, read)[None]
        output = forward(inside, *args[1:], **kwargs) if name is None else forward(**{**kwargs, name: inside})

        def spread(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.dim() == 3 and value.shape[:2] == (1, len(read)):
                everywhere = value.new_full((places, value.shape[-1]), fill)
                return everywhere.index_copy_(0, read, value[0]).view(*shape, -1)
            if value.dim() == 2 and value.shape[0] == len(read):
                return value.new_full((places, value.shape[-1]), fill).index_copy_(0, read, value)
            raise NotPointwise

        return tuple(map(spread, output)) if isinstance(output, tuple) else spread(output)

    return at_some_positions


def find_pointwise(
    layer: nn.Module,
    run: Callable[[], torch.Tensor],
    entering: torch.Tensor,
    kept: torch.Tensor,
    tolerance: float,
    guess: Sequence[nn.Module] = (),
) -> list[nn.Module]:
    """The largest modules of ``layer`` that may be narrowed, each of them and all together.

    Args:
        run: the layer's output [R, T, d] on a fixed stream.
        entering: that stream.
        kept: [n] the places, among R·T, at which the output must stay what it was; in every row later than others.
        tolerance: largest change, as a share of what the layer adds to the stream.
        guess: modules that are taken where they are right; others are looked for only where they are not.
    """
    expected = run().flatten(0, 1)[kept].double()
    update = float((expected - entering.flatten(0, 1)[kept].double()).norm())
    total = sum(map(whole_size, layer.parameters()))
    if not (update > 0.0 and total):  # nothing to compare with (NaN included): nothing is narrowed
        return []

    def harmless(modules: Sequence[nn.Module]) -> bool:
        # Zeros could go unnoticed where something is added or multiplied; a large value would not.
        for fill in (0.0, 100.0):
            try:
                with narrowed(modules, kept, (entering.shape[0], entering.shape[1]), fill) as called:
                    output = run().flatten(0, 1)[kept].double()
            except Exception:  # any failure at all says the same: this module does not run on single positions
                return False
            if set(called) != set(modules) or len(called) != len(modules):
                return False
            if not float((output - expected).norm()) <= tolerance * update:
                return False
        return True

    if guess and harmless(guess):
        return list(guess)
    chosen: list[nn.Module] = []
    waiting = list(layer.children())
    while waiting:
        module = waiting.pop(0)
        if sum(map(whole_size, module.parameters())) < _SHARE * total:
            continue
        if harmless([module]):
            chosen.append(module)
        else:
            waiting += list(module.children())
    return chosen if chosen and harmless(chosen) else []
