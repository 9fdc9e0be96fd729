"""What the processes of one training agree on. Alone in its process, everything here is the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeVar

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, each of which calls the same methods in the same order, whatever happens in between.

    A decision that one process takes alone leaves the others waiting in their next collective operation, until the
    process group's time-out: so every decision that training sees is made of what :meth:`gather` or :meth:`share` gives.

    Attributes:
        rank: of this process, 0 for the one that writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _group: Any = None

    @classmethod
    def of_this_run(cls) -> Self:
        """The processes that ``torch.distributed`` knows of; this one alone where it is not in use.

        Made by all of them together. They talk over a gloo group of their own: what they say are small Python values,
        for which no accelerator has to wait, and which never mix with training's messages.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def gather(self, value: _Value) -> list[_Value]:
        """What every process says, in the order of their ranks; the same list everywhere."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value, group=self._group)
        return said

    def share(self, value: _Value) -> _Value:
        """The first process's word; what the others pass is not looked at."""
        if self._group is None:
            return value
        import torch.distributed as dist

        said: list[_Value] = [value]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def close(self) -> None:
        """Let go of the group, all processes together."""
        if self._group is not None:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group(self._group)
