"""The way from one state of modules to another and back, without a look at all that is alike in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ABSENT = object()
"""Where a mapping has no such key."""


@dataclass(frozen=True)
class ModuleChange:
    """What two states of modules differ by. It is put on and taken off again, as often as is asked for.

    Attributes:
        values: for each attribute or entry that differs: the mapping that holds it, its key, and what it is in the first
            state and in the second. :data:`ABSENT` where the first state has none.
        flags: for each tensor whose ``requires_grad`` differs: the tensor, and the flag in both states.
    """

    values: tuple[tuple[dict[Any, Any], Any, Any, Any], ...]
    flags: tuple[tuple[torch.Tensor, bool, bool], ...]

    @property
    def fits(self) -> bool:
        """Whether all that differs is in the first state now."""
        return all(mapping.get(key, ABSENT) is first for mapping, key, first, _ in self.values) and all(
            tensor.requires_grad == first for tensor, first, _ in self.flags
        )

    def put_on(self) -> None:
        """Bring the modules from the first state to the second."""
        for mapping, key, _, second in self.values:
            mapping[key] = second
        for tensor, _, flag in self.flags:
            tensor.requires_grad = flag

    def take_off(self) -> None:
        """Bring them back to the first."""
        for mapping, key, first, _ in self.values:
            if first is ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = first
        for tensor, flag, _ in self.flags:
            tensor.requires_grad = flag
