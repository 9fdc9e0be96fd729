"""What is counted of an audit in advance is what its record says it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from align_audit.auditing.audit import run_audit
from align_audit.auditing.costs.counting import count, layer_tokens
from align_audit.auditing.costs.job import Assumed, Job
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import total
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.errors import AnatomyError, ConfigurationError
from align_audit.models.reference import resolve_reference
from align_audit.record.audit_record import AuditRecord
from tests.helpers.tiny import FAMILIES, perturbed, random_pairs, tiny_model

PAIRS = random_pairs(13, seed=3)
QUICK = {
    "progress": False,
    "statistics": {"bootstrap_resamples": 100},
    "localization": {"enabled": False},
    "generations": {"max_new_tokens": 8, "prompts": 3},
    "batch_tokens": 96,
}
CASES: dict[str, dict[str, Any]] = {
    "as it is by default": {},
    "prompts computed twice": {"share_prompts": False},
    "no controls": {"patching": {"reverse": False, "noise_draws": 0}},
    "controls on some pairs": {"patching": {"control_pairs": 4}},
    "some pairs exact": {"patching": {"exact_pairs": 8, "control_pairs": 4}},
    "some pairs exact, prompts twice": {"patching": {"exact_pairs": 8}, "share_prompts": False},
    "attribution at one point": {"patching": {"exact_pairs": 8, "attribution_points": [0.0], "embedding": False}},
    "attribution by layer": {"patching": {"exact_pairs": 8, "attribution_path": "layer", "attribution_points": [0.5]}},
    "no transplants": {"patching": {"transplants": False}},
    "no embedding": {"patching": {"embedding": False}},
    "no patching": {"patching": {"enabled": False}},
    "prompts alone patched": {"patching": {"positions": "prompt"}},
    "low rank at two layers": {"low_rank": {"layers": [0, 2], "ranks": [1, 3], "random_draws": 2}},
    "low rank everywhere": {"low_rank": {"layers": "all", "bases": ["shift"]}},
    "no low rank": {"low_rank": {"enabled": False}},
    "no room beside the first pass": {"low_rank": {"layers": [1]}, "working_memory_mb": 1, "batch_tokens": 10_000},
    "no spinal": {"spinal": {"enabled": False}},
    "no gradients": {"spinal": {"gradient_concentration": False}},
    "no continuations": {"generations": {"enabled": False}},
    "one pair a batch": {"batch_tokens": 1},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options with some changed, also inside of parts."""
    parts = {
        name: merged(base[name], value) if isinstance(value, Mapping) and name in base else value
        for name, value in changes.items()
    }
    return {**base, **parts}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    policy = tiny_model("llama", dtype=torch.float32, eos_token_id=None)
    return policy, perturbed(policy)


def audited(models: tuple[Any, Any], config: AuditConfig, kind: Any, cache: ReferenceCache) -> AuditRecord:
    policy, reference = models
    with OpenModels(policy, resolve_reference(policy, reference)) as opened:
        return run_audit(opened, AuditRequest(PAIRS, config, kind=kind, probe_name="p"), cache).record


def job_of(models: tuple[Any, Any], config: AuditConfig, record: AuditRecord | None = None) -> Job:
    """The audit that a record is of, with what it has shown."""
    memory = config.working_memory_mb
    room = Room("cpu", usual_working_bytes(torch.device("cpu")) if memory is None else memory * 2**20)
    assumed = Assumed()
    if record is not None:
        assert record.provenance.shared_prompts == config.share_prompts
        assert record.generations is None or record.generations.ended.mean == 0.0
        curves = record.low_rank
        assumed = Assumed(
            peak_layer=-1 if record.patching is None or (peak := record.patching.peak_layer) is None else peak,
            low_rank_layers=tuple(sorted({layer for layers in curves.values() for layer in layers})),
            spanned={
                (basis, layer): sum(ratio == ratio for ratio in curve.explained_variance_ratio)
                for basis, layers in curves.items()
                for layer, curve in layers.items()
            },
            transport_rows=None if record.spinal is None else record.spinal.transport_rows,
        )
    shape = ModelShape.of(models[0])
    return Job.on(shape, PAIRS.pairs, config, room, shared=config.share_prompts, assumed=assumed)


def forwards(job: Job, tokens: int) -> float:
    """As a record tells them."""
    once = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in job.pairs) * job.shape.layers
    return tokens / once


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_layer_tokens_are_those_of_the_record(models: tuple[Any, Any], changes: dict[str, Any]) -> None:
    config = AuditConfig.from_dict(merged(QUICK, changes))
    record = audited(models, config, "full", ReferenceCache())
    job = job_of(models, config, record)
    assert forwards(job, layer_tokens(job, "full")) == record.cost.forward_equivalents


@pytest.mark.parametrize("shared", [True, False])
def test_layer_tokens_of_looks_are_those_of_their_records(models: tuple[Any, Any], shared: bool) -> None:
    config = AuditConfig.from_dict(merged(QUICK, {"share_prompts": shared}))
    cache = ReferenceCache()
    for first in (True, False):
        record = audited(models, config, "health", cache)
        job = job_of(models, config, record)
        assert forwards(job, layer_tokens(job, "health", first=first)) == record.cost.forward_equivalents


def test_a_full_audit_after_a_look_is_counted_without_what_the_look_left(models: tuple[Any, Any]) -> None:
    config, cache = AuditConfig.from_dict(QUICK), ReferenceCache()
    audited(models, config, "health", cache)
    record = audited(models, config, "full", cache)
    job = job_of(models, config, record)
    assert forwards(job, layer_tokens(job, "full", first=False)) == record.cost.forward_equivalents
