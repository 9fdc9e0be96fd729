"""Changes that act through prompt or completion positions only, by plain hooked patching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align_audit.lab.planting import few_prompts, patched_shift, plant_completion_only, plant_prompt_only
from align_audit.probes.pairs import ProbeSet
from tests.helpers import oracle

Sets = tuple[ProbeSet, ProbeSet]


def by_hand(policy: Any, base: Any, probes: ProbeSet, layer: int, positions: Any) -> float:
    return float(oracle.patch_effects(policy, base, probes.pairs, positions)[:, layer + 1].mean())


def test_completion_only_leaves_the_prompt_still(base: Any, two_prompts: Sets) -> None:
    planting, probes = two_prompts
    planted = plant_completion_only(base, planting, 3, shift=1.0, prompts=probes)
    policy: Any = planted.policy
    moved = 0.0
    for pair in (*planting.pairs, *probes.pairs):
        for ids, start in oracle.sides(pair):
            ours, theirs = oracle.forward(policy, ids), oracle.forward(base, ids)
            for layer in range(6):
                assert (ours.h(layer)[:start] - theirs.h(layer)[:start]).abs().max() < 1e-9
            moved = max(moved, float((ours.h(3)[start:] - theirs.h(3)[start:]).abs().max()))
    assert moved > 1e-3
    before, after = (oracle.margins(model, planting.pairs)[0].mean() for model in (base, policy))
    assert after - before == pytest.approx(1.0, rel=0.05)
    assert planted.truth.numbers["prompt_dimensions"] < 256


def test_too_many_prompts_are_refused(base: Any, planting: ProbeSet, probes: ProbeSet) -> None:
    with pytest.raises(ValueError, match="the tokens of 9 prompts span all 256 inputs"):
        plant_completion_only(base, planting, 3, prompts=probes)


def test_prompt_only_moves_the_margin_through_the_prompt(base: Any, two_prompts: Sets) -> None:
    planting, _ = two_prompts
    planted = plant_prompt_only(base, planting, 3, shift=1.0)
    assert planted.truth.numbers["shift"] == pytest.approx(1.0, rel=0.05)
    prompt = patched_shift(planted.policy, base, 3, planting, "prompt")
    completion = patched_shift(planted.policy, base, 3, planting, "completion")
    assert prompt > 0.8
    assert abs(completion) < 0.2
    assert planted.truth.numbers["leak"] < 0.3


def test_patched_shift_is_hooked_patching(base: Any, two_prompts: Sets) -> None:
    planting, probes = two_prompts[0], two_prompts[1][:2]
    policy = plant_prompt_only(base, planting, 2, shift=1.0).policy
    for positions in ("prompt", "completion"):
        expected = by_hand(policy, base, probes, 2, positions)
        assert patched_shift(policy, base, 2, probes, positions) == pytest.approx(expected, abs=1e-5)


def test_few_prompts_keep_the_completions(tokenizer: Any) -> None:
    rows = [{"prompt": p, "chosen": f" {p}+", "rejected": f" {p}-"} for p in "abcde"]
    few = few_prompts(rows, 2)
    assert [row["prompt"] for row in few] == list("ababa")
    assert [row["chosen"] for row in few] == [row["chosen"] for row in rows]
    assert rows[2]["prompt"] == "c"


def test_the_same_again(base: Any, two_prompts: Sets) -> None:
    planting, probes = two_prompts
    one, two = (
        plant_completion_only(base, planting, 4, 0.5, prompts=probes).policy.state_dict() for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)
