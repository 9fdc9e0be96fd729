"""Where a causal language model keeps its decoder layers, found by watching one forward, not by its class.

No architecture is named here. The decoder layers are the longest ``ModuleList`` whose members run one after the other,
each taking the residual stream that the one before returned. Everything else the engine needs (masks, rotary
embeddings, the norm and head) it gets by calling the model itself; see ``replay``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from align_audit.errors import AnatomyError


@dataclass(frozen=True)
class Anatomy:
    """Where the residual stream passes. Pass one by hand where it cannot be found.

    Args:
        layers: dotted path, within the causal LM, of the ``ModuleList`` of decoder layers, as ``"model.layers"``.
        stream_argument: how a layer gets the residual stream: its position, or its keyword.
        output_index: None when a layer returns the stream itself, else where in the returned tuple it stands.

    Example:
        >>> Anatomy("model.layers").layers
        'model.layers'
    """

    layers: str
    stream_argument: int | str = 0
    output_index: int | None = None
    num_layers: int = 0
    hidden_size: int = 0
    vocab_size: int = 0

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, bottom first."""
        try:
            layers = model.get_submodule(self.layers)
        except AttributeError:
            raise AnatomyError(
                f"the model has no submodule {self.layers!r} to hold its decoder layers.\n{describe(model)}"
            ) from None
        return list(layers.children())

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The residual stream among a layer's arguments."""
        place = self.stream_argument
        value = args[place] if isinstance(place, int) else kwargs[place]
        assert isinstance(value, torch.Tensor)
        return value

    def put(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], stream: torch.Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another residual stream (None: a hole, so that a recording does not keep it)."""
        if isinstance(self.stream_argument, int):
            changed = list(args)
            changed[self.stream_argument] = stream
            return tuple(changed), kwargs
        return args, {**kwargs, self.stream_argument: stream}

    def stream(self, output: Any) -> torch.Tensor:
        """The residual stream in what a layer returned."""
        value = output if self.output_index is None else output[self.output_index]
        assert isinstance(value, torch.Tensor)
        return value

    def wrap(self, output: Any, stream: torch.Tensor) -> Any:
        """What a layer returned, with another residual stream in it."""
        if self.output_index is None:
            return stream
        changed = list(output)
        changed[self.output_index] = stream
        return tuple(changed)


def out_of_engine(model: nn.Module) -> nn.Module:
    """The model that a ``DeepSpeedEngine`` runs; any other one as it is. Where DeepSpeed is not in use, it is not imported."""
    engine = sys.modules.get("deepspeed.runtime.engine")
    while engine is not None and isinstance(model, engine.DeepSpeedEngine):
        model = model.module
    return model


def unwrap_only(model: nn.Module) -> nn.Module:
    """Out of data-parallel and compile wrappers and out of DeepSpeed's engine; a PEFT model stays one."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod") and isinstance(model._orig_mod, nn.Module):
            model = model._orig_mod
        elif (inside := out_of_engine(model)) is not model:
            model = inside
        else:
            return model


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM itself: out of all wrappers and out of PEFT, whose layers stay in place."""
    model = unwrap_only(model)
    if is_peft(model):
        configs: Any = model.peft_config
        if any(config.is_prompt_learning for config in configs.values()):
            kinds = sorted({str(config.peft_type) for config in configs.values()})
            raise AnatomyError(
                f"the policy uses prompt learning ({', '.join(kinds)}): its learned tokens are no layer's activations, "
                "so policy and reference streams have different lengths and cannot be patched into each other. "
                "Expected full fine-tuning or an adapter inside the layers, such as LoRA."
            )
        model = model.get_base_model()  # type: ignore[operator]
    return model


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a PEFT wrapper. peft is only imported when something may be one."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def check_kind(model: nn.Module) -> None:
    """Refuse at once what no forward needs to be run for."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise AnatomyError(
            f"{type(model).__name__} is an encoder-decoder; expected a decoder-only causal language model"
        )
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise AnatomyError(
            f"{type(model).__name__} is not a transformers model; expected a causal language model, loaded for "
            "instance with AutoModelForCausalLM"
        )


@dataclass
class _Call:
    """What a module was given and returned; residual streams as copies, since layers may write into theirs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def find_anatomy(model: nn.Module, inputs: dict[str, torch.Tensor], given: Anatomy | None = None) -> Anatomy:
    """Watch one forward of ``model`` (already unwrapped) on ``inputs`` and say where its residual stream passes.

    Args:
        inputs: at least ``input_ids`` and ``attention_mask``, a few tokens.
        given: a hand-made description; only its open parts (sizes, and defaults that do not fit) are then found out.

    Raises:
        AnatomyError: not a causal LM, or no such chain of layers; the message shows the module tree.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    if given is not None:
        container = given.modules(model)
        lists = {given.layers: nn.ModuleList(container)}
    calls: dict[nn.Module, list[_Call]] = {}

    def on_entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()})
        calls.setdefault(module, []).append(call)

    def on_exit(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module][-1].output = tuple(map(_copied, output)) if isinstance(output, tuple | list) else _copied(output)

    handles = []
    for members in lists.values():
        for member in members:
            handles.append(member.register_forward_pre_hook(on_entry, with_kwargs=True))
            handles.append(member.register_forward_hook(on_exit))
    try:
        with torch.no_grad():
            logits = getattr(model(**inputs, use_cache=False), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[:2] != inputs["input_ids"].shape:
        raise AnatomyError(
            f"{type(model).__name__} returned no next-token logits of shape [batch, tokens, vocabulary]; expected a "
            "causal language model, loaded for instance with AutoModelForCausalLM"
        )

    candidates: list[tuple[bool, int, Anatomy]] = []
    for name, members in lists.items():
        for changes, joints, anatomy in _chains(list(members), calls, given):
            candidates.append((changes, joints, replace(anatomy, layers=name)))
    if not candidates:
        looked = f"the ModuleList {given.layers!r}" if given is not None else f"{len(lists)} module lists"
        raise AnatomyError(
            f"could not establish the decoder layers of {type(model).__name__}: looked at {looked} for "
            "members that run once each, in order, every one taking the tensor [batch, tokens, width] that the one "
            "before returned.\n"
            f"{describe(model)}\n"
            'Describe the model by hand with `Anatomy(layers="path.to.module_list", stream_argument=..., '
            "output_index=...)`."
        )
    # A list of norms may be longer than the list of layers, but no norm receives what the one before it returned.
    *_, best = max(candidates, key=lambda item: (*item[:2], item[2].num_layers))
    return replace(best, vocab_size=int(logits.shape[-1]))


def _chains(
    members: list[nn.Module], calls: dict[nn.Module, list[_Call]], given: Anatomy | None
) -> Iterator[tuple[bool, int, Anatomy]]:
    """Every way in which ``members`` may pass a residual stream along, likelier ones first.

    With each: whether they change the tensor at all, and the number of joints, where a member received just what the
    one before returned.
    """
    if any(len(calls.get(member, [])) != 1 for member in members):
        return
    run = [calls[member][0] for member in members]
    first = run[0]
    positions: list[int | str] = [i for i, value in enumerate(first.args) if _is_stream(value)]
    names: list[int | str] = [key for key, value in first.kwargs.items() if _is_stream(value)]
    # By convention the stream comes first; ``hidden_states`` where a layer is called by keyword.
    places = sorted(positions + names, key=lambda place: place != "hidden_states")
    indices: list[int | None] = [None]
    if isinstance(first.output, tuple):
        indices = [i for i, value in enumerate(first.output) if _is_stream(value)]
    if given is not None:
        # The defaults leave open what they do not fit.
        if given.stream_argument != 0 or 0 in places:
            places = [given.stream_argument]
        if given.output_index is not None:
            indices = [given.output_index]
    for place in places:
        for index in indices:
            anatomy = Anatomy("", place, index, len(members))
            try:
                entering = [anatomy.take(call.args, call.kwargs) for call in run]
                leaving = [anatomy.stream(call.output) for call in run]
            except (AssertionError, IndexError, KeyError, TypeError):
                continue
            if not _is_stream(leaving[0]) or len({value.shape for value in entering + leaving}) > 1:
                continue
            joints = sum(map(_equal, leaving, entering[1:]))
            yield not _equal(entering[0], leaving[-1]), joints, replace(anatomy, hidden_size=int(leaving[-1].shape[-1]))


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()


def _copied(value: Any) -> Any:
    return value.detach().clone() if _is_stream(value) else value


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def describe(model: nn.Module, depth: int = 3) -> str:
    """The module tree to ``depth`` levels, one line a module; equal neighbours are folded."""
    lines = [f"Module tree of {type(model).__name__}:"]

    def walk(module: nn.Module, prefix: str, level: int) -> None:
        children = list(module.named_children())
        position = 0
        while position < len(children):
            name, child = children[position]
            last = position
            while last + 1 < len(children) and type(children[last + 1][1]) is type(child) and name.isdigit():
                last += 1
            label = name if last == position else f"{name}..{children[last][0]}"
            lines.append(f"{prefix}{label}: {type(child).__name__}")
            if level < depth:
                walk(child, prefix + "  ", level + 1)
            position = last + 1

    walk(model, "  ", 1)
    return "\n".join(lines)
