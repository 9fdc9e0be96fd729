"""On a real pretrained model and real pairs, where they are present: ../shared/data, or the folder $ALIGN_AUDIT_DATA names."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pytest
import torch
from ruined_runs import DATA, Case, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not (DATA / "stories260k").is_dir(), reason=f"no stories260k in {DATA}; set ALIGN_AUDIT_DATA"),
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise * parameter.std())
    return policy, reference


@pytest.mark.parametrize("name", ["stories-pairs/pairs.jsonl", "hh-harmless/pairs.jsonl.gz"])
def test_audit_equals_the_plain_computation_on_real_pairs(models: tuple[Any, Any], audited: Any, name: str) -> None:
    policy, reference = models
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    probes = ProbeSet.from_dataset(DATA / name, tokenizer, max_pairs=4, max_length=160, seed=2)
    record, arrays = audited(policy, reference, probes)
    _, chosen, rejected = oracle.margins(reference, probes.pairs)
    atol = 1e-6 * float(np.max(np.abs(chosen) + np.abs(rejected)))
    effects = oracle.patch_effects(policy, reference, probes.pairs)
    assert np.abs(effects).max() > 100 * atol
    np.testing.assert_allclose(arrays["per_pair.effect"], effects, atol=atol, rtol=0)
    np.testing.assert_allclose(
        arrays["per_pair.transplant"], oracle.block_transplants(policy, reference, probes.pairs), atol=atol, rtol=0
    )
    assert record.controls.identity.verdict == "passed"


def test_implicit_prompts_of_real_dialogues_are_read() -> None:
    with gzip.open(DATA / "hh-harmless" / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        first = json.loads(file.readline())
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    probes = ProbeSet.from_dataset([first], tokenizer, max_length=None)
    text = tokenizer.decode(probes[0].chosen_ids)
    assert "Assistant:" in text
    assert probes[0].common_prefix >= probes[0].chosen_start > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case("ruined", 3e-3, 0.02, 0), Case("ruined", 1e-3, 0.05, 0), Case("healthy", 1e-4, 0.1, 0)],
    ids=lambda case: f"{case.kind}-{case.learning_rate:g}-{case.beta:g}",
)
def test_errors_fire_on_runs_that_ruin_the_model_and_on_no_other(case: Case) -> None:
    """The whole grid is `python benchmarks/evidence/ruined_runs.py`."""
    row = run(case, pairs=32)
    assert row["right"], row
