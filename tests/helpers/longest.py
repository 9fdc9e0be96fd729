"""The test files that take longest, longest first: one that comes last leaves the other process with nothing to do."""

from __future__ import annotations

LONGEST = (
    "writers/web/test_browser.py",
    "monitoring/test_other_trainers.py",
    "monitoring/test_inert.py",
    "auditing/test_exactness.py",
    "monitoring/test_callback.py",
    "monitoring/test_callback_resumed.py",
    "monitoring/test_callback_breaks.py",
    "writers/test_event_files.py",
    "monitoring/test_watch.py",
    "auditing/session/test_reference_streams.py",
    "auditing/test_bad_input.py",
    "writers/web/test_tensorboard_browser.py",
    "cli/test_broken_checkpoints.py",
    "auditing/measurements/test_generations.py",
    "auditing/session/test_memory_limits.py",
    "auditing/measurements/test_attribution.py",
    "cli/test_run.py",
    "monitoring/test_monitor.py",
    "models/test_build.py",
    "record/test_log.py",
    "writers/test_webhook.py",
    "lab/test_demo.py",
    "cli/test_origin.py",
    "lab/test_three_lines.py",
    "models/test_guard_state.py",
    "monitoring/test_reference_modes.py",
    "monitoring/test_same_model.py",
    "monitoring/test_surroundings.py",
    "lab/planting/test_placed.py",
    "monitoring/test_looks.py",
    "models/test_families.py",
    "test_types.py",
)
"""By ``pytest --durations=0``, setup and call together."""
