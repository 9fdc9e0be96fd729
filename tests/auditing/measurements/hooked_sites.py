"""Finer sites patched by plain forwards with ordinary hooks, one sequence at a time, and quick audits to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from align_audit.config import AuditConfig
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import DEVICE

SITES = ("attention_output", "mlp_output", "head", "block")


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def run(model: nn.Module, ids: Any, hooks: dict[nn.Module, Callable[[Any, torch.Tensor], Any]]) -> torch.Tensor:
    """Logits [T, V] of one sequence; a hook sees a module's input and output and may give another output."""
    handles = []
    for module, act in hooks.items():

        def hook(_: nn.Module, args: Any, output: Any, act: Any = act) -> Any:
            other = act(args, first(output))
            if other is None:
                return None
            return (other, *output[1:]) if isinstance(output, tuple) else other

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids], device=DEVICE), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def logp(logits: torch.Tensor, ids: Any, start: int) -> float:
    rows = logits[start - 1 : len(ids) - 1].double().log_softmax(-1)
    return float(rows[torch.arange(len(rows)), torch.tensor(ids[start:])].sum())


# -- audits -----------------------------------------------------------------------------------------------------------


def config(*sites: dict[str, Any], **changes: Any) -> AuditConfig:
    return AuditConfig.from_dict({
        "batch_tokens": 120, "low_rank": {"enabled": False}, "spinal": {"enabled": False}, "seed": 3,
        "localization": {"enabled": False}, "statistics": {"bootstrap_resamples": 100},
        "patching": {"noise_draws": 0, "reverse": False}, "sites": sites, "generations": QUICK_GENERATIONS, **changes,
    })  # fmt: skip


def audit(policy: Any, reference: Any, probes: Any, settings: AuditConfig) -> Any:
    return audited(policy, reference, probes, settings)
