"""A model on the CPU that computes on another device: its decoder layers are copied over when they are called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from align_audit.models.weights.streaming import (
    Copy,
    Fill,
    LayerStream,
    NotStreamable,
    Stopped,
    Weight,
    close,
    copy_to,
    find_layers,
    own_tensors,
    register,
    stream_of,
)

logger = logging.getLogger(__name__)


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
    by_layer = own_tensors(model, members)
    for tensors in by_layer:
        for module, name, tensor in tensors:
            if type(tensor) not in (nn.Parameter, torch.Tensor) or type(tensor.data) is not torch.Tensor:
                raise NotStreamable(f"{name} of {type(module).__name__} is a {type(tensor).__name__}")
    weights = [[Weight(module, name, tensor, _copier(tensor)) for module, name, tensor in part] for part in by_layer]
    inside = {id(tensor) for part in by_layer for _, _, tensor in part}
    moved: dict[int, torch.Tensor] = {}
    originals: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    stream = LayerStream(members, weights, copy or copy_to(device), pinned=device.type == "cuda")
    register(model, stream)
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
                    originals.append((place, name, tensor))
        for place, name, tensor in originals:
            place[name] = moved[id(tensor)]
        yield stream
    finally:
        close(model)
        for place, name, tensor in originals:
            place[name] = tensor


def _copier(tensor: torch.Tensor) -> Fill:
    def fill(out: torch.Tensor, stopped: Callable[[], bool]) -> None:
        if stopped():
            raise Stopped
        out.copy_(tensor.detach())

    return fill
