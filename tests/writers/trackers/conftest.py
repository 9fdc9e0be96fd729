"""The three trackers' stores, each made once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

from tests.helpers.tracker_stores import STORES, Store


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[functools._lru_cache_wrapper[Store]]:
    """``stores(kind)``: the store, made when it is first asked for: MLflow's takes seconds."""
    environment = dict(os.environ)
    yield functools.cache(lambda kind: kind(tmp_path_factory.mktemp(kind.name)))
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(params=STORES, ids=lambda kind: kind.name)
def store(request: pytest.FixtureRequest, stores: functools._lru_cache_wrapper[Store]) -> Store:
    """Each of the three, one after the other; skipped where its client is missing."""
    return stores(request.param)
