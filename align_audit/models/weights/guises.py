"""One set of weights has several hashes: under PEFT's names or plain ones, in the dtype it was stored in or a wider one.

:func:`~align_audit.models.weights.fingerprint.fingerprint` depends on names and dtypes on purpose. Whether weights are those
of a hash that was taken elsewhere, where they were named or stored otherwise, is found out here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from align_audit.models.anatomy import is_peft
from align_audit.models.weights.fingerprint import belongs_to, hash_of, summed, tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Weights = Mapping[str, Callable[[], torch.Tensor]]
"""Name → gives the tensor."""


def reference_is(recorded: Collection[str], reference: nn.Module, policy: nn.Module, *, shares_weights: bool) -> bool:
    """Whether the reference's weights are those of one of the recorded hashes, under whatever names and in whatever dtype.

    Args:
        shares_weights: the reference is the policy with its adapters off.
    """
    if shares_weights:
        weights = _without_adapters(reference)
        names = [dict(zip(weights, map(plain_name, weights), strict=True))]
    else:
        weights = tensors(reference)
        names = []
        if is_peft(policy) and not is_peft(reference):
            # As the hash names them where a run compared an adapter with its own base.
            wrapped = {plain_name(name): name for name in _without_adapters(policy)}
            if set(weights) <= set(wrapped):
                names = [{name: wrapped[name] for name in weights}]
    identity = {name: name for name in weights}
    return any(hashed in recorded for hashed in _hashes(weights, [identity, *names], [set(weights)]))


def policy_is(recorded: Collection[str], policy: nn.Module) -> bool:
    """Whether the policy's weights are those of one of the recorded hashes, in whatever dtype it, or its base, was in then."""
    inactive: tuple[str, ...] = ()
    bases = []
    weights = tensors(policy)
    if is_peft(policy):
        model: Any = policy
        inactive = tuple(sorted(set(model.peft_config) - set(model.active_adapters)))
        weights = tensors(policy, without_adapters=inactive)
        bases = [set(_without_adapters(policy))]
    identity = {name: name for name in weights}
    return any(hashed in recorded for hashed in _hashes(weights, [identity], [set(weights), *bases]))


def plain_name(name: str) -> str:
    """What a weight of a PEFT model's base is called in the base itself.

    Example:
        >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    name = name.removeprefix("base_model.model.").replace(".token_adapter.base_layer.", ".")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _without_adapters(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    adapters = tuple(sorted(model.peft_config))
    return {name: weight for name, weight in tensors(model).items() if not belongs_to(model, name, adapters)}


def _hashes(weights: Weights, names: list[dict[str, str]], parts: list[set[str]]) -> Iterator[str]:
    """The hashes under each naming, as stored and with each part in each dtype. A weight is read once for each dtype."""
    stored = {name: summed(weight()) for name, weight in weights.items()}
    yield from (hash_of((naming[name], stored[name]) for name in weights) for naming in names)
    for dtype in _DTYPES:
        cast = {
            name: summed(weight().to(dtype)) if stored[name][1].is_floating_point else stored[name]
            for name, weight in weights.items()
        }
        for part in parts:
            mixed = {name: cast[name] if name in part else stored[name] for name in weights}
            yield from (hash_of((naming[name], mixed[name]) for name in weights) for naming in names)
