"""A hash of a model's weights, cheap on any device: it tells whether weights moved, between steps or processes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from align_audit.models.anatomy import unwrap_only
from align_audit.models.weights.sharded import has_engine, is_spread, part_of, reshard, whole_shape, whole_tensors
from align_audit.models.weights.streaming import stored_tensors
from align_audit.ranks import Ranks

_ROWS, _COLUMNS = 64, 1024
"""Of one block: as 64-bit integers it stays in a core's cache."""
_BLOCKS = {"cpu": 4}
_BLOCKS_ELSEWHERE = 64
"""Blocks taken at once, by device type."""
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed 64-bit integer
_PLACE = 2**20
"""Where processes meet to add up what they have summed."""
_MIXER = 0xBF58476D1CE4E5B9 - 2**64


def fingerprint(model: nn.Module, *, without_adapters: tuple[str, ...] = (), ranks: Ranks | None = None) -> str:
    """16 hexadecimal digits that depend on every bit of every parameter, its name, shape and dtype.

    Integer sums (plain and position-weighted, modulo 2⁶⁴) are taken where the weights live and only those are hashed,
    so nothing is copied and the result does not depend on the device or the order of summation. What a streamed model
    has left on disk is read one parameter at a time: it has the hash that it would have if it were loaded. Of weights that
    are spread over processes each sums its part, at the places that it has in the whole, and the sums are added up: all of
    them have the hash of the whole model, and gather no weights.

    Args:
        without_adapters: names of PEFT adapters whose parameters do not count.
        ranks: the processes that weights are spread over; they all call this together.

    Raises:
        Agreed: another process cannot go on.
    """
    return WeightSums(model, ranks).hash(without_adapters)


class WeightSums:
    """What hashes take of a model's weights. A weight is read for the first hash that counts it, and for no other.

    It is for hashes that are taken one after the other, while nothing writes to the weights. They are those of the model inside
    of compile and data-parallel wrappers, whose weights have other names.

    Args:
        ranks: as of :func:`fingerprint`.
    """

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self.model = unwrap_only(model)
        self._ranks = ranks if ranks is not None else Ranks()
        self._read: dict[str, Sums] = {}

    def hash(self, without_adapters: tuple[str, ...] = ()) -> str:
        """The :func:`fingerprint` (arguments and errors as there)."""
        reshard(self.model)
        weights = tensors(self.model, without_adapters=without_adapters)
        unread = {name: weight for name, weight in weights.items() if name not in self._read}
        if has_engine(self.model):
            self._read |= _summed_together(unread, self._ranks)
        else:
            self._read |= {name: summed(weight()) for name, weight in unread.items()}
        return hash_of((name, self._read[name]) for name in weights)


def _summed_together(weights: dict[str, Callable[[], torch.Tensor]], ranks: Ranks) -> dict[str, Sums]:
    """:func:`summed` of weights that may be spread; all parts' sums are added up at once."""
    sums: dict[str, Sums] = {}
    shared: dict[Any, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    for name, weight in weights.items():
        tensor = weight()
        part = part_of(tensor) if is_spread(tensor) else None
        if part is not None:
            of_part = torch.tensor([_signed(each) for each in bit_sums(part.values, part.offset)])
            shared.setdefault(part.group, []).append((name, tensor, of_part.to(part.values.device)))
        elif is_spread(tensor):
            ranks.check(_PLACE)
            sums[name] = summed(*whole_tensors([tensor], [tensor.dtype]))
        else:
            sums[name] = summed(tensor)
    for group, parts in shared.items():
        total = torch.stack([of_part for _, _, of_part in parts])
        ranks.check(_PLACE)
        torch.distributed.all_reduce(total, group=group)  # wraps around, as sums modulo 2⁶⁴ do
        for (name, tensor, _), (plain, weighted) in zip(parts, total.tolist(), strict=True):
            sums[name] = tuple(whole_shape(tensor)), tensor.dtype, (plain % 2**64, weighted % 2**64)
    return sums


def _signed(value: int) -> int:
    """The same bits as a signed 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


def tensors(model: nn.Module, *, without_adapters: tuple[str, ...] = ()) -> dict[str, Callable[[], torch.Tensor]]:
    """Name of each parameter → gives its values, read from disk where a streamed model has left them there.

    Of a parameter that is spread it is the parameter itself, which knows where the rest is.
    """
    stored = stored_tensors(model)
    return {
        name: stored.get(name, functools.partial(_values, parameter))
        for name, parameter in model.named_parameters()
        if not belongs_to(model, name, without_adapters)
    }


def _values(parameter: torch.Tensor) -> torch.Tensor:
    return parameter if is_spread(parameter) else parameter.detach()


Sums = tuple[tuple[int, ...], torch.dtype, tuple[int, int]]
"""What a hash takes of a weight: its shape, its dtype, its :func:`bit_sums`."""


def summed(weight: torch.Tensor) -> Sums:
    """What a hash takes of a weight; of a quantized one that wraps several tensors (values, scales), of each of them."""
    if not is_traceable_wrapper_subclass(weight):
        return tuple(weight.shape), weight.dtype, bit_sums(weight)
    plain = weighted = 0
    for place, name in enumerate(weight.__tensor_flatten__()[0]):
        *_, (plain_part, weighted_part) = summed(getattr(weight, name))
        plain += plain_part * (2 * place + 1)
        weighted += weighted_part * (2 * place + 1)
    return tuple(weight.shape), weight.dtype, (plain % 2**64, weighted % 2**64)


def hash_of(weights: Iterable[tuple[str, Sums]]) -> str:
    """The hash of weights by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, (shape, dtype, (plain, weighted)) in sorted(weights, key=lambda weight: weight[0]):
        digest.update(f"{name}|{shape}|{dtype}|{plain}|{weighted};".encode())
    return digest.hexdigest()


def belongs_to(model: nn.Module, name: str, adapters: tuple[str, ...]) -> bool:
    """Whether the parameter is one of these adapters': PEFT keeps them in dictionaries under the adapter's name."""
    parts = name.split(".")
    return any(
        part in adapters and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleDict | nn.ParameterDict)
        for i, part in enumerate(parts)
    )


def bit_sums(tensor: torch.Tensor, offset: int = 0) -> tuple[int, int]:
    """Plain and position-weighted sums of the weights' bits as integers, modulo 2⁶⁴.

    Weights are taken in blocks of rows and columns. Within a block a weight counts times a multiplier of its row and one of its
    column, Σ w · r · c: were rows and columns weighted apart, what has equal sums along both (+d, −d over −d, +d) would cancel.

    Args:
        offset: how many values of the whole tensor stand before these; the sums of consecutive parts add up to the whole's.
    """
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[tensor.element_size()]
    flat = tensor.contiguous().view(-1).view(width)
    block = _ROWS * _COLUMNS
    skipped, inside = divmod(offset * tensor.element_size() // width.itemsize, block)
    if inside:
        flat = torch.cat([flat.new_zeros(inside), flat])
    step = block * _BLOCKS.get(tensor.device.type, _BLOCKS_ELSEWHERE)
    by_row, by_column, by_block = _multipliers(flat.device)
    plain, weighted = [], []
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step].to(torch.int64)
        rows = min(_ROWS, -(-part.numel() // _COLUMNS))  # of a small tensor those that it has: the others hold nothing
        if part.numel() % (rows * _COLUMNS):
            part = torch.cat([part, part.new_zeros(-part.numel() % (rows * _COLUMNS))])
        part = part.view(-1, rows, _COLUMNS)
        plain.append(part.sum((1, 2)))
        weighted.append(((part * by_row[:rows]).sum(1) * by_column).sum(1))
    if not plain:
        return 0, 0
    blocks = torch.cat(weighted)
    of_blocks = by_block[skipped : skipped + len(blocks)]
    if len(of_blocks) < len(blocks):
        of_blocks = _weights(torch.arange(len(blocks), device=flat.device) + (2**40 + skipped))
    return int(torch.cat(plain).sum()) % 2**64, int((blocks * of_blocks).sum()) % 2**64


@functools.cache
def _multipliers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the rows [R, 1] and the columns [C] of a block, and of the first blocks."""
    with torch.inference_mode(False):  # they are kept, and others may take gradients where they are used
        by_row = _weights(torch.arange(_ROWS, device=device))[:, None]
        by_column = _weights(torch.arange(_COLUMNS, device=device) + 2**20)
        return by_row, by_column, _weights(torch.arange(_BLOCKS_ELSEWHERE, device=device) + 2**40)


def _weights(places: torch.Tensor) -> torch.Tensor:
    """An odd 64-bit multiplier for each place, with its bits well mixed (one round of SplitMix64's finalizer)."""
    mixed = (places + 1) * _MULTIPLIER
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * _MIXER
    return mixed | 1
