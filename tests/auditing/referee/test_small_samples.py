"""Few pairs: means without intervals below eight groups, no claim below twenty-four."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from torch import nn

from align_audit import AuditRecord, ProbeSet, audit
from tests.helpers.misleading import asked, grouped_pairs, layer, probe_set, pushed, small_llama
from tests.helpers.tiny import random_pairs

REFERENCE = small_llama(layers=3, width=16, seed=2)
PROBES = random_pairs(24, seed=6, longest=5)


@cache
def planted() -> nn.Module:
    """Layer 1 carries three nats on every pair there is: nothing is easier to localize."""
    return pushed(REFERENCE, PROBES, layer(1), 3.0)


@cache
def record_of(count: int) -> AuditRecord:
    low_rank = {"layers": (1,), "ranks": (1,), "enabled": count < 8}
    return audit(planted(), REFERENCE, probe_set(PROBES.pairs[:count]), asked(low_rank=low_rank))


def estimates(path: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every estimate with an interval in a dumped record."""
    if isinstance(value, dict):
        if {"mean", "low", "high"} <= value.keys():
            yield path, value
        else:
            for key, item in value.items():
                yield from estimates(f"{path}.{key}", item)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from estimates(f"{path}.{place}", item)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_fewer_than_eight_pairs_have_means_and_no_interval(count: int) -> None:
    record = record_of(count)
    for name in ("reference", "policy", "shift", "kl", "entropy", "chosen_logp_change"):
        assert math.isfinite(getattr(record.margins, name).mean), name
    assert record.patching is not None
    assert all(math.isfinite(one.mean) for one in (*record.patching.effect, *record.patching.block_transplant))
    with_interval = [
        path
        for path, one in estimates("record", record.model_dump())
        if not path.startswith("record.controls.identity") and not (math.isnan(one["low"]) and math.isnan(one["high"]))
    ]
    assert with_interval == []


@pytest.mark.parametrize("count", [2, 4, 7])
def test_the_reason_names_how_many_independent_pairs_there_are(count: int) -> None:
    reason = record_of(count).margins.shift.reason
    assert reason is not None and re.search(rf"\b{count}\b", reason), reason


def test_the_number_named_is_that_of_prompts_where_pairs_share_them() -> None:
    pairs = grouped_pairs(groups=5, per_prompt=4)
    shift = audit(planted(), REFERENCE, pairs, asked()).margins.shift
    assert math.isfinite(shift.mean) and math.isnan(shift.low) and math.isnan(shift.high)
    assert shift.reason is not None and re.search(r"\b5\b", shift.reason), shift.reason


@pytest.mark.parametrize("count", [2, 4, 7, 8, 16, 23])
def test_fewer_than_twenty_four_pairs_claim_nothing(count: int) -> None:
    finding = record_of(count).finding
    assert finding is not None and not finding.localized and finding.layers == [], finding
    assert re.search(rf"\b{count}\b", finding.words), finding.words


def test_fewer_than_twenty_four_prompts_claim_nothing_however_many_pairs_they_have() -> None:
    pairs = grouped_pairs(groups=23, per_prompt=2, seed=1, prompt=2, alike=2)
    policy = pushed(REFERENCE, pairs, layer(1), 3.0)
    finding = audit(policy, REFERENCE, pairs, asked()).finding
    assert finding is not None and not finding.localized, finding.words


@pytest.mark.parametrize("count", [8, 12, 23])
def test_from_eight_pairs_there_are_intervals(count: int) -> None:
    record = record_of(count)
    assert record.patching is not None
    for one in (record.margins.shift, *record.patching.effect[1:], record.patching.block_transplant[1]):
        assert one.low < one.mean < one.high, one


def test_twenty_four_pairs_can_claim() -> None:
    finding = record_of(24).finding
    assert finding is not None and finding.localized and finding.layers == [1], finding


def claim_rests_on(probes: ProbeSet) -> bool:
    finding = audit(planted(), REFERENCE, probes, asked()).finding
    return finding is not None and finding.localized


def test_pairs_given_again_make_no_claim_possible() -> None:
    twelve = PROBES.pairs[:12]
    assert not claim_rests_on(probe_set([*twelve, *twelve, *twelve]))


def test_a_claim_rests_on_the_pairs_that_were_patched() -> None:
    """Forty pairs are there, but the transplants that would be claimed are of twelve."""
    pairs = random_pairs(40, seed=6, longest=4)
    policy = pushed(REFERENCE, pairs, layer(1), 3.0)
    record = audit(policy, REFERENCE, pairs, asked(patching={"exact_pairs": 12, "control_pairs": 10}))
    assert record.patching is not None and record.patching.attribution is not None
    assert record.patching.attribution.exact_pairs == 12
    assert record.finding is not None and not record.finding.localized, record.finding.words


def test_controls_of_few_pairs_have_no_interval_either() -> None:
    config = asked(patching={"control_pairs": 4}, low_rank={"layers": (1,), "ranks": (1, 2)})
    controls = audit(planted(), REFERENCE, PROBES, config).controls
    for control in (controls.noise, controls.reverse, controls.random_subspace):
        assert control.effect is not None and control.pairs == 4
        for one in control.effect:
            assert math.isnan(one.low) and math.isnan(one.high), one
        assert control.verdict != "passed", control.reason
