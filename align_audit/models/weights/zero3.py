"""DeepSpeed ZeRO-3: how it marks what it has cut, which of its settings an audit can follow, loading beside it; its autocast.

DeepSpeed need not be installed, and is never imported here: a parameter that it has cut says so itself. Such a parameter is
empty. ``ds_tensor`` is this process's piece of the flattened values, as the optimizer has left it; ``ds_shape`` and
``ds_numel`` measure the whole. All pieces are equally long, so the last ones may end in padding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

NAME = "DeepSpeed ZeRO-3"
PACKAGE = "deepspeed."
"""Where the functions come from that it hooks to modules."""

_ON_MODULES = ("_external_params", "_original_parameters", "applied_pre_backward_ref_cnt")

_SETTINGS = {
    "zero_quantized_weights": "with quantized weights (ZeRO++)",
    "zero_quantized_nontrainable_weights": "with quantized weights (ZeRO++)",
    "zero_hpz_partition_size": "with a second partition inside of each node (hpZ of ZeRO++)",
    "mics_shard_size": "with weights cut inside of groups (MiCS)",
    "zenflow": "with ZenFlow",
    "torch_autocast": "with DeepSpeed's own autocast",
}
"""What changes the weights that a forward computes with, or where their pieces are; by its name in a configuration."""


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed has cut the parameter: what is here of it is ``ds_tensor``."""
    return hasattr(parameter, "ds_status") and hasattr(parameter, "ds_numel")


def is_deepspeeds(attribute: str) -> bool:
    """Whether a module's attribute of that name is DeepSpeed's: which module it is to it, and how often it ran."""
    return attribute.startswith("ds_") or attribute in _ON_MODULES


def piece_of(parameter: Any) -> tuple[torch.Tensor, int, int, Any]:
    """What this process holds of a parameter that was cut.

    Returns:
        consecutive values of the flattened parameter, without padding; how many stand before them; how long each piece is with
        its padding; the processes that hold the others.
    """
    group, length = parameter.ds_process_group, parameter.ds_tensor.numel()
    offset = min(parameter.ds_numel, group.rank() * length)
    return parameter.ds_tensor.detach()[: parameter.ds_numel - offset], offset, length, group


def unsupported(parameters: Iterable[torch.Tensor]) -> str | None:
    """What these parameters use of ZeRO-3 that an audit cannot follow, in words behind its name; None: nothing.

    Parameters show most of it. Where a trainer runs, transformers knows its configuration, and that is looked at too.
    """
    cut: list[Any] = [parameter for parameter in parameters if is_partitioned(parameter)]
    settings = _settings()
    offloaded = _is_on(settings.get("offload_param")) or any(
        getattr(each, "nvme_swapper", None) is not None or each.ds_tensor.device.type != each.device.type
        for each in cut
    )
    if offloaded:
        return "with its parameters offloaded"
    if any(hasattr(each.ds_tensor, "ds_quant_scale") for each in cut):
        return _SETTINGS["zero_quantized_weights"]
    if any(getattr(each, "ds_secondary_tensor", None) is not None for each in cut):
        return _SETTINGS["zero_hpz_partition_size"]
    return next((words for name, words in _SETTINGS.items() if _is_on(settings.get(name))), None)


def engines_autocast() -> Callable[[str], torch.autocast] | None:
    """Makes, for a type of device, the context that DeepSpeed's engine computes in; None: it sets none up (or there is none).

    It is the engine's, around the model's forward: neither the model nor the trainer knows of it.
    """
    settings = _configuration().get("torch_autocast") or {}
    if settings.get("enabled") is not True:
        return None
    name = str(settings.get("dtype")).removeprefix("torch.").lower()
    dtype = {
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
        "half": torch.float16,
    }.get(name)
    return lambda device: torch.autocast(device, dtype=dtype)


def _configuration() -> Mapping[str, Any]:
    """Of the training under way, as far as transformers knows of it."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    return (None if integration is None else integration.deepspeed_config()) or {}


def _settings() -> Mapping[str, Any]:
    """What is under ``zero_optimization`` there, and autocast."""
    config = _configuration()
    autocast = (config.get("torch_autocast") or {}).get("enabled")
    return {**(config.get("zero_optimization") or {}), "torch_autocast": autocast}


def _is_on(value: Any) -> bool:
    """Whether a setting says something else than its default: sizes of one or less, and the device ``none``, are such."""
    if isinstance(value, Mapping):
        return str(value.get("device", "yes")) != "none"
    return value > 1 if isinstance(value, int) and not isinstance(value, bool) else value not in (None, False, "auto")


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Inside, transformers loads models whole. While a trainer with ZeRO-3 lives, it cuts whatever is loaded."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None or not integration.is_deepspeed_zero3_enabled():
        yield
        return
    config = integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)
