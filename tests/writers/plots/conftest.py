from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Matplotlib warns of layouts that collapse, missing glyphs and empty legends."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
