"""What one rank of a case says to the others: messages small and large, some of which cannot be made, or find no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align_audit.ranks import Agreed, Ranks

LARGE = 2**18
"""Bytes of a message for which room is made before anybody waits for it."""


class Unsayable:
    """A value that runs out of memory when it is made a message."""

    def __reduce__(self) -> Any:
        raise MemoryError("planted")


def run(folder: Path, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Say things in turn; what each attempt came to, in words.

    ``case``:
        ``verb``: ``gather``, ``exchange`` or ``share``.
        ``unsayable_on``, ``no_room_on``: a rank on which the first message cannot be made, or finds no room.
    """
    torch.distributed.init_process_group("gloo")
    ranks = Ranks.of_this_run()
    said = [attempt(ranks, case, first) for first in (True, False)]
    ranks.close()
    return {"said": said}


def attempt(ranks: Ranks, case: dict[str, Any], first: bool) -> Any:
    value: Any = torch.full((LARGE,), ranks.rank, dtype=torch.uint8)
    if first and case.get("unsayable_on") == ranks.rank:
        value = Unsayable()
    real = torch.empty, torch.zeros
    if first and case.get("no_room_on") == ranks.rank:
        torch.empty = torch.zeros = no_room  # type: ignore[assignment]
    try:
        with ranks.together(lambda error: isinstance(error, MemoryError)):
            if case["verb"] == "gather":
                return [int(each.sum()) for each in ranks.gather(value)]
            if case["verb"] == "share":
                return int(ranks.share(value).sum())
            heard = ranks.exchange([None if other == ranks.rank else value for other in range(ranks.size)])
            return [None if each is None else int(each.sum()) for each in heard]
    except MemoryError:
        return "no memory"
    except Agreed as agreed:
        return str(agreed)
    finally:
        torch.empty, torch.zeros = real  # type: ignore[assignment]


def no_room(*shape: Any, **options: Any) -> torch.Tensor:
    """What makes tensors, where only small ones can be made."""
    size = torch.Size(shape if not isinstance(shape[0], tuple) else shape[0]).numel()
    if size >= LARGE:
        raise MemoryError("planted")
    return torch.ones(*shape, **options).zero_()
