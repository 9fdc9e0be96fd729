"""The shipped model in float64, and pairs to plant with and to look with, which are not the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.lab.planting import few_prompts
from align_audit.probes.pairs import ProbeSet


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="session")
def shipped() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64).eval()


@pytest.fixture
def base(shipped: Any) -> Iterator[Any]:
    """The model; whoever uses it leaves it as it was."""
    before = {name: value.clone() for name, value in shipped.state_dict().items()}
    yield shipped
    assert all(torch.equal(value, before[name]) for name, value in shipped.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in shipped.parameters())
    assert not shipped.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in shipped.modules())


def short_rows(count: int, seed: int) -> list[dict[str, str]]:
    """The shortest of many pairs, to be quick."""
    rows = preference_pairs(12 * count, seed)
    return sorted(rows, key=lambda row: max(len(row["prompt"] + row[side]) for side in ("chosen", "rejected")))[:count]


@pytest.fixture(scope="session")
def planting_rows() -> list[dict[str, str]]:
    return short_rows(6, seed=31)


@pytest.fixture(scope="session")
def planting(tokenizer: Any, planting_rows: list[dict[str, str]]) -> ProbeSet:
    return ProbeSet.from_dataset(planting_rows, tokenizer, max_pairs=6)


@pytest.fixture(scope="session")
def probes(tokenizer: Any) -> ProbeSet:
    return ProbeSet.from_dataset(short_rows(3, seed=32), tokenizer, max_pairs=3)


@pytest.fixture(scope="session")
def two_prompts(tokenizer: Any) -> tuple[ProbeSet, ProbeSet]:
    """Planting and probe pairs of the same two prompts and different completions."""
    rows = few_prompts(short_rows(9, seed=33), 2)
    planting, probes = (ProbeSet.from_dataset(part, tokenizer, max_pairs=6) for part in (rows[:6], rows[6:]))
    return planting, probes
