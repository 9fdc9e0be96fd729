"""A model on the CPU that computes on another device: its decoder layers are copied over when they are called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from align_audit.errors import ConfigurationError, listed
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

    Raises:
        ConfigurationError: it is spread over several accelerators, between which its own hooks carry what it computes.
    """
    devices = {tensor.device for tensor in model.parameters()}
    if stream_of(model) is not None or devices <= {device}:
        yield
        return
    refuse_scattered(devices, "the reference")
    with contextlib.ExitStack() as stack:
        try:
            if devices != {torch.device("cpu")}:
                raise NotStreamable(f"it is on {', '.join(sorted(map(str, devices)))}")
            stack.enter_context(copied_by_layer(model, device))
        except NotStreamable as reason:
            logger.info("the reference moves to %s whole, not layer by layer: %s", device, reason)
            stack.enter_context(_moved(model, device))
        yield


@contextlib.contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model is on ``device`` inside. After it, and where it has no room there, it has the tensors that it had."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()
    ]
    try:
        model.to(device)
        yield
    finally:
        for parameter, values in parameters:
            parameter.data = values
        for place, name, buffer in buffers:
            place[name] = buffer


def refuse_scattered(devices: Iterable[torch.device], what: str) -> None:
    """Refuse a model that lies on several accelerators.

    Raises:
        ConfigurationError: it does.
    """
    accelerators = sorted({str(device) for device in devices if device.type not in ("cpu", "meta")})
    if len(accelerators) > 1:
        raise ConfigurationError(
            f"the weights of {what} are spread over {listed(accelerators)}, as device_map='auto' spreads them where a script "
            "is started without a launcher. Expected a model on one device: start one process for each GPU (accelerate launch, "
            "torchrun), or load policy and reference with device_map={'': 0}"
        )


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
