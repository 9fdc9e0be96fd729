"""What tests of several rooms share: models, probe pairs, quick audits, the order of files, and quick ways to do what
libraries do again and again."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.longest import LONGEST

if TYPE_CHECKING:  # what hands tests to other processes runs none, and would import torch before it starts them
    from torch import nn

    from align_audit.probes.pairs import ProbeSet
    from tests.helpers import audits


def pytest_configure() -> None:
    """Read the description of each installed package once: accelerate and TRL do at each trainer, save and model card."""
    for name in ("metadata", "version"):
        setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; within a file, and among all others, the order stays."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage.

    Each training collects once and each reference that is released too, and half a million objects of torch and transformers
    take longer to look through than a tiny model takes to train.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Leave out, too, what a file has left: families of models that it has imported, what is made once for all tests."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pair_of_models() -> Iterator[Callable[[str], tuple[nn.Module, nn.Module]]]:
    """``pair_of_models(family)``: a policy and its reference, float64, made once; who takes them leaves them as they are."""
    from align_audit.models.weights.fingerprint import fingerprint
    from tests.helpers.tiny import perturbed, tiny_model

    hashes: dict[nn.Module, str] = {}

    @functools.cache
    def made(family: str) -> tuple[nn.Module, nn.Module]:
        reference = tiny_model(family)
        models = perturbed(reference), reference
        hashes.update({model: fingerprint(model) for model in models})
        return models

    yield made
    assert {model: fingerprint(model) for model in hashes} == hashes


@pytest.fixture(scope="session")
def probes() -> Callable[[int], ProbeSet]:
    """``probes(n)``: n random pairs with prompts and completions of unequal length, always the same."""
    from tests.helpers.tiny import random_pairs

    return functools.cache(random_pairs)


@pytest.fixture(scope="session")
def audited() -> Callable[..., audits.Audited]:
    """``audited(policy, reference, probes, **changes)``: record and arrays of a quick audit, but for what ``changes`` say."""

    from align_audit.config import AuditConfig
    from tests.helpers import audits

    def audit(policy: nn.Module, reference: Any, probes: ProbeSet, **changes: Any) -> audits.Audited:
        return audits.audited(policy, reference, probes, AuditConfig.from_dict({**audits.QUICK, **changes}))

    return audit
