"""Are a model's weights spread over processes? Told from its parameters and modules, without calling it."""

from __future__ import annotations

from torch import nn

from align_audit.errors import ConfigurationError


def how_sharded(model: nn.Module) -> str | None:
    """Which engine keeps parts of the model's weights on other processes; None where they are whole here."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if isinstance(module, FSDPModule):
            return "FSDP2"
        if isinstance(module, FullyShardedDataParallel):
            return "FSDP1"
    for parameter in model.parameters():
        # DeepSpeed marks what it has partitioned; it is not imported here, since it need not be installed.
        if hasattr(parameter, "ds_status") and hasattr(parameter, "ds_numel"):
            return "DeepSpeed ZeRO-3"
        if isinstance(parameter, DTensor):
            return "tensor parallelism"
        if hasattr(parameter, "_is_flat_param"):
            return "FSDP1"
    return None


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse a model whose layers no process holds whole.

    Such a model must not even be called: FSDP2 takes the first module that runs for the root of the model, and training's
    own first forward breaks.

    Args:
        what: which model it is, for the message.

    Raises:
        ConfigurationError: it is sharded.
    """
    engine = how_sharded(model)
    if engine is not None:
        raise ConfigurationError(
            f"the weights of {what} are spread over processes ({engine}), and an audit runs a model layer by layer, each layer "
            "whole. Expected weights that every process holds whole: one process, DDP, DeepSpeed ZeRO-1 or ZeRO-2. Train with "
            "one of these, or without this callback, and audit the saved checkpoints afterwards (`align-audit run`)"
        )
