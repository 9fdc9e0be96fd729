"""The examples in the docstrings of the measures hold, and there are some."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "combined_shares", "control_variate", "draws", "exact_pairs", "exact_sample", "layer_set", "localization",
        "significance", "spectrum", "spinal", "statistics", "subspace", "sums", "transport",
    ],
)  # fmt: skip
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"align_audit.measures.{name}"))
    assert results.failed == 0
    assert results.attempted > 0
