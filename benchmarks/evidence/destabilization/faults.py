"""What happens in the process of a run at a given step: to the rate, the optimizer, the reference, the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

SPIKE_STEPS = 4
SPIKE = 40.0
STEPS_COUNTED = 10_000.0


class AtStep(TrainerCallback):
    """Does something before the steps of a stretch: ``action(trainer)`` before each of them."""

    def __init__(self, trainer: Any, action: Callable[[Any], None], first: int, count: int = 1) -> None:
        self._trainer, self._action = trainer, action
        self._steps = range(first, first + count)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """``state.global_step`` is the number of steps done."""
        if state.global_step in self._steps:
            self._action(self._trainer)


def spike_rate(trainer: Any) -> None:
    """Forty times the rate in this step; the scheduler sets it anew after it."""
    for group in trainer.optimizer.param_groups:
        group["lr"] *= SPIKE


def lose_optimizer_state(trainer: Any) -> None:
    """The second moments are gone, as after a resume that restored half of the state, and the count of steps is kept:
    nothing corrects the bias of the new ones, and steps are up to 30 times too long."""
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
        state["step"].fill_(STEPS_COUNTED)


@torch.no_grad()
def swap_reference(trainer: Any) -> None:
    """The reference becomes another model: each weight matrix with its rows in another order (same shapes, same norms)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.ref_model.parameters():
        if parameter.ndim > 1 and parameter.shape[0] != parameter.shape[1]:
            parameter.copy_(parameter[torch.randperm(parameter.shape[0], generator=generator)])


@torch.no_grad()
def swap_layers(trainer: Any) -> None:
    """Two middle layers of the policy have each other's weights, as after a mapping of names gone wrong."""
    body = trainer.model.get_decoder()
    layers = body.layers if hasattr(body, "layers") else body.h
    middle = len(layers) // 2
    lower, upper = layers[middle - 1].state_dict(), layers[middle].state_dict()
    kept = {name: value.clone() for name, value in lower.items()}
    layers[middle - 1].load_state_dict(upper)
    layers[middle].load_state_dict(kept)


def idle(trainer: Any) -> None:
    """The optimizer holds parameters of a copy: what is trained is not what is updated."""
    copies = [parameter.detach().clone().requires_grad_() for parameter in trainer.model.parameters()]
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for group in optimizer.param_groups:
        group["params"] = copies[: len(group["params"])]


EVENTS: dict[str, tuple[Callable[[Any], None], int]] = {
    "rate_spike": (spike_rate, SPIKE_STEPS),
    "optimizer_lost": (lose_optimizer_state, 1),
    "reference_swapped": (swap_reference, 1),
    "layers_swapped": (swap_layers, 1),
    "idle_optimizer": (idle, 1),
}
"""What is done, and before how many steps in a row."""
