"""The test files that take longest, longest first: one that comes last leaves the other process with nothing to do."""

from __future__ import annotations

LONGEST = (
    "distributed/test_failures.py",
    "distributed/test_fsdp2.py",
    "distributed/test_shared.py",
)
