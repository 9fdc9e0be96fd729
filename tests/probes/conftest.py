"""The tokenizer that tests of probe pairs share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.probe_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()
