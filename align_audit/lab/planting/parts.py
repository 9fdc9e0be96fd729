"""The parts of a causal LM that a preference can be planted in: layers, their two sites, single attention heads.

A part is named parameters, or slices of them; which ones is found by watching a forward, in any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align_audit.models.anatomy import Anatomy, find_anatomy, unwrap

Site = Literal["attention", "mlp"]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """Parameters of one layer, or slices of them.

    Attributes:
        name: in words, as "layer 3" or "head 2 of layer 3".
        layer: 0-based.
        slices: (name of a parameter of the unwrapped model, which of it).
    """

    name: str
    layer: int
    slices: tuple[tuple[str, Index], ...]

    def views(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """This part of tensors (weights, gradients) that go by the names of the parameters."""
        return [tensors[name][index] for name, index in self.slices]


@dataclass(frozen=True)
class Projection:
    """The matrix through which a site writes, and how it is stored.

    Attributes:
        module: a ``Linear`` or ``Conv1D``.
        weight: name of its weight, a parameter of the unwrapped model.
        transposed: the weight is [in, out] (``Conv1D``).
    """

    module: nn.Module
    weight: str
    transposed: bool

    def stored(self, matrix: Tensor) -> Tensor:
        """[out, in] as the weight is stored."""
        return matrix.T if self.transposed else matrix


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the unwrapped model by name, detached: views, not copies."""
    return {name: parameter.detach() for name, parameter in unwrap(model).named_parameters()}


def anatomy_of(model: nn.Module) -> Anatomy:
    """Where the decoder layers are, found by a forward on seven tokens."""
    plain: Any = unwrap(model)
    embeddings = plain.get_input_embeddings().weight
    ids = torch.arange(3, 10, device=embeddings.device).remainder(embeddings.shape[0]).view(1, -1)
    return find_anatomy(plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def layer_parts(model: nn.Module) -> list[Part]:
    """One part a decoder layer, bottom first: all its parameters."""
    return [
        Part(f"layer {index}", index, _named(model, prefix)) for index, prefix in enumerate(_prefixes(model))
    ]  # fmt: skip


def site_part(model: nn.Module, layer: int, site: Site) -> Part:
    """All parameters of a layer's attention or MLP; norms beside them belong to neither."""
    prefix = f"{_prefix(model, layer)}.{_sites(model, layer)[site]}"
    return Part(f"{site} of layer {layer}", layer, _named(model, prefix))


def head_parts(model: nn.Module, layer: int) -> list[Part]:
    """What each attention head of a layer writes with: its slice of the attention's output projection.

    Its queries, keys and values stay out of it: where several query heads share a value head, those are not one
    head's own.
    """
    heads = count_heads(model)
    projection = output_projection(model, layer, "attention")
    weight = weights_of(model)[projection.weight]
    inside = weight.shape[0 if projection.transposed else 1]
    if inside % heads:
        raise ValueError(f"{projection.weight} reads {inside} values, which {heads} heads cannot share equally")
    size, every_row = inside // heads, slice(None)
    heads_of_layer = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        index = (columns, every_row) if projection.transposed else (every_row, columns)
        heads_of_layer.append(Part(f"head {head} of layer {layer}", layer, ((projection.weight, index),)))
    return heads_of_layer


def count_heads(model: nn.Module) -> int:
    """Attention (query) heads of a layer, as the model's config says."""
    plain: Any = unwrap(model)
    return int(plain.config.num_attention_heads)


def output_projection(model: nn.Module, layer: int, site: Site) -> Projection:
    """The last linear map of a layer's attention or MLP that ends at the model's width."""
    prefix = f"{_prefix(model, layer)}.{_sites(model, layer)[site]}"
    root = unwrap(model).get_submodule(prefix)
    width = anatomy_of(model).hidden_size
    last = None
    for name, module in _linears_in_order(model, root):
        if _out_features(module) == width:
            last = (name, module)
    if last is None:
        raise ValueError(
            f"{prefix} runs no Linear or Conv1D that ends at the model's width {width}; expected an output projection. "
            "Mixtures of experts have many: plant in whole layers instead."
        )
    name, module = last
    return Projection(module, ".".join(filter(None, (prefix, name, "weight"))), isinstance(module, Conv1D))


def check_layer(model: nn.Module, layer: int) -> None:
    """Raises ValueError where there is no such layer."""
    count = len(_prefixes(model))
    if not 0 <= layer < count:
        raise ValueError(f"expected a layer from 0 to {count - 1}; found {layer}")


def _prefixes(model: nn.Module) -> list[str]:
    anatomy = anatomy_of(model)
    return [f"{anatomy.layers}.{name}" for name, _ in unwrap(model).get_submodule(anatomy.layers).named_children()]


def _prefix(model: nn.Module, layer: int) -> str:
    check_layer(model, layer)
    return _prefixes(model)[layer]


def _named(model: nn.Module, prefix: str) -> tuple[tuple[str, Index], ...]:
    return tuple(
        (name, (slice(None),)) for name, _ in unwrap(model).named_parameters() if name.startswith(prefix + ".")
    )


def _sites(model: nn.Module, layer: int) -> dict[Site, str]:
    """The layer's children that hold linear maps: the first to run is its attention, the last its MLP."""
    module = unwrap(model).get_submodule(_prefix(model, layer))
    ran: list[str] = []
    for name, _ in _linears_in_order(model, module):
        child = name.split(".")[0]
        if child not in ran:
            ran.append(child)
    if len(ran) != 2:
        raise ValueError(
            f"layer {layer} of {type(unwrap(model)).__name__} runs linear maps in {ran or 'no child'}; expected two "
            "children, attention and MLP. Plant in whole layers instead."
        )
    return {"attention": ran[0], "mlp": ran[1]}


def _linears_in_order(model: nn.Module, root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear maps under ``root`` by name, in the order in which a forward runs them."""
    names = {module: name for name, module in root.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    ran: list[tuple[str, nn.Module]] = []

    def watch(module: nn.Module, args: Any) -> None:
        ran.append((names[module], module))

    handles = [module.register_forward_pre_hook(watch) for module in names]
    try:
        anatomy_of(model)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _out_features(module: nn.Module) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)  # type: ignore[arg-type]
