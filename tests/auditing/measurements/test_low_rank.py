"""What low-rank bases are fitted on is gathered in the first pass where the layers are named, else in one of its own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align_audit.auditing.measurements.subspaces import TokenGrams
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.measures.subspace import GramAccumulator
from align_audit.models.reference import resolve_reference
from align_audit.probes.pairs import ProbePair, ProbeSet
from tests.helpers.audits import QUICK_GENERATIONS, audited, session_of
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

PAIRS = random_pairs(7)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = tiny_model("llama")
    return perturbed(reference), reference


def config(layers: Any = "auto") -> AuditConfig:
    return AuditConfig.from_dict(
        {
            "batch_tokens": 100,
            "generations": QUICK_GENERATIONS,
            "low_rank": {"layers": layers, "ranks": (1, 2, 4)},
            "statistics": {"bootstrap_resamples": 100},
        }
    )


def test_both_ways_give_the_same_numbers_and_naming_the_layers_saves_a_pass(models: tuple[Any, Any]) -> None:
    resolved = resolve_reference(*models)
    found, arrays = audited(models[0], resolved, PAIRS, config())
    layers = sorted(found.low_rank["shift"])
    named, theirs = audited(models[0], resolved, PAIRS, config(layers))
    names = [name for name in arrays if "low_rank" in name or name.startswith("subspace.")]
    assert len(names) >= 2 * 2 * len(layers)
    for name in names:
        np.testing.assert_array_equal(theirs[name], arrays[name], err_msg=name)
    assert named.low_rank == found.low_rank
    # Both models, up to the highest of the layers.
    saved = 2 * (max(layers) + 1) / 4
    assert found.cost.forward_equivalents - named.cost.forward_equivalents > 0.5 * saved


def test_pairs_that_come_again_count_once(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After running out of memory pairs come again, in other batches, some of them already added."""
    real, calls = GramAccumulator.update, []

    def fails_once(self: GramAccumulator, rows: torch.Tensor) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("as if there were no more")
        real(self, rows)

    with OpenModels(models[0], resolve_reference(*models)) as opened:
        session = session_of(opened, PAIRS, config())
        once, again = TokenGrams(session, [0, 2]), TokenGrams(session, [0, 2])
        once.gather()
        monkeypatch.setattr(GramAccumulator, "update", fails_once)
        for group in ([0, 1, 2, 3], [0, 1], [2, 3, 4], [4, 5], [3, 5, 6]):
            batch = session.batch(group)
            with contextlib.suppress(torch.OutOfMemoryError):
                again.update(batch, *session.record_both(batch))
    assert len(calls) > 3
    found = again.take()
    for key, halves in once.take().items():
        for one, other in zip(halves, found[key], strict=True):
            assert one.rows == other.rows > 0
            torch.testing.assert_close(one.matrix, other.matrix, rtol=1e-6, atol=1e-9)
    assert again.take() == {}


def test_they_are_the_same_from_streams_that_an_earlier_audit_kept(models: tuple[Any, Any], tmp_path: Path) -> None:
    resolved, pairs = resolve_reference(*models), random_pairs(14)
    patching = {"exact_pairs": 8, "attribution_points": (0.0,), "keep_reference": True}
    settings = AuditConfig.from_dict({**config((0, 2)).to_dict(), "patching": patching})
    cache = ReferenceCache(tmp_path)
    work, found = [], []
    for _ in range(2):
        record, arrays = audited(models[0], resolved, pairs, settings, cache=cache)
        work.append(record.cost.forward_equivalents)
        found.append({name: values for name, values in arrays.items() if "low_rank" in name or "subspace" in name})
    assert work[1] < work[0], "nothing was read from what was kept"
    assert len(found[0]) == len(found[1]) >= 8
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values, err_msg=name)


def test_where_they_would_take_much_memory_they_are_gathered_apart(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve_reference(*models)
    passes: list[int] = []
    real = TokenGrams.gather
    monkeypatch.setattr(TokenGrams, "gather", lambda self, *rest: (passes.append(1), real(self, *rest))[1])
    runs = []
    for room in (True, False):
        monkeypatch.setattr(Session, "has_room", lambda self, size, room=room: size > 0 and room)
        runs.append(audited(models[0], resolved, PAIRS, config((0, 2)))[0])
        assert len(passes) == (0 if room else 1)
    assert runs[0].low_rank == runs[1].low_rank


@pytest.mark.parametrize("others", [(2,), ()], ids=["beside a rank", "alone"])
def test_the_whole_width_is_no_subspace_that_could_beat_another(others: tuple[int, ...]) -> None:
    """Random directions of the whole space do all there is to do: that is no failure of the fitted ones."""
    reference = tiny_model("llama")
    width = reference.config.hidden_size
    options = {
        "low_rank": {"ranks": (*others, width), "bases": ["shift"]}, "generations": {"enabled": False},
        "spinal": {"enabled": False}, "localization": {"enabled": False}, "statistics": {"bootstrap_resamples": 100},
    }  # fmt: skip
    policy, probes = copy.deepcopy(reference), random_pairs(24)
    for _ in range(5):
        policy.zero_grad()
        margin(policy, probes).backward()
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "layers.1." in name and weight.grad is not None:
                    weight += 0.1 * weight.grad / weight.grad.norm()
    policy.zero_grad()
    record, _ = audited(policy, reference, probes, AuditConfig.from_dict(options))
    control = record.controls.random_subspace
    assert record.patching.peak_layer == 1
    if others:
        assert control.verdict in ("passed", "failed"), control.reason
        assert "[2]" in control.reason and str(width) not in control.reason
    else:
        assert control.verdict == "not_run"
        assert f"the one rank of [{width}] is the model's whole width" in control.reason


def margin(model: Any, probes: Any) -> torch.Tensor:
    """The mean margin of the pairs, nats."""
    total = torch.zeros(())
    for pair in probes.pairs:
        for sign, ids, start in ((1, pair.chosen_ids, pair.chosen_start), (-1, pair.rejected_ids, pair.rejected_start)):
            tokens = torch.tensor([ids], device=next(model.parameters()).device)
            logp = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
            total = total + sign * logp.gather(-1, tokens[0, start:, None]).sum()
    return total / len(probes.pairs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_half_spans_no_more_than_its_rows_that_differ(dtype: torch.dtype, share: bool) -> None:
    """A position is one row wherever its whole prefix is the same: what batches round in it is no dimension more."""
    reference = tiny_model("llama", dtype=dtype)
    prompts = [(1, 5 + number, 20 + number) for number in range(8)]
    pairs = tuple(
        ProbePair(4 * number + place, (*prompt, 30 + place, 7), (*prompt, 40 + place, 8), 3, 3)
        for number, prompt in enumerate(prompts)
        for place in range(4)
    )
    probes = dataclasses.replace(random_pairs(2), pairs=pairs)
    settings = AuditConfig.from_dict(
        {
            **config((1,)).to_dict(),
            "patching": {"positions": "prompt"},
            "share_prompts": share,
            "low_rank": {"layers": (1,), "ranks": (8, 9, 10, 11)},
        }
    )
    policy = perturbed(reference)
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        # Of four prompts in a half: one first token, four second ones, four third ones.
        assert TokenGrams(session_of(models, probes, settings), (1,)).distinct == (9, 9)
    record, _ = audited(policy, reference, probes, settings)
    for curves in record.low_rank.values():
        curve = curves[1]
        assert [math.isnan(ratio) for ratio in curve.explained_variance_ratio] == [False, False, True, True]


def test_prompts_that_are_cut_differently_are_rows_of_their_own() -> None:
    """Of one group, and yet other tokens stand before their completions; and prompts that are cut to the same are one row."""
    reference = tiny_model("llama")
    rows = [
        {"prompt_ids": [*range(10 * prompt, 10 * prompt + 9)], "chosen_ids": [50] * length, "rejected_ids": [51, 50]}
        for prompt in range(1, 5)
        for length in range(3, 9)
    ]
    probes = ProbeSet.from_dataset(rows, None, max_length=9, truncation_mode="keep_end")
    assert probes.groups == 4
    settings = AuditConfig.from_dict(config((1,)).to_dict() | {"patching": {"positions": "last_prompt_token"}})
    policy = perturbed(reference)
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        session = session_of(models, probes, settings)
        grams = TokenGrams(session, (1,))
    prompts: tuple[set[Any], set[Any]] = (set(), set())
    for pair, half in zip(session.pairs, grams.halves.tolist(), strict=True):
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            if start:
                prompts[half].add(ids[:start])
    assert grams.distinct == tuple(map(len, prompts)) and min(grams.distinct) > 2
