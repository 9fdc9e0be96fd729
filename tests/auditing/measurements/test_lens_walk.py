"""Transport from some of the rows: which ones, how many, and that nothing but the rows themselves decides it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from align_audit import AuditConfig, ProbeSet
from align_audit.auditing.measurements import lens_walk
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.lens_walk import LensWalk, travelled
from align_audit.auditing.once import audit_once
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.measures.row_sample import sampling_error
from align_audit.models.reference import resolve_reference
from align_audit.models.replay import head_rows
from align_audit.record.audit_record import Spinal
from tests.helpers import oracle_spinal
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

PORTION = 16
SHARE = 0.05
PROBES = random_pairs(12)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = tiny_model("llama")
    return perturbed(reference), reference


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny probe sets have more rows than are drawn."""
    monkeypatch.setattr(lens_walk, "PORTION", PORTION)
    monkeypatch.setattr(lens_walk, "SHARE", SHARE)


def traced(
    models: tuple[Any, Any], probes: ProbeSet = PROBES, cache: ReferenceCache | None = None, **changes: Any
) -> Spinal:
    off = {name: {"enabled": False} for name in ("patching", "low_rank", "localization")}
    spinal = {"gradient_concentration": False, "transport_rows": changes.pop("transport_rows", "auto")}
    config = AuditConfig.from_dict({**off, "generations": QUICK_GENERATIONS, "spinal": spinal, **changes})
    policy, reference = models
    taken = audit_once(policy, resolve_reference(policy, reference), probes, config, cache=cache or ReferenceCache())
    assert taken.record.spinal is not None
    return taken.record.spinal


@pytest.fixture(scope="module")
def full(models: tuple[Any, Any]) -> Spinal:
    return traced(models, transport_rows="all")


def test_all_rows_leave_nothing_open(full: Spinal) -> None:
    assert full.transport_rows == full.rows == full.rows_available > 8 * PORTION
    for errors in (full.policy.transport_stderr, full.reference.transport_stderr, full.transport_change_stderr):
        assert errors == [0.0] * 3
    assert full.delta_align_stderr == 0.0


def test_all_rows_give_what_the_definition_says(models: tuple[Any, Any], full: Spinal) -> None:
    for model, trace in zip(models, (full.policy, full.reference), strict=True):
        np.testing.assert_allclose(trace.transport, oracle_spinal.transport(model, PROBES.pairs), rtol=1e-5)


def test_some_rows_give_every_layer_within_the_share(models: tuple[Any, Any], full: Spinal) -> None:
    some = traced(models)
    assert some.transport_rows is not None
    assert PORTION < some.transport_rows < full.rows_available
    assert some.transport_rows % PORTION == 0
    for side in ("policy", "reference"):
        drawn, entire = getattr(some, side), getattr(full, side)
        assert drawn.contraction == entire.contraction, "spectra keep their rows"
        for mean, error, truth in zip(drawn.transport, drawn.transport_stderr, entire.transport, strict=True):
            assert 0 < error <= SHARE * mean
            assert 0 < abs(mean - truth) < 4 * error
    changed = np.array(some.policy.transport) - some.reference.transport
    apart = np.hypot(some.policy.transport_stderr, some.reference.transport_stderr)
    assert (np.array(some.transport_change_stderr) < apart).all(), "the same rows vary together"
    truth = np.array(full.policy.transport) - full.reference.transport
    assert (np.abs(changed - truth) < 4 * np.array(some.transport_change_stderr)).all()
    assert abs(some.delta_align - full.delta_align) < 4 * (some.delta_align_stderr or 0.0)


def test_a_number_of_rows_is_taken_as_it_is(models: tuple[Any, Any], full: Spinal) -> None:
    assert traced(models, transport_rows=20).transport_rows == 20
    more = traced(models, transport_rows=10**6)
    assert more.transport_rows == full.rows
    assert more.policy.transport == full.policy.transport


def test_other_rows_come_with_another_seed_only(models: tuple[Any, Any]) -> None:
    some = traced(models)
    assert traced(models).policy.transport == some.policy.transport
    assert traced(models, seed=1).policy.transport != some.policy.transport


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_decide_nothing(models: tuple[Any, Any], batch_tokens: int) -> None:
    some, again = traced(models), traced(models, batch_tokens=batch_tokens)
    assert again.transport_rows == some.transport_rows
    assert again.policy.transport == pytest.approx(some.policy.transport, rel=1e-6)
    assert again.reference.transport_stderr == pytest.approx(some.reference.transport_stderr, rel=1e-6)


def test_the_order_of_the_pairs_decides_nothing(models: tuple[Any, Any]) -> None:
    backwards = dataclasses.replace(PROBES, pairs=PROBES.pairs[::-1])
    assert traced(models, backwards).policy == traced(models).policy


def test_what_is_kept_of_the_reference_changes_no_number(models: tuple[Any, Any], tmp_path: Path) -> None:
    """A policy that asks for more rows, and one that asks for fewer, find the reference's of the audit before."""
    policy, reference = models
    wild = perturbed(reference, 5.0)
    alone = {name: traced((each, reference)) for name, each in (("near", policy), ("wild", wild))}
    rows = {name: spinal.transport_rows or 0 for name, spinal in alone.items()}
    assert rows["wild"] != rows["near"], "else nothing is asked for that is not known"
    for order in (["near", "wild", "near"], ["wild", "near", "wild"]):
        cache = ReferenceCache(tmp_path / order[0])
        for name in order:
            taken = traced((policy if name == "near" else wild, reference), cache=cache)
            assert taken == alone[name], (order, name)
            cache = ReferenceCache(tmp_path / order[0])  # as another process finds it


def walked_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether it is the policy, and how many rows, of each block that walks from now on."""
    walked: list[tuple[bool, int]] = []
    real = LensWalk._block_travelled

    def counted(self: LensWalk, replay: Any, block: torch.Tensor) -> np.ndarray:
        walked.append((replay is self.session.models.policy, len(block)))
        return real(self, replay, block)

    monkeypatch.setattr(LensWalk, "_block_travelled", counted)
    return walked


def in_all(walked: list[tuple[bool, int]], policy: bool) -> int:
    return sum(rows for of_policy, rows in walked if of_policy is policy)


@pytest.mark.parametrize("kind", ["same weights", "new adapters", "same weights, known reference"])
@pytest.mark.parametrize("asked", ["auto", 40, "all"])
def test_a_policy_that_is_its_reference_walks_one_block(
    kind: str, asked: Any, full: Spinal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both traces are the reference's, bit by bit, as they are where both walk."""
    reference, cache = tiny_model("llama"), ReferenceCache()
    policy, given = tiny_model("llama"), reference
    if kind == "new adapters":
        policy, given = get_peft_model(policy, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")), None
    if kind == "same weights, known reference":
        traced((policy, given), cache=cache, transport_rows=asked)
    with monkeypatch.context() as patched:
        patched.setattr(Behaviour, "identical", property(lambda _: False, lambda *_: None), raising=False)
        apart = walked_rows(patched)
        both = traced((policy, given), transport_rows=asked)
    assert in_all(apart, policy=True) == in_all(apart, policy=False) == both.transport_rows
    walked = walked_rows(monkeypatch)
    once = traced((policy, given), cache=cache, transport_rows=asked)
    assert once == both
    assert once.policy == once.reference
    block = PORTION if asked == "auto" else min(once.transport_rows or 0, head_rows("cpu", reference.config.vocab_size))
    assert in_all(walked, policy=True) == block
    assert in_all(walked, policy=False) == (0 if kind == "same weights, known reference" else once.transport_rows)


@pytest.mark.parametrize("moved", ["head", "norm"])
def test_equal_streams_under_another_head_walk_apart(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, policy = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        (policy.lm_head if moved == "head" else policy.model.norm).weight.mul_(1.01)
    walked = walked_rows(monkeypatch)
    spinal = traced((policy, reference))
    assert in_all(walked, policy=True) == in_all(walked, policy=False) == spinal.transport_rows
    for model, trace in ((policy, spinal.policy), (reference, spinal.reference)):
        entire = oracle_spinal.transport(model, PROBES.pairs)
        assert (np.abs(np.array(trace.transport) - entire) < 4 * np.array(trace.transport_stderr)).all()
    assert spinal.policy.contraction == spinal.reference.contraction
    assert spinal.policy.transport != spinal.reference.transport


class Rows:
    """Rows that have walked, and how many were asked for."""

    def __init__(self, distances: np.ndarray) -> None:
        self.distances, self.asked = distances, list[int]()

    def up_to(self, count: int, block: int | None = None) -> np.ndarray:
        self.asked.append(count)
        return self.distances[:count]


def test_the_worst_layer_of_either_model_decides() -> None:
    draw = np.random.default_rng(0)
    steady = 1.0 + 0.01 * draw.random((400, 3))
    restless = steady.copy()
    restless[:, 1] = draw.gamma(1.0, size=400)
    for both in ([steady, restless], [restless, steady]):
        walks = [Rows(each) for each in both]
        taken = travelled(walks, "auto", 400, 4000)
        assert walks[0].asked == walks[1].asked
        assert walks[0].asked[0] == PORTION < len(taken[0]) == len(taken[1])
    assert len(travelled([Rows(steady)], "auto", 400, 4000)[0]) == PORTION


@pytest.mark.parametrize("shape", [20.0, 4.0, 1.0])
def test_the_interval_covers_though_the_rows_so_far_decide_how_many_are_drawn(
    shape: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that vary by 22, 50 and 100 % of their mean, in clusters of 40 that resemble each other as rows of a pair do."""
    monkeypatch.setattr(lens_walk, "PORTION", 128)
    draw, population, draws = np.random.default_rng(0), 8000, 1000
    pairs = np.repeat(draw.gamma(shape, size=(population // 40, 2)), 40, axis=0)
    values = pairs + draw.gamma(shape, size=(population, 2))
    truth, covered, counts = values.mean(axis=0), np.zeros(2), set()
    for _ in range(draws):
        (sample,) = travelled([Rows(values[draw.permutation(population)])], "auto", population, population)
        covered += np.abs(sample.mean(axis=0) - truth) <= 1.96 * sampling_error(sample, population)
        counts.add(len(sample))
    assert (np.abs(covered / draws - 0.95) < 0.025).all(), covered
    assert max(counts) < population


def test_rows_may_be_fewer_than_the_share_asks_for() -> None:
    restless = np.random.default_rng(0).gamma(0.1, size=(50, 2))
    assert len(travelled([Rows(restless)], "auto", 50, 4000)[0]) == 50
    assert len(travelled([Rows(restless[:5])], "auto", 5, 5)[0]) == 5
    assert travelled([Rows(restless[:0])], "auto", 0, 0)[0].shape == (0, 2)


def test_what_is_not_finite_asks_for_no_more_rows() -> None:
    values = np.ones((100, 2))
    values[3, 0] = np.nan
    assert len(travelled([Rows(values)], "auto", 100, 100)[0]) == PORTION
