"""Which errors say that memory ran out: torch's kinds of error, and the words of allocators."""

from __future__ import annotations

import pytest
import torch

from align_audit.auditing.session.memory import out_of_memory
from align_audit.errors import AuditMemoryError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        AuditMemoryError("too much"),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB", "and more"),
        RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456 (256)MB"),
    ],
)
def test_memory_ran_out(error: BaseException) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("device-side assert triggered"),
        RuntimeError(3),
        RuntimeError(),
        KeyError("HIP out of memory. "),
    ],
)
def test_another_error(error: BaseException) -> None:
    assert not out_of_memory(error)


def test_an_allocation_that_torch_refuses() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
