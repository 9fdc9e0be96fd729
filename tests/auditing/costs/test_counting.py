"""What is counted of an audit in advance is what its record says it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit.auditing.audit import run_audit
from align_audit.auditing.costs.counting import count, layer_tokens
from align_audit.auditing.costs.foresight import full_per_look, more_memory
from align_audit.auditing.costs.job import Assumed, Job
from align_audit.auditing.costs.memory import foresee_memory
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import Work, total
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.kept import Continued
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.room import Room
from align_audit.auditing.session.unpatched import Unpatched
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.errors import AnatomyError, ConfigurationError
from align_audit.models.reference import resolve_reference
from align_audit.models.replay import Replay
from align_audit.models.weights.streaming import find_layers
from align_audit.probes.batches import PairBatch
from align_audit.record.audit_record import AuditRecord
from tests.helpers.counted import forwards, job_on_cpu
from tests.helpers.tiny import FAMILIES, perturbed, random_pairs, tiny_model
from tests.models.test_families import FAMILIES as ARCHITECTURES
from tests.models.test_families import build

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
    """An audit of them on all pairs."""
    return job_on_cpu(models[0], PAIRS.pairs, config, record)


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


def test_rows_through_the_head_are_counted(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = AuditConfig.from_dict(merged(QUICK, {"patching": {"exact_pairs": 8}}))
    seen: list[tuple[int, bool]] = []
    head = Replay.head

    def spied(replay: Replay, rows: torch.Tensor) -> torch.Tensor:
        seen.append((len(rows), rows.requires_grad))
        return head(replay, rows)

    again: list[int] = []
    compare = Session.compared_with

    def compared(session: Session, replay: Replay, batch: PairBatch, *asked: Any) -> Unpatched:
        unpatched = compare(session, replay, batch, *asked)
        if unpatched.narrowed is not unpatched.margins:
            again.append(batch.row.numel())
        return unpatched

    known: list[float] = []
    read_before = Continued.read_before

    def begun(continued: Continued, place: int, text: list[int]) -> list[float]:
        values = read_before(continued, place, text)
        known.extend(values)
        return values

    monkeypatch.setattr(Continued, "read_before", begun)
    monkeypatch.setattr(Session, "compared_with", compared)
    monkeypatch.setattr(Replay, "head", spied)
    policy, reference = models
    with OpenModels(policy, resolve_reference(policy, reference)).open() as opened:
        seen.clear()  # what opening the models tries is no row of the pairs
        request = AuditRequest(PAIRS, config, kind="full", probe_name="p")
        record = run_audit(opened, request, ReferenceCache()).record
    job = job_of(models, config, record)
    work = total(count(job, "full").values())
    written = 2 * 3 * 8  # continuations go through the model's own head
    # Whether a narrowed last layer rounds otherwise, and is read once more, is a matter of the machine; and how much of what
    # the policy writes is what the reference wrote, and is not read again, of the models.
    assert work.head_rows - written == sum(rows for rows, _ in seen) - sum(again) + len(known)
    assert work.head_backward_rows == sum(rows for rows, differentiated in seen if differentiated)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    shape = ModelShape.of(model)
    layers = find_layers(model)[1]
    assert shape.weights == sum(weight.numel() for weight in model.parameters())
    assert shape.layers == len(layers)
    products = sum(weight.numel() for weight in layers[0].parameters() if weight.dim() == 2)
    assert shape.layer_flops == 2 * products
    assert shape.spared_flops == 2 * (products - 2 * shape.width * shape.key)


def test_a_layers_matrix_products_are_those_that_torch_counts() -> None:
    model = tiny_model("llama", dtype=torch.float32, attn_implementation="eager")
    shape, rows, width = ModelShape.of(model), 2, 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(rows, width, dtype=torch.long))
    tokens = shape.layers * rows * width
    work = Work(tokens=tokens, meetings=shape.layers * rows * width**2, head_rows=rows * width)
    assert work.flops(shape) == counter.get_total_flops()


# -- how it grows ------------------------------------------------------------------------------------------------------


def shaped(**changes: int) -> ModelShape:
    return replace(ModelShape(8, 64, 64, 32, 1000, 40_000, 40_128, 64_000, 4), **changes)


def work_of(shape: ModelShape, pairs: int = 13, **more: Any) -> Work:
    job = Job.on(shape, random_pairs(pairs).pairs, AuditConfig(), Room("cpu", 2**30), **more)
    return total(count(job, "full").values())


GROWTH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layers": ({}, {"shape": shaped(layers=9)}),
    "pairs": ({}, {"pairs": 20}),
    "a patch of the embedding": ({"assumed": Assumed(embedding_moves=False)}, {}),
    "a lower layer is reconstructed": (
        {"assumed": Assumed(low_rank_layers=(7,))},
        {"assumed": Assumed(low_rank_layers=(1,))},
    ),
}


@pytest.mark.parametrize("case", GROWTH)
def test_more_of_anything_is_more_work(case: str) -> None:
    less, more = (work_of(**{"shape": shaped(), **options}) for options in GROWTH[case])
    assert less.tokens < more.tokens
    assert all(getattr(less, name) <= getattr(more, name) for name in ("head_rows", "backward_tokens", "singular"))
    assert less.flops(shaped()) < more.flops(shaped())


def test_a_wider_model_and_a_larger_vocabulary_are_more_products() -> None:
    work = work_of(shaped())
    wide = shaped(width=128, query=128, key=64, layer_matrices=160_000)
    assert work.flops(shaped()) < work.flops(shaped(vocabulary=2000)) < work.flops(wide)


def test_a_process_among_more_does_less_and_all_of_them_a_little_more() -> None:
    alone, one_of_two = work_of(shaped()), work_of(shaped(), ranks=2)
    job = Job.on(shaped(), PAIRS.pairs, AuditConfig.from_dict(QUICK), Room("cpu", 2**30), ranks=3)
    shares = [total(count(job, "full", rank=rank).values()).layer_tokens for rank in range(3)]
    undivided = layer_tokens(replace(job, ranks=1), "full")
    assert one_of_two.tokens < alone.tokens
    assert max(shares) < undivided < sum(shares) == layer_tokens(job, "full")


def test_whole_weights_are_not_brought_together_and_spread_ones_are() -> None:
    assert work_of(shaped(), ranks=2).gathers == 0
    spread = work_of(shaped(), ranks=2, spread=True)
    assert spread.gathers > 2 * 8
    assert spread.exchanges >= spread.gathers


def test_memory_of_rows_grows_with_pairs_and_that_of_streams_does_not() -> None:
    few, many = (
        foresee_memory(Job.on(shaped(), random_pairs(count).pairs, AuditConfig(), Room("cpu", 2**20)), "full")
        for count in (20, 60)
    )
    assert few.rows < many.rows
    assert few.device == pytest.approx(many.device, rel=0.3)
    rows = AuditConfig.from_dict({"spinal": {"max_rows": 32}})
    capped = foresee_memory(Job.on(shaped(), random_pairs(60).pairs, rows, Room("cpu", 2**20)), "full")
    assert capped.rows == (2 * 8 + 2 * 8) * 32 * 64 * 4, "both models' of 8 layers, and a block of one model's twice"


def test_a_process_keeps_the_rows_of_its_own_pairs() -> None:
    """However many processes there are, what one holds is at least the share of the busiest of them, and less than all."""
    config = AuditConfig.from_dict({"spinal": {"transport_rows": 16}})
    jobs = [
        Job.on(shaped(), random_pairs(60).pairs, config, Room("cpu", 2**16), ranks=ranks) for ranks in (1, 2, 4, 60)
    ]
    held = [foresee_memory(job, "full").rows for job in jobs]
    assert sorted(held, reverse=True) == held
    assert held[1] < 0.7 * held[0]
    for job in jobs:
        shares = [job.share(rank) for rank in range(job.ranks)]
        assert sum(shares) == pytest.approx(1.0)
    brought = [count(job, "full")["spectra"].brought_bytes for job in jobs]
    assert brought[0] == 0
    assert brought[1] > brought[2] > brought[3] > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_not_counted_is_refused(models: tuple[Any, Any]) -> None:
    shape, room = ModelShape.of(models[0]), Room("cpu", 2**30)
    with pytest.raises(ConfigurationError, match="at least one pair and one process; found 0 and 1"):
        Job.on(shape, (), AuditConfig(), room)
    with pytest.raises(ConfigurationError, match="found 13 and 0"):
        Job.on(shape, PAIRS.pairs, AuditConfig(), room, ranks=0)
    sites = AuditConfig.from_dict({"sites": [{"site": "block", "width": 2}]})
    with pytest.raises(ConfigurationError, match="expected no finer sites"):
        Job.on(shape, PAIRS.pairs, sites, room)
    with pytest.raises(ConfigurationError, match=r"of at least 1; found \{'layers': 0\}"):
        shaped(layers=0)
    with pytest.raises(ValueError, match="a rank of 0 to 0; found 1"):
        count(job_of(models, AuditConfig()), "health", rank=1)


def test_a_model_with_experts_is_refused() -> None:
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, num_local_experts=3,
    )  # fmt: skip
    with torch.device("meta"), pytest.raises(AnatomyError, match="MixtralForCausalLM has experts"):
        ModelShape.of(AutoModelForCausalLM.from_config(config))


# -- what a run makes of it --------------------------------------------------------------------------------------------


def test_a_full_audit_is_foreseen_from_a_look(models: tuple[Any, Any]) -> None:
    policy, reference = models
    config = AuditConfig.from_dict(QUICK)
    with OpenModels(policy, resolve_reference(policy, reference)).open() as opened:
        of_first, of_later = (full_per_look(opened, [PAIRS], config, first=first) for first in (True, False))
        sites = config.model_copy(update={"sites": AuditConfig.from_dict({"sites": [{"site": "head"}]}).sites})
        assert full_per_look(opened, [PAIRS], sites, first=True) is None
        assert of_first is not None and of_later is not None
        assert 4 < of_first < of_later < 4 * of_first
        assert more_memory(opened, PAIRS.subsample(3, 0), PAIRS, config) > 0


NOT_COUNTED = {
    **dict.fromkeys(
        ("mixtral", "mixtral:router_logits", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "olmoe", "granitemoe", "phimoe",
         "deepseek_v3", "jamba", "nemotron_h", "qwen3_next"),
        "has experts",
    ),
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "num_attention_heads; found"),
}  # fmt: skip
"""By family, why what it costs is not counted."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_every_family_the_shape_is_read_or_refused(name: str) -> None:
    """Configurations name their numbers in many ways; a run plans without the count where it cannot be had."""
    model = build(name, torch.float32)
    if name in NOT_COUNTED:
        with pytest.raises(AnatomyError, match=NOT_COUNTED[name]):
            ModelShape.of(model)
        return
    shape = ModelShape.of(model)
    assert all(isinstance(value, int) and value > 0 for value in vars(shape).values())
    # Layers that are not alike count as their mean, rounded.
    assert abs(shape.weights - sum(weight.numel() for weight in model.parameters())) <= shape.layers / 2


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_number_for_each_layer_is_refused(field: str) -> None:
    """As configurations of models that bring their own code may have; those of transformers check theirs."""
    model: Any = tiny_model("llama")
    vars(model.config)[field] = [4, 4, 2, 2]
    with pytest.raises(AnatomyError, match=r"one number for all layers; found .*\[4, 4, 2, 2\]"):
        ModelShape.of(model)
