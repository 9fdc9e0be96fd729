"""The examples in the docstrings of the measures hold, and there are some."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["statistics", "spectrum", "transport", "spinal", "localization", "subspace", "control_variate"]
)
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"align_audit.measures.{name}"))
    assert results.failed == 0
    assert results.attempted > 0
