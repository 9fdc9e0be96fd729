"""Are a model's weights spread over processes, by which engine, and what of them is here?

The one place that knows engines. What is DeepSpeed's own is in :mod:`align_audit.models.weights.zero3`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from align_audit.errors import ConfigurationError
from align_audit.models.weights import zero3

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

FSDP2 = "FSDP2"
_ENGINES_HOOKS = ("torch.distributed.fsdp.", zero3.PACKAGE)
"""Where the functions come from that an engine hooks to modules."""


def _loaded(module: str) -> Any:
    """A module of torch where it is in use. Nobody has made anything of one that was never imported."""
    return sys.modules.get(module)


def how_sharded(model: nn.Module) -> str | None:
    """Which engine keeps parts of the model's weights on other processes; None where they are whole here."""
    fsdp, tensor = _loaded("torch.distributed.fsdp"), _loaded("torch.distributed.tensor")
    engine = None
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            engine = FSDP2
        elif isinstance(module, fsdp.FullyShardedDataParallel):
            return "FSDP1"
    for parameter in model.parameters():
        if zero3.is_partitioned(parameter):
            return zero3.NAME
        if tensor is not None and isinstance(parameter, tensor.DTensor) and (engine is None or _shards(parameter) > 1):
            return "tensor parallelism"
        if hasattr(parameter, "_is_flat_param"):
            return "FSDP1"
    return engine


def _shards(parameter: Any) -> int:
    """Along how many dimensions of its mesh a parameter is cut."""
    return sum(not placement.is_replicate() for placement in parameter.placements)


def _is_offloaded(parameter: Any) -> bool:
    """Whether a parameter of FSDP2's lies elsewhere than it computes."""
    return _is_dtensor(parameter) and parameter.to_local().device.type != parameter.device_mesh.device_type


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse a model whose layers cannot be brought together.

    No model whose weights are spread must even be called here: FSDP2 takes the first module that runs for the root of the
    model, and training's own first forward breaks.

    Args:
        what: which model it is, for the message.

    Raises:
        ConfigurationError: it is sharded in a way that is not supported.
    """
    engine = how_sharded(model)
    if engine == FSDP2 and any(map(_is_offloaded, model.parameters())):
        engine = "FSDP2 with its parameters offloaded to the CPU"
    if engine == zero3.NAME and (setting := zero3.unsupported(model.parameters())):
        engine = f"{zero3.NAME} {setting}"
    if engine not in (None, FSDP2, zero3.NAME):
        raise ConfigurationError(
            f"the weights of {what} are spread over processes ({engine}), and an audit runs a model layer by layer, each layer "
            "whole. Expected one process, DDP, FSDP2 (without offloading), DeepSpeed ZeRO-1, ZeRO-2 or ZeRO-3 (without "
            "offloading of parameters, and without ZeRO++). Train with one of these, or without this callback, and audit the "
            "saved checkpoints afterwards (`align-audit run`)"
        )


def is_spread(parameter: torch.Tensor) -> bool:
    """Whether only a part of the parameter is on this process."""
    return zero3.is_partitioned(parameter) or _is_dtensor(parameter)


def _is_dtensor(parameter: torch.Tensor) -> bool:
    tensor = _loaded("torch.distributed.tensor")
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def _engine_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 has taken over."""
    fsdp = _loaded("torch.distributed.fsdp")
    if fsdp is None or not fsdp.FSDPModule.__subclasses__():  # each module that it takes over gets a class of its own
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def has_engine(model: nn.Module) -> bool:
    """Whether an engine keeps the model's weights in shards, and brings them together to compute."""
    return bool(_engine_modules(model)) or any(map(zero3.is_partitioned, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let the engine, where the model has one, put parameters that it still holds whole back to their shards.

    After an evaluation FSDP2 keeps what ran last whole, in the dtype that it computes in: until its next forward no
    parameter of the optimizer's stands there. DeepSpeed's parameters stay the same objects, and have their shards beside them.
    """
    for module in _engine_modules(model):
        module.reshard()


def plain_class(module: nn.Module) -> type:
    """A module's class as it was before an engine made a class of its own of it."""
    fsdp = _loaded("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return type(module)
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp.FSDPModule))


# -- what is here of a parameter ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What this process holds of a parameter.

    Attributes:
        values: consecutive values of the flattened parameter.
        offset: how many stand before them.
        length: how many each process holds, where all but the last ones hold as many.
        group: the processes that hold the rest; no two of them the same.
    """

    values: torch.Tensor
    offset: int
    length: int
    group: Any


def whole_shape(parameter: Any) -> torch.Size:
    """Of a parameter that may be spread."""
    return torch.Size(parameter.ds_shape if zero3.is_partitioned(parameter) else parameter.shape)


def whole_size(parameter: torch.Tensor) -> int:
    """How many values a parameter has that may be spread."""
    return whole_shape(parameter).numel()


def part_of(parameter: Any) -> Part | None:
    """Of a spread parameter; None where it is not cut along its first dimension, so that what is here is not consecutive."""
    if zero3.is_partitioned(parameter):
        return Part(*zero3.piece_of(parameter))
    cuts = [(axis, placement) for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(cuts) != 1 or not cuts[0][1].is_shard(0):
        return None
    axis = cuts[0][0]
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    # As torch.chunk cuts: equal parts, of which the last ones may be shorter, or empty.
    most = -(-rows // mesh.size(axis))
    first = min(rows, most * mesh.get_local_rank(axis))
    width = parameter.numel() // max(rows, 1)
    return Part(parameter.detach().to_local(), first * width, most * width, mesh.get_group(axis))


def whole_tensors(
    parameters: Sequence[Any], dtypes: Sequence[torch.dtype], ready: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """All values of spread parameters, each in memory of its own, in the dtype that is asked for.

    All processes that hold a part call this together; what each holds is cast first, and goes to the others in one piece.

    Args:
        ready: is called when this process has made room for all of it, and before it waits for another one: memory that runs
            out in between would leave the others waiting.
    """
    gathered: list[torch.Tensor | None] = [None] * len(parameters)
    pieces: dict[Any, list[tuple[int, torch.Tensor]]] = {}
    not_consecutive: list[tuple[int, Any]] = []
    for place, (parameter, dtype) in enumerate(zip(parameters, dtypes, strict=True)):
        part = part_of(parameter)
        if part is None:
            not_consecutive.append((place, parameter))
            continue
        values = part.values.reshape(-1).to(dtype)
        # The last parts may be shorter, which all of them have to be as long as: what is appended lies at the very end.
        values = torch.cat([values, values.new_zeros(part.length - len(values))])
        pieces.setdefault((part.group, dtype), []).append((place, values))
    gathers = []
    for (group, _), parts in pieces.items():
        here = torch.cat([values for _, values in parts])
        for place, values in parts:
            gathered[place] = values.new_empty(whole_shape(parameters[place]))
        lengths = [(place, len(values)) for place, values in parts]
        gathers.append((group, here, here.new_empty(group.size(), len(here)), lengths))
    pieces.clear()
    ready()
    for place, parameter in not_consecutive:
        with torch.no_grad():
            gathered[place] = parameter.detach().full_tensor().to(dtypes[place])
    for group, here, everywhere, lengths in gathers:
        torch.distributed.all_gather(list(everywhere.unbind()), here, group=group)
        first = 0
        for place, length in lengths:
            room = gathered[place]
            assert room is not None
            for process, values in enumerate(room.view(-1).split(length)):
                values.copy_(everywhere[process, first : first + len(values)])
            first += length
    return [values for values in gathered if values is not None]


# -- what the engine does around modules -------------------------------------------------------------------------------


def compute_dtypes(model: nn.Module) -> dict[nn.Module, torch.dtype | None]:
    """By module: the dtype that the engine computes its own parameters in; None: the one that they are stored in."""
    dtypes: dict[nn.Module, torch.dtype | None] = {}

    def visit(module: nn.Module, dtype: torch.dtype | None) -> None:
        policy = _precision(module)
        dtypes[module] = dtype = dtype if policy is None else policy.param_dtype
        for child in module.children():
            visit(child, dtype)

    visit(model, None)
    return dtypes


def _precision(module: nn.Module) -> MixedPrecisionPolicy | None:
    """The engine's own words on a module that it cares for."""
    fsdp = _loaded("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return None
    policy: MixedPrecisionPolicy = module._get_fsdp_state()._mp_policy
    return policy


def without_engine(model: nn.Module) -> Callable[[], None]:
    """Take the engine's hooks out of all modules, but for what they do to the dtypes of inputs and outputs, and methods that it
    has made forwards of (``generate``, by ``register_fsdp_forward_method``): the engine would take what is gathered for shards.

    Returns:
        puts the very same hooks and methods back where they were.
    """
    kept: list[tuple[dict[Any, Any], Any, Any]] = []
    for module in model.modules():
        for name, method in list(vars(module).items()):
            inner = _unwrapped(method)
            if inner is not method:
                kept.append((vars(module), name, method))
                vars(module)[name] = inner
        policy = _precision(module)
        for hooks, cast_hook in ((module._forward_pre_hooks, _cast_inputs), (module._forward_hooks, _cast_output)):
            for place, hook in list(hooks.items()):
                if _is_engines_hook(hook):
                    kept.append((hooks, place, hook))
                    # In its place, so that the order of all hooks stays, and what is registered beside it holds.
                    casts = not hook.__module__.startswith(zero3.PACKAGE)
                    hooks[place] = functools.partial(cast_hook, policy) if casts else _nothing

    def put_back() -> None:
        for hooks, place, hook in kept:
            hooks[place] = hook

    return put_back


def _unwrapped(method: Any) -> Any:
    """What the engine has put functions of its own around: another one at every training that begins."""
    inner = method
    while inspect.ismethod(inner) and _is_engines(function := cast(Any, inner.__func__)):
        inner = function.__wrapped__
    return inner


def _is_engines(function: Any) -> bool:
    """Whether the engine has put a function of its own around a method; it then goes by the method's name and module."""
    defined: str = getattr(function, "__globals__", {}).get("__name__", "")
    return defined.startswith(_ENGINES_HOOKS) and hasattr(function, "__wrapped__")


def engine_hooks(model: nn.Module) -> Iterator[Any]:
    """The hooks that the engine has on modules now."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _is_engines_hook(hook):
                yield hook


def _is_engines_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_ENGINES_HOOKS)


def _nothing(*_: Any) -> None:
    """In place of a hook that only brings weights and lets go of them."""


def _cast_inputs(policy: MixedPrecisionPolicy | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if policy is None or not (policy.cast_forward_inputs and policy.param_dtype):
        return None
    return _cast(args, policy.param_dtype), _cast(kwargs, policy.param_dtype)


def _cast_output(policy: MixedPrecisionPolicy | None, module: nn.Module, args: Any, output: Any) -> Any:
    return None if policy is None or policy.output_dtype is None else _cast(output, policy.output_dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Collections of tensors with the floating ones in another dtype."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, values)
