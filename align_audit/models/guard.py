"""Observation is inert: whatever an audit does to a model or to random state is undone when it ends."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from align_audit.models.adapters import protect_merges
from align_audit.models.module_state import ModuleState
from align_audit.models.weights.sharded import reshard
from align_audit.models.weights.streaming import stream_of


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run the models in eval mode and give everything back as it was, also when the body raises.

    Restored: every module's buffers, plain attributes, children and hooks, and with them train/eval modes, active, disabled
    and merged adapters; which objects the parameters are and whether they require gradients; configurations; the random
    state of Python, NumPy, torch and every CUDA device; torch's gradient mode. What a parameter holds is not copied, except
    for weights that an adapter is merged into or unmerged from inside. For the cost see
    :class:`~align_audit.models.module_state.ModuleState`.

    The body runs outside of ``torch.inference_mode``, so that gradients can be taken in it; where it was on, gradients are
    off, and weights that were made in it are seen through ordinary tensors over the same memory.
    """
    for model in models:
        reshard(model)  # what an engine holds whole for now would come back empty
    streams = [stream for model in models if (stream := stream_of(model)) is not None]
    for stream in streams:
        stream.rest()  # what is kept below would keep the layer that is held now, beside the two that come
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    gradients = torch.is_grad_enabled()
    try:
        with _outside_inference_mode():
            state = ModuleState({id(module): module for model in models for module in model.modules()}.values())
            try:
                for model in models:
                    protect_merges(model)
                    _leave_unpacked(model)
                    model.eval()
                _without_inference_tensors(models)
                yield
            finally:
                for stream in streams:
                    stream.rest()
                state.give_back()
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(gradients)


def _leave_unpacked(model: nn.Module) -> None:
    """Let bitsandbytes not pack 4-bit weights, as it does on some CPUs (AVX-512 with bf16) at a first forward in eval mode: for
    good, and training has no gradients through packed ones."""
    for module in model.modules():
        if getattr(module, _PACKS, False):
            setattr(module, _PACKS, False)  # an attribute like others, given back with them


_PACKS = "support_avx512bf16_for_cpu"


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode turns gradients on, which nobody asked for.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _without_inference_tensors(models: tuple[nn.Module, ...]) -> None:
    """Parameters and buffers that were made in inference mode, which autograd refuses, are replaced by ordinary tensors over
    the same memory."""
    ordinary: dict[int, torch.Tensor] = {}
    for model in models:
        for module in model.modules():
            places: list[dict[str, torch.Tensor | None]] = [module._parameters, module._buffers]  # type: ignore[list-item]
            for place in places:
                for name, tensor in place.items():
                    if tensor is None or not tensor.is_inference() or tensor.is_meta:
                        continue
                    if id(tensor) not in ordinary:
                        seen = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                            tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
                        )
                        parameter = isinstance(tensor, nn.Parameter)
                        ordinary[id(tensor)] = nn.Parameter(seen, tensor.requires_grad) if parameter else seen
                    place[name] = ordinary[id(tensor)]
