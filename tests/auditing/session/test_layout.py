"""One prompt for both completions: used where it changes nothing, refused with a reason elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align_audit.auditing.session import layout
from align_audit.auditing.session.layout import why_not_shared
from align_audit.auditing.session.open_models import OpenModels
from align_audit.config import AuditConfig
from align_audit.models.precision import rounding
from align_audit.models.reference import resolve_reference
from align_audit.models.verify import open_replay
from align_audit.probes.pairs import ProbePair, ProbeSet
from align_audit.ranks import Ranks
from tests.helpers.audits import QUICK_GENERATIONS, audited, session_of
from tests.helpers.tiny import VOCABULARY, perturbed, random_pairs, tiny_model
from tests.models.test_families import build

pytestmark = pytest.mark.device

TOLERANCE = 1e-6
SETTINGS: dict[str, Any] = {
    "low_rank": {"layers": (1,), "ranks": (1, 4)}, "statistics": {"bootstrap_resamples": 100},
    "generations": QUICK_GENERATIONS,
}  # fmt: skip


def run(policy: Any, reference: Any, probes: ProbeSet, **changes: Any) -> Any:
    config = AuditConfig.from_dict({**SETTINGS, **changes})
    return audited(policy, reference, probes, config)


@pytest.mark.parametrize("positions", ["all", "prompt", "completion", "last_prompt_token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_layouts_give_the_same_numbers(family: str, positions: str) -> None:
    reference = tiny_model(family)
    policy = perturbed(reference)
    patching = {"positions": positions}
    shared, ours = run(policy, reference, random_pairs(9), patching=patching, batch_tokens=90)
    apart, theirs = run(policy, reference, random_pairs(9), patching=patching, share_prompts=False, batch_tokens=70)
    assert shared.provenance.shared_prompts
    assert shared.provenance.layout_reason is None
    assert not apart.provenance.shared_prompts
    assert apart.provenance.layout_reason == "switched off (share_prompts)"
    assert shared.cost.forward_equivalents < apart.cost.forward_equivalents
    assert ours.keys() == theirs.keys()
    scale = float(np.abs(theirs["per_pair.chosen_logp"]).max())
    for name, values in theirs.items():
        if name in ("per_pair.identity",):  # measured on the first batch only, which is another one
            continue
        if name.startswith("subspace"):
            continue
        np.testing.assert_allclose(ours[name], values, rtol=1e-6, atol=1e-7 * scale, err_msg=name)
        assert np.nanmax(np.abs(values)) > 0, name
    for layer, curve in shared.low_rank["shift"].items():
        np.testing.assert_allclose(
            curve.explained_variance_ratio, apart.low_rank["shift"][layer].explained_variance_ratio, rtol=1e-6
        )
    np.testing.assert_allclose(shared.spinal.policy.contraction, apart.spinal.policy.contraction, rtol=1e-6)
    np.testing.assert_allclose(shared.spinal.policy.transport, apart.spinal.policy.transport, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", None),
        ("falcon:alibi", None),
        ("mpt", None),
        ("mamba", None),
        ("jamba", None),
        ("mistral", "with the prompt computed once the logits"),  # its window is shorter than the pairs
        ("gemma2", "with the prompt computed once the logits"),
    ],
)
def test_models_in_which_it_would_change_something(name: str, reason: str | None) -> None:
    found = why_not_shared(open_replay(build(name)), random_pairs(6).pairs, TOLERANCE)
    assert found is not None
    if reason is not None:
        assert found.startswith(reason)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn3"])
def test_kernels_that_may_not_take_a_mask_are_never_tried(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention adds a mask of booleans to its scores, and has ended the process with memory that it freed twice."""
    replay = open_replay(build("llama"))
    monkeypatch.setattr(replay.model.config, "_attn_implementation_internal", attention)
    monkeypatch.setattr(replay, "record", lambda *_: pytest.fail("it was tried"))
    found = why_not_shared(replay, random_pairs(6).pairs, TOLERANCE)
    assert found == f"{attention} is not given a mask in which completions do not see each other"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("phi3", {"sliding_window": None}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("mixtral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 40}),
        ("deepseek_v3", {}),
        ("cohere", {}),
    ],
)
def test_models_in_which_it_changes_nothing(name: str, changes: dict[str, Any]) -> None:
    assert why_not_shared(open_replay(build(name, **changes)), random_pairs(6).pairs, TOLERANCE) is None


def test_a_window_that_only_the_longest_pair_fills_is_noticed() -> None:
    """The other pairs are all shorter than the window: trying those would have shown nothing."""
    model = build("mistral", sliding_window=14)
    probes = random_pairs(30, longest=12)
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in probes]
    short = tuple(pair for pair, length in zip(probes, lengths, strict=True) if length <= 14)
    longest = probes.pairs[int(np.argmax(lengths))]
    assert max(lengths) > 14
    assert why_not_shared(open_replay(model), short, TOLERANCE) is None
    assert why_not_shared(open_replay(model), (*short, longest), TOLERANCE) is not None


def test_a_window_that_only_a_chosen_completion_fills_is_noticed() -> None:
    """Another pair takes more tokens in its row, but none of its sequences is as long; here only the chosen one is."""
    model = build("mistral", sliding_window=14)

    def pair(index: int, prompt: int, chosen: int, rejected: int) -> ProbePair:
        one, other = range(20, 20 + chosen), range(40, 40 + rejected)
        start = tuple(range(3, 3 + prompt))
        return ProbePair(index, (*start, *one), (*start, *other), prompt, prompt)

    bulky, long_chosen = pair(0, 2, 12, 12), pair(1, 2, 18, 2)
    assert why_not_shared(open_replay(model), [bulky], TOLERANCE) is None
    assert why_not_shared(open_replay(model), [bulky, long_chosen], TOLERANCE) is not None
    no_prompt = ProbePair(2, tuple(range(20, 38)), tuple(range(40, 45)), 0, 0)
    assert why_not_shared(open_replay(model), [bulky, no_prompt], TOLERANCE) is not None, "it would be a shared row too"


def test_sequences_cut_from_the_left_are_not_shared() -> None:
    reference = tiny_model("llama")
    probes = random_pairs(4)
    cut = ProbeSet(pairs=probes.pairs, source="x", dropped={}, max_length=64, truncation_mode="keep_end", held_out=None)
    record, _ = run(perturbed(reference), reference, cut)
    assert "keep_end" in record.provenance.layout_reason


def test_a_reference_of_another_build_is_tried_for_itself() -> None:
    """The reference takes shared rows, the policy has a window: together they do not."""
    reference = tiny_model("llama", sliding_window=None)
    policy = tiny_model("qwen3", num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    record, _ = run(policy, reference, random_pairs(4))
    assert record.provenance.layout_reason is not None
    assert record.provenance.vocab_size == VOCABULARY


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("no mask")])
def test_memory_that_ran_out_is_no_property_of_the_model(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is kept for the run."""

    def fails(*_: Any) -> Any:
        raise error

    replay = open_replay(tiny_model("llama"))
    monkeypatch.setattr(layout, "_rows", fails)
    if isinstance(error, ValueError):
        reason = why_not_shared(replay, random_pairs(4).pairs, TOLERANCE)
        assert reason == "the model does not take rows with a mask of their own (ValueError: no mask)"
    else:
        with pytest.raises(type(error)):
            why_not_shared(replay, random_pairs(4).pairs, TOLERANCE)


def test_eager_attention_takes_a_mask_that_is_added() -> None:
    """Its own code adds what it is given, so that one of booleans would mask nothing."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert why_not_shared(open_replay(model), random_pairs(6).pairs, TOLERANCE) is None


def test_in_16_bits_a_window_that_is_shorter_than_a_sequence_is_not_left_to_the_rounding() -> None:
    replay = open_replay(build("mistral", sliding_window=16))
    pairs = random_pairs(6, longest=20).pairs
    assert max(len(pair.chosen_ids) for pair in pairs) > 16
    reason = why_not_shared(replay, pairs, rounding(64, "cpu", torch.bfloat16))
    assert reason == "the model attends within a window of 16 tokens, and some sequences are longer"
    wide = open_replay(build("mistral", sliding_window=64))
    assert why_not_shared(wide, pairs, rounding(64, "cpu", torch.bfloat16)) is None


class Straying(Ranks):
    """The processes of a run of two, in the other of which replays stray at layer 1."""

    def gather(self, value: Any) -> list[Any]:
        return [value, [1]]


def test_processes_that_call_the_same_layers_try_the_same_ones() -> None:
    """After a replay has strayed on one of them, each tries every layer of each batch."""
    reference = tiny_model("llama")
    policy, probes = perturbed(reference), random_pairs(4)
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        session = session_of(models, probes, AuditConfig.from_dict(SETTINGS))
        batch = session.batch([0, 1])
        with session.as_reference() as replay:
            recording = replay.record(batch.model_inputs())
            models.spread, models.ranks = True, Straying()
            for _ in range(3):
                so_far = replay.layer_tokens
                assert session._replay_check(replay, recording, is_reference=True) == [1]
                assert replay.layer_tokens - so_far == replay.num_layers * batch.input_ids.numel()
