"""TensorBoard's tags and the columns of the tables are names that people's scripts hold on to: they stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.views import cases, views_of

STORED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("views.json").read_text("utf-8"))
CASES = cases()


def close(value: Any) -> Any:
    """The value, numbers to about as many digits as are stored."""
    if isinstance(value, list):
        return [close(item) for item in value]
    return pytest.approx(value, rel=1e-5, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("view", ["scalars", "not_known", "to_pandas", "to_pandas_layers"])
def test_a_view_shows_what_it_showed(case: str, view: str) -> None:
    shown, stored = views_of(CASES[case])[view], STORED[case][view]
    if view == "not_known":
        assert shown == stored
        return
    assert list(shown) == list(stored)
    for name, value in stored.items():
        assert shown[name] == close(value), name
        assert type(shown[name]) is type(value), name


def test_the_file_is_of_these_cases() -> None:
    assert list(STORED) == list(CASES)
