"""A hash of a model's weights, cheap on any device: it tells whether weights moved, between steps or processes."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from align_audit.models.streaming import stored_parameters

_CHUNK = 2**20
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed 64-bit integer


def fingerprint(model: nn.Module, *, without_adapters: tuple[str, ...] = ()) -> str:
    """16 hexadecimal digits that depend on every bit of every parameter, its name, shape and dtype.

    Integer sums (plain and position-weighted, modulo 2⁶⁴) are taken where the weights live and only those are hashed,
    so nothing is copied and the result does not depend on the device or the order of summation. What a streamed model
    has left on disk is read one parameter at a time: it has the hash that it would have if it were loaded.

    Args:
        without_adapters: names of PEFT adapters whose parameters do not count.
    """
    digest = hashlib.blake2b(digest_size=8)
    stored = stored_parameters(model)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if _belongs_to(model, name, without_adapters):
            continue
        plain, weighted = _sums(stored[name]() if name in stored else parameter.detach())
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|{plain}|{weighted};".encode())
    return digest.hexdigest()


def _belongs_to(model: nn.Module, name: str, adapters: tuple[str, ...]) -> bool:
    """Whether the parameter is one of these adapters': PEFT keeps them in dictionaries under the adapter's name."""
    parts = name.split(".")
    return any(
        part in adapters and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleDict | nn.ParameterDict)
        for i, part in enumerate(parts)
    )


def _sums(tensor: torch.Tensor) -> tuple[int, int]:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.contiguous().view(-1).view(width)
    plain = weighted = 0
    for first in range(0, flat.numel(), _CHUNK):
        part = flat[first : first + _CHUNK].to(torch.int64)
        # Low bits matter in every product below, high ones only where the place is odd; so high bits are folded down.
        part = part ^ (part >> 32)
        place = torch.arange(first + 1, first + 1 + part.numel(), device=part.device, dtype=torch.int64)
        plain += int(part.sum())
        weighted += int((part * (place * _MULTIPLIER)).sum())
    return plain % 2**64, weighted % 2**64
