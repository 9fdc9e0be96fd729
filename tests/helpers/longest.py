"""The test files that take longest, longest first: one that comes last leaves the other process with nothing to do."""

from __future__ import annotations

LONGEST = (
    "monitoring/test_inert.py",
    "auditing/session/test_reference_streams.py",
    "writers/web/test_browser.py",
    "monitoring/test_other_trainers.py",
    "auditing/test_exactness.py",
    "monitoring/test_callback.py",
    "monitoring/test_callback_resumed.py",
    "monitoring/test_callback_breaks.py",
    "writers/test_event_files.py",
    "monitoring/test_watch.py",
    "auditing/test_bad_input.py",
    "writers/web/test_tensorboard_browser.py",
    "lab/test_three_lines.py",
    "cli/test_broken_checkpoints.py",
    "auditing/measurements/test_generations.py",
    "auditing/session/test_memory_limits.py",
    "cli/test_run.py",
    "models/test_families.py",
    "models/test_build.py",
    "lab/test_demo.py",
    "test_types.py",
)
"""By ``pytest --durations=0``, setup and call together."""
