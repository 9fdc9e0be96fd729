"""How much memory an audit may take, what it took, and what running out of it looks like."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from align_audit.errors import AuditMemoryError

_WORKING_BYTES = 2**30
_DEVICE_SHARE = 16
"""Working memory where none is given; of an accelerator one part in so many, where that is more: its calls have to be
large to keep it busy. Of all its memory, not of what is free now, so that every audit of a run has the same batches."""


class MemoryMeter:
    """Peak bytes above the start, sampled where an audit holds most; the host program's own statistics stay untouched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self.peak = 0

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        import psutil

        return int(psutil.Process().memory_info().rss)

    def sample(self) -> None:
        """Look now."""
        self.peak = max(self.peak, self._now() - self._start)


@dataclass
class MemoryBounds:
    """What running out of memory has taught: bounds of a batch and of the streams walked together."""

    tokens: int = 2**62
    bytes: int = 2**62


def usual_working_bytes(device: torch.device) -> int:
    """What the streams of one batch may take together where nobody says."""
    if device.type != "cuda":
        return _WORKING_BYTES
    return max(_WORKING_BYTES, torch.cuda.get_device_properties(device).total_memory // _DEVICE_SHARE)


def out_of_memory(error: BaseException) -> bool:
    """An allocation that failed: on a device, or in the words of torch's CPU allocator and of accelerate's devices."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if "not enough memory" in str(error) or "can't allocate memory" in str(error):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    # It looks for words in the error's only argument, which may be anything.
    return isinstance(error, RuntimeError) and bool(should_reduce_batch_size(RuntimeError(str(error))))


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, on an accelerator of any kind also what its allocator keeps."""
    gc.collect()
    if device.type != "cpu":
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache()


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Running out of memory inside is an ``AuditMemoryError`` that says what there has to be room for."""
    try:
        yield
    except AuditMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AuditMemoryError(
            f"the audit ran out of memory outside its batches ({words}): while opening the models, or "
            "in what it keeps for all pairs. Expected room for the reference's weights, for spinal.max_rows token rows of "
            "every layer, and for some ten matrices of the model's width squared in float64; lower spinal.max_rows, or give "
            "low_rank fewer layers or bases, or free memory."
        ) from error
