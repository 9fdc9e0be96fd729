"""What a test sees of a sharded run from inside: what an audit leaves behind, and how much of a model was whole at once."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from align_audit.models.weights import gathered
from align_audit.models.weights.sharded import is_spread


def snapshot(model: nn.Module) -> list[Any]:
    """Everything an audit could leave in a model: hooks, replaced forwards, other parameters, marks of the engine."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        seen.append((name, [*module._forward_pre_hooks.items()], [*module._forward_hooks.items()]))
        seen.append((name, module.__dict__.get("forward"), module.training))
        seen.append(
            [
                (key, id(value), type(value), value.requires_grad, str(getattr(value, "ds_status", None)))
                for key, value in module._parameters.items()
                if value is not None
            ]
        )
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            seen.append(
                (name, state._is_root, state._training_state, len(getattr(state._comm_ctx, "post_forward_order", ())))
            )
            seen.append([group.is_sharded for group in state._fsdp_param_groups])
    seen += map(_of_coordinator, coordinators(model))
    return seen


def coordinators(model: nn.Module) -> list[Any]:
    """What brings the weights of DeepSpeed ZeRO-3 together, and traces in which order: hooks know it."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
                if type(cell.cell_contents).__name__ == "DeepSpeedZeRoOffload":
                    coordinator = cell.cell_contents.param_coordinator
                    seen[id(coordinator)] = coordinator
    return list(seen.values())


def _of_coordinator(coordinator: Any) -> dict[str, Any]:
    """All that it holds: numbers and modes, and of collections how much is in them."""
    return {
        name: len(value) if hasattr(value, "__len__") else value
        for name, value in vars(coordinator).items()
        if isinstance(value, bool | int | float | str | Enum) or hasattr(value, "__len__")
    }


class Before(TrainerCallback):
    """Stands before the audit's callback, and looks at each step's end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.reference: nn.Module | None = None

    def look(self, model: nn.Module) -> list[Any]:
        """At the policy, and at the reference where there is one."""
        return snapshot(model) + ([] if self.reference is None else snapshot(self.reference))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen = self.look(model)


class After(TrainerCallback):
    """Stands behind it.

    Attributes:
        looks: at how many steps.
        left: names of modules in which something was another.
        spread: how many parameters were spread.
        available: of how many DeepSpeed itself held all values, at most.
        coordinators: how many of DeepSpeed's were looked at.
    """

    def __init__(self, before: Before) -> None:
        self.before = before
        self.looks, self.left, self.spread = 0, [], 0
        self.available = self.coordinators = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        now = self.before.look(model)
        self.looks += 1
        self.left += [str(a) for a, b in zip(now, self.before.seen, strict=True) if a != b]
        self.spread = sum(map(is_spread, model.parameters()))
        statuses = [getattr(getattr(each, "ds_status", None), "name", None) for each in model.parameters()]
        self.coordinators = len(coordinators(model))
        self.available = max(self.available, statuses.count("AVAILABLE"))


def watch_gathers() -> list[dict[str, Any]]:
    """From now on fills with what every gathered model held."""
    held: list[dict[str, Any]] = []
    close = gathered.GatheredLayers.close

    def seen(self: gathered.GatheredLayers) -> None:
        close(self)
        held.append({"most": self.most, "outside": self.outside, "layers": self.layers, "gathers": self.gathers})

    gathered.GatheredLayers.close = seen
    return held
