"""Observation is inert: whatever an audit does to a model or to random state is undone when it ends."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from align_audit.models.anatomy import is_peft
from align_audit.models.weights.streaming import stream_of


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Run the models in eval mode and give everything back as it was, also when the body raises.

    Restored: train/eval mode of every module, ``requires_grad`` of every parameter (switching PEFT adapters sets it),
    the active adapters, and the random state of Python, NumPy, torch and every CUDA device.
    """
    for model in models:
        if (stream := stream_of(model)) is not None:
            stream.rest()  # the flags kept below would keep the layer that is held now, beside the two that come
    modes = [(module, module.training) for model in models for module in model.modules()]
    wrapped: list[Any] = [module for model in models for module in model.modules() if is_peft(module)]
    adapters = [(peft, peft.active_adapter, list(peft.active_adapters)) for peft in wrapped]
    trainable = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for peft, named, active in adapters:
            if list(peft.active_adapters) != active:
                peft.base_model.set_adapter(active)
            peft.active_adapter = named
        for parameter, flag in trainable:
            parameter.requires_grad = flag
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
