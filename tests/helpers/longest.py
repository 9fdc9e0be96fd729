"""The test files that take longest, longest first: one that comes last leaves the other process with nothing to do."""

from __future__ import annotations

LONGEST = (
    "distributed/test_failures.py",
    "distributed/test_fsdp2.py",
    "distributed/test_shared.py",
    "auditing/session/test_reference_streams.py",
    "models/test_families.py",
    "monitoring/test_callback.py",
    "distributed/test_together.py",
    "auditing/test_exactness.py",
    "models/test_build.py",
    "auditing/measurements/test_attribution.py",
    "models/test_sites.py",
    "cli/test_broken_checkpoints.py",
    "cli/test_origin.py",
    "auditing/referee/test_same_numbers_anyhow.py",
    "monitoring/test_reference_modes.py",
    "test_types.py",
)
"""By ``pytest --durations=0``, setup and call together."""
