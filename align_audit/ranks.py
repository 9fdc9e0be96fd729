"""What the processes of one training agree on. Alone in its process, everything here is the identity."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self, TypeVar

from align_audit.errors import AlignAuditError, ConfigurationError, first_line, pass_exit_on

if TYPE_CHECKING:
    import torch

_Value = TypeVar("_Value")
_Error = TypeVar("_Error", bound=BaseException)


class Status(IntEnum):
    """Whether a process can go on; of several, the worst counts."""

    FINE = 0
    MEMORY = 1
    ERROR = 2


class Agreed(BaseException):
    """Another process cannot go on, so this one does not either; all of them leave at the same place.

    It is no ``Exception``: who tries something out and goes on whatever comes of it must not stay behind.

    Attributes:
        status: why the other one cannot.
    """

    def __init__(self, status: Status) -> None:
        words = {Status.MEMORY: "ran out of memory", Status.ERROR: "could not go on"}[status]
        super().__init__(f"another process {words}")
        self.status = status


_GATHER, _SHARE, _SUM, _EXCHANGE, _ROOM, _END = 1, 2, 3, 4, 5, 6
_SMALL = 2**16
"""Bytes for which there is room."""
_FIRST_PLACE = 16
"""Numbers of the places at which processes meet; those of callers come behind those of this module."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, each of which calls the same methods in the same order, whatever happens in between.

    A decision that one process takes alone leaves the others waiting in their next collective operation, until the
    process group's time-out: so every decision that training sees is made of what :meth:`gather` or :meth:`share` gives.

    Before every collective operation the processes tell each other whether they can go on (:meth:`check`). One that cannot
    says so where the others come next, once, and does not join what they would have done; they leave with :class:`Agreed`.
    What may fail on one process alone therefore stands inside :meth:`together`.

    Attributes:
        rank: of this process, 0 for the one that writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _group: Any = None

    @classmethod
    def of_this_run(cls, timeout: timedelta | None = None) -> Self:
        """The processes that ``torch.distributed`` knows of; this one alone where it is not in use.

        Made by all of them together. They talk over a gloo group of their own: what they say are small Python values,
        for which no accelerator has to wait, and which never mix with training's messages.

        Args:
            timeout: how long they wait for each other: the training's own; None: torch's.

        Raises:
            ConfigurationError: they cannot talk to each other.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        try:
            group = dist.new_group(timeout=timeout, backend="gloo")
        except RuntimeError as error:
            raise ConfigurationError(
                "the processes of an audit talk over gloo, which found no way between them: "
                f"{first_line(error)}. Expected a network interface that all of them reach, such as GLOO_SOCKET_IFNAME=eth0"
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def gather(self, value: _Value) -> list[_Value]:
        """What every process says, in the order of their ranks; the same list everywhere.

        Raises:
            Agreed: another process cannot go on.
        """
        if self._group is None:
            return [value]
        import torch
        import torch.distributed as dist

        # Whatever may fail on this process alone comes before the others wait for it.
        parcel = _packed(value)
        self._meet(Status.FINE, _GATHER)
        sizes = [size for (size,) in self._told_sizes([len(parcel)])]
        room = torch.zeros(self.size + 1, max(sizes), dtype=torch.uint8)
        room[-1, : len(parcel)] = parcel
        self._have_room(max(sizes))
        dist.all_gather(list(room[:-1].unbind()), room[-1], group=self._group)
        return [_unpacked(room[rank, :size]) for rank, size in enumerate(sizes)]

    def exchange(self, values: Sequence[_Value | None]) -> list[_Value | None]:
        """What every process has for this one, in the order of their ranks; its own among them.

        Args:
            values: what this process has for each of them.

        Raises:
            Agreed: another process cannot go on.
        """
        if self._group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        sent = {rank: value for rank, value in enumerate(values) if rank != self.rank and value is not None}
        parcels = {rank: _packed(value) for rank, value in sent.items()}
        self._meet(Status.FINE, _EXCHANGE)
        sizes = self._told_sizes([len(parcels[rank]) if rank in parcels else 0 for rank in range(self.size)])
        coming = {rank: size[self.rank] for rank, size in enumerate(sizes) if rank != self.rank and size[self.rank]}
        rooms = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in coming.items()}
        self._have_room(max(max(size) for size in sizes))
        under_way = [dist.irecv(room, rank, group=self._group) for rank, room in rooms.items()]
        under_way += [dist.isend(parcel, rank, group=self._group) for rank, parcel in parcels.items()]
        for message in under_way:
            assert message is not None
            message.wait()
        said: list[_Value | None] = [_unpacked(rooms[rank]) if rank in rooms else None for rank in range(self.size)]
        said[self.rank] = values[self.rank]
        return said

    def share(self, value: _Value) -> _Value:
        """The first process's word; what the others pass is not looked at.

        Raises:
            Agreed: another process cannot go on.
        """
        if self._group is None:
            return value
        import torch
        import torch.distributed as dist

        parcel = _packed(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        self._meet(Status.FINE, _SHARE)
        ((size,), *_) = self._told_sizes([len(parcel)])
        parcel = parcel if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
        self._have_room(size)
        dist.broadcast(parcel, src=0, group=self._group)
        return value if self.rank == 0 else _unpacked(parcel)

    def any(self, decision: bool) -> bool:
        """Whether it is so on any process.

        Raises:
            Agreed: another process cannot go on.
        """
        return any(self.gather(decision))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the processes' tensors add up to; the same bits everywhere, and ``tensor`` itself where there is one.

        Raises:
            Agreed: another process cannot go on.
        """
        if self._group is None:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().cpu().clone()
        self._meet(Status.FINE, _SUM)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    # -- can all go on? ------------------------------------------------------------------------------------------------

    def check(self, place: int) -> None:
        """All processes come here and can go on, or none does.

        Args:
            place: a number ≥ 0 that says what comes next; the same one on all processes.

        Raises:
            Agreed: another process cannot go on.
            AlignAuditError: the processes have come to different places.
        """
        if self._group is not None:
            self._meet(Status.FINE, _FIRST_PLACE + place)

    @contextlib.contextmanager
    def together(self, out_of_memory: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
        """All processes leave this at the same place: all at its end, or each with its own error or :class:`Agreed`.

        A keyboard interrupt is everybody's, and is not told.

        Args:
            out_of_memory: whether an error is one of memory; the others then hear so.
        """
        if self._group is None:
            yield
            return
        try:
            yield
        except (Exception, SystemExit) as error:
            pass_exit_on(error)  # the others would be waited for, who may be ending too
            if not _is_told(error):
                self._tell(error, Status.MEMORY if out_of_memory(error) else Status.ERROR)
            raise
        self._meet(Status.FINE, _END)

    def _told_sizes(self, sizes: list[int]) -> list[list[int]]:
        """Bytes that each process is going to send, as many numbers from each."""
        import torch
        import torch.distributed as dist

        said = [torch.zeros(len(sizes), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(said, torch.tensor(sizes), group=self._group)
        return [each.tolist() for each in said]

    def _have_room(self, most: int) -> None:
        """All processes have made room for what comes, or none waits for it. Of small messages that goes without saying.

        Args:
            most: bytes of the largest one, the same number on all processes.
        """
        if most > _SMALL:
            self._meet(Status.FINE, _ROOM)

    def _tell(self, error: BaseException, status: Status) -> None:
        """Let the others know, where they come next.

        Raises:
            Agreed: something worse happened to another one at the same time.
        """
        told(error)
        try:
            self._meet(status, _END)
        except Agreed as agreed:
            if agreed.status > status:
                raise

    def _meet(self, status: Status, place: int) -> None:
        import torch
        import torch.distributed as dist

        said = torch.tensor([status, place, -place])
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
        worst, last, first = said.tolist()
        if worst != Status.FINE:
            raise Agreed(Status(worst))
        if last != -first:
            raise told(
                AlignAuditError(
                    f"the processes of this training have come to different places of an audit ({-first} and {last}; this "
                    f"one, rank {self.rank}, to {place}); expected the same model, probes and options on all of them. "
                    "Please report this"
                )
            )

    def close(self) -> None:
        """Let go of the group, all processes together."""
        if self._group is not None:
            import torch.distributed as dist

            # A ValueError: it is gone already, with all groups that there were when training broke off.
            with contextlib.suppress(ValueError):
                if dist.is_initialized():
                    dist.destroy_process_group(self._group)


def _packed(value: object) -> torch.Tensor:
    """As bytes [n]."""
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpacked(parcel: torch.Tensor) -> Any:
    """Of another process of this training, which runs the same program."""
    return pickle.loads(parcel.numpy().data)


_TOLD = "_align_audit_told"


def told(error: _Error) -> _Error:
    """Mark an error as one that the other processes know of: they have left the same place."""
    setattr(error, _TOLD, True)
    return error


def _is_told(error: BaseException | None) -> bool:
    """Whether the error, or one that led to it, is known to the other processes."""
    while error is not None:
        if isinstance(error, Agreed) or getattr(error, _TOLD, False):
            return True
        error = error.__cause__ or error.__context__
    return False
