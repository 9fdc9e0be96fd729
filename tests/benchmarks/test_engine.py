"""The engine benchmark: its contenders agree, its FLOPs are those that run, and it never drops a contender silently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import flops
from engine.contenders import CONTENDERS
from engine.contenders.common import Pair, make_batches
from engine.contenders.hooks import Hooks
from engine.job import DATA, Job, JobSpec, load_job, make_job, make_pairs, tokenize
from engine.main import main
from engine.scaling import exponent
from torch.utils.flop_counter import FlopCounterMode

from align_audit.lab import MODEL_DIR

SPEC = JobSpec(layers=3, width=64, vocab=97, pairs=5, max_tokens=40, dtype="float64")


@pytest.fixture(scope="module")
def job() -> Job:
    return make_job(SPEC, with_bases=True, random_tokens=True)


def contender(name: str, job: Job) -> Any:
    return CONTENDERS[name].load()(job.policy, job.reference)


@pytest.mark.parametrize("name", ["restart", "restart-sorted", "align_audit"])
def test_contenders_give_the_effects_of_hooks(job: Job, name: str) -> None:
    """METHODS §7: float64 in other shapes to 1e-7 of the summed |log p|; these models are float64 nearly throughout."""
    expected = contender("hooks", job).layer_sweep(job.pairs)
    found = contender(name, job).layer_sweep(job.pairs)
    scale = np.abs(expected.logps).sum(axis=1, keepdims=True)
    assert np.abs(expected.effects).max() > 1e-4  # the weights differ enough to see
    assert (np.abs(found.effects - expected.effects) / scale).max() < 1e-9
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-9)


@pytest.mark.parametrize("name", ["restart", "align_audit"])
def test_rank_sweep_gives_the_effects_of_hooks(job: Job, name: str) -> None:
    """The audit fits its own bases: that it agrees shows that those given to the others are the same."""
    assert job.bases is not None
    arguments = (job.pairs, job.bases, SPEC.ranks, job.halves)
    expected = contender("hooks", job).rank_sweep(*arguments)
    found = contender(name, job).rank_sweep(*arguments)
    assert expected.effects.shape == (SPEC.pairs, SPEC.layers, len(SPEC.ranks))
    scale = np.abs(expected.logps).sum(axis=1)[:, None, None]
    assert (np.abs(found.effects - expected.effects) / scale).max() < 1e-9


def test_float32_contenders_agree_within_the_stated_tolerance() -> None:
    job = make_job(JobSpec(layers=2, width=64, vocab=97, pairs=3, max_tokens=40), random_tokens=True)
    expected, found = (contender(name, job).layer_sweep(job.pairs) for name in ("hooks", "align_audit"))
    scale = np.abs(expected.logps).sum(axis=1, keepdims=True)
    assert (np.abs(found.effects - expected.effects) / scale).max() < 1e-6


def test_a_job_on_a_pretrained_model(tmp_path: Path) -> None:
    """The models are made again from its folder, and its tokenizer makes the tokens where there are texts."""
    spec = JobSpec.of_model(MODEL_DIR, pairs=3, max_tokens=60, dtype="float64", noise=0.02)
    made = make_job(spec, random_tokens=not (DATA / "hh-harmless").is_dir())
    made.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    job = load_job(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(made.policy.parameters(), job.policy.parameters(), strict=True))
    assert max(token for pair in job.pairs for token in pair.sides[0]) < spec.vocab
    expected, found = (contender(name, job).layer_sweep(job.pairs) for name in ("hooks", "align_audit"))
    assert np.abs(expected.effects).max() > 1e-4
    assert (np.abs(found.effects - expected.effects) / np.abs(expected.logps).sum(axis=1, keepdims=True)).max() < 1e-9
    with FlopCounterMode(display=False) as counter:
        for model in (job.policy, job.reference):
            model.set_attn_implementation("eager")
        contender("hooks", job).layer_sweep(job.pairs)
    assert flops.hooks_sweep(flops.Shape.of(spec), job.pairs).total == counter.get_total_flops()


def test_a_folder_without_such_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"found no config\.json"):
        JobSpec.of_model(tmp_path)
    (tmp_path / "config.json").write_text('{"n_layer": 2, "vocab_size": 10}', encoding="utf-8")
    with pytest.raises(SystemExit, match="found no num_hidden_layers, hidden_size in"):
        JobSpec.of_model(tmp_path)


@pytest.mark.parametrize("more", [["--scaling"], ["--layers", "2"], ["--vocab", "97"]])
def test_what_a_pretrained_model_says_itself_is_not_asked_for(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine", "--model", str(MODEL_DIR), *more])
    with pytest.raises(SystemExit):
        main()
    assert f"leave out {more[0]}" in capsys.readouterr().err


def test_flops_of_hooks_are_those_counted_while_they_run(job: Job) -> None:
    for model in (job.policy, job.reference):
        model.set_attn_implementation("eager")  # the counter does not know the fused kernel of CPUs
    try:
        with FlopCounterMode(display=False) as counter:
            contender("hooks", job).layer_sweep(job.pairs)
    finally:
        for model in (job.policy, job.reference):
            model.set_attn_implementation("sdpa")
    counted = flops.hooks_sweep(flops.Shape.of(SPEC), job.pairs)
    by_operator = counter.get_flop_counts()["Global"]
    assert counted.total == counter.get_total_flops()
    assert counted.attention == by_operator[torch.ops.aten.bmm]


def test_floor_is_what_a_minimal_sweep_of_one_pair_runs() -> None:
    """Counted by hand for a pair of 3 + 2 and 3 + 3 tokens and two layers."""
    shape = flops.Shape(layers=2, width=4, query=4, key=2, intermediate=6, vocab=10)
    pair = Pair((1, 2, 3), (4, 5), (6, 7, 8))
    tokens, predictions = 3 + 1 + 2, 1 + 1 + 2
    keys_values, rest = 2 * 4 * 4, 2 * 4 * (8 + 18)
    # Layer 0 runs in the policy and the reference; layer 1 in both and in the stream patched at 0.
    layers = 2 * tokens * (keys_values + rest) + 3 * (tokens * keys_values + predictions * rest)
    # Keys met by the prompt's queries: 1 + 2 + 3; by the completions': 4, and 4 + 5. By those that are read: 3, 4, 4 + 5.
    attention = 2 * 16 * (6 + 4 + 9) + 3 * 16 * (3 + 4 + 9)
    # The head reads the reference and the streams patched at 0 and 1.
    head = 3 * predictions * 2 * 4 * 10
    assert flops.floor_sweep(shape, [pair]) == flops.Flops(layers, attention, head)


def test_floor_with_the_embedding_patched_adds_one_whole_stream() -> None:
    shape = flops.Shape(layers=2, width=4, query=4, key=2, intermediate=6, vocab=10)
    pair = Pair((1, 2, 3), (4, 5), (6, 7, 8))
    less, more = (flops.floor_sweep(shape, [pair], embedding=flag) for flag in (False, True))
    assert more.head == less.head * 4 // 3
    # It runs layer 0 at all 6 tokens, and layer 1 as every other stream does.
    assert more.layers - less.layers == 6 * (32 + 208) + (6 * 32 + 4 * 208)


def test_ranks_multiply_the_streams_not_the_runs_of_both_models() -> None:
    shape = flops.Shape.of(SPEC)
    pairs, _ = make_pairs(SPEC)
    one, five = flops.floor_sweep(shape, pairs, 1).total, flops.floor_sweep(shape, pairs, 5).total
    assert one < five < 5 * one


def test_job_survives_its_files(job: Job, tmp_path: Path) -> None:
    job.save(tmp_path)
    loaded = load_job(tmp_path)
    assert loaded.spec == job.spec and loaded.pairs == job.pairs
    assert torch.equal(loaded.bases, job.bases) and np.array_equal(loaded.halves, job.halves)  # type: ignore[arg-type]
    for name, value in job.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value)


def test_policy_differs_in_every_matrix_and_in_nothing_else(job: Job) -> None:
    theirs = job.reference.state_dict()
    for name, value in job.policy.state_dict().items():
        assert torch.equal(value, theirs[name]) == (value.dim() < 2), name


def test_tokens_are_the_same_everywhere_and_in_the_vocabulary() -> None:
    ids = tokenize("Assistant: I'm sorry, interpretability!", 97)
    # Assist ant : I ' m sorry , interp retabi lity !
    assert len(ids) == 12 and min(ids) >= 3 and max(ids) < 97
    assert tokenize("Assist", 97) == ids[:1]


def test_batches_score_completions_only() -> None:
    (batch,) = make_batches([Pair((3, 4), (5, 6), (7,))])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6], [3, 4, 7, 0]]
    assert batch.completion.tolist() == [[False, False, True, True], [False, False, True, False]]


def test_hooks_are_removed(job: Job) -> None:
    Hooks(job.policy, job.reference).layer_sweep(job.pairs[:1])
    assert not any(layer._forward_hooks for model in (job.policy, job.reference) for layer in model.model.layers)


def test_exponent_of_a_power_law() -> None:
    assert exponent([12, 24, 36], [5 * n**1.5 for n in (12, 24, 36)]) == pytest.approx(1.5)


def test_a_contender_that_is_not_installed_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command calls, on the smallest job, with an interpreter that has nothing for one contender.

    That the command itself starts is seen in ``test_commands.py``.
    """
    out = tmp_path / "engine.json"
    command = [
        "engine", "--layers", "2", "--width", "64", "--vocab", "97", "--pairs", "2",
        "--max-tokens", "24", "--repeats", "1", "--threads", "1", "--contenders", "pyvene", "hooks",
        "--peer-python", f"pyvene={tmp_path / 'no-python'}", "--json", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    main()
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert "no-python" in rows["pyvene"]["problem"] and "pyvene" in capsys.readouterr().out
    assert rows["hooks"]["cpu_seconds"] and rows["hooks"]["max_difference"] == 0.0
