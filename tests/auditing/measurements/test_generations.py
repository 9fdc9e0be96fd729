"""Continuations: each token by a plain forward of the whole text, surprise from the definition, and what spoils them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align_audit.auditing.audit import run_audit
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.measures.continuations import repeated_share
from align_audit.models.reference import resolve_reference
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord
from tests.helpers.audits import QUICK
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

NEW = 12
CONFIG = AuditConfig.from_dict({**QUICK, "generations": {"prompts": 6, "max_new_tokens": NEW}})


def looked(
    policy: nn.Module, reference: nn.Module, probes: ProbeSet, config: AuditConfig = CONFIG, cache: Any = None
) -> AuditRecord:
    """A health audit."""
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        return run_audit(models, AuditRequest(probes, config, kind="health"), cache).record


@torch.no_grad()
def greedy(model: Any, prompt: list[int], ends: set[int]) -> list[int]:
    """From the definition: one forward of the whole text for each token."""
    text: list[int] = []
    while len(text) < NEW and not (text and text[-1] in ends):
        logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
    return text


@torch.no_grad()
def surprise(model: Any, prompt: list[int], text: list[int]) -> float:
    logp = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0].double().log_softmax(-1)
    return -float(np.mean([float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(text)]))


def drawn(probes: ProbeSet, count: int) -> list[list[int]]:
    """The prompts that are continued: one a group, the pairs with the smallest hashes."""
    from align_audit.probes.pairs import in_canonical_order

    prompts: dict[int, list[int]] = {}
    for pair in in_canonical_order(probes.pairs)[0]:
        prompts.setdefault(pair.group, list(pair.chosen_ids[: pair.chosen_start]))
    return list(prompts.values())[:count]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.float32), ("gemma2", torch.float64)]
)
def test_they_are_what_plain_forwards_write(family: str, dtype: torch.dtype) -> None:
    """With prompts of several lengths, in float32 padded on the left, and an end that some texts meet."""
    reference = tiny_model(family, dtype=dtype)
    policy = perturbed(reference, 0.3)
    probes = random_pairs(10)
    prompts = drawn(probes, 6)
    assert len({len(prompt) for prompt in prompts}) > 1
    free = [greedy(policy, prompt, set()) for prompt in prompts]
    end = free[0][NEW // 2]
    for model in (policy, reference):
        model.generation_config.eos_token_id = end
        model.config.eos_token_id = None
    record = looked(policy, reference, probes)
    said = record.generations
    assert said is not None
    assert (said.prompts, said.max_new_tokens) == (6, NEW)
    for model, names in (
        (policy, ("repetition", "length", "ended", "surprise")),
        (reference, ("reference_repetition", "reference_length", "reference_ended", "reference_surprise")),
    ):
        texts = [greedy(model, prompt, {end}) for prompt in prompts]
        expected = (
            np.mean([repeated_share(text) for text in texts]),
            np.mean([len(text) for text in texts]),
            np.mean([text[-1] == end for text in texts]),
            np.mean([surprise(reference, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]),
        )
        for name, value in zip(names, expected, strict=True):
            assert getattr(said, name).mean == pytest.approx(value, rel=1e-5 if dtype == torch.float32 else 1e-7), name
    assert 0 < said.ended.mean < 1


def test_a_models_own_settings_are_set_aside_and_given_back() -> None:
    """Penalties, sampling, a length: none of it is greedy."""
    reference = tiny_model("llama", dtype=torch.float64)
    policy = perturbed(reference, 0.3)
    plain = looked(policy, reference, random_pairs(8)).generations
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 5, "repetition_penalty": 5.0, "max_length": 3}
    policy.generation_config.update(**settings, no_repeat_ngram_size=1, num_beams=2)
    kept = policy.generation_config.to_dict()
    state = torch.get_rng_state()
    said = looked(policy, reference, random_pairs(8)).generations
    assert said is not None
    assert plain is not None
    assert said.model_dump_json() == plain.model_dump_json()
    assert policy.generation_config.to_dict() == kept
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_models_write_the_same_and_the_order_of_pairs_changes_nothing() -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference, 0.3)
    probes = random_pairs(9)
    turned = ProbeSet(probes.pairs[::-1], probes.source, {}, probes.max_length, probes.truncation_mode, None)
    said, other = (looked(policy, reference, each).generations for each in (probes, turned))
    assert said is not None
    assert other is not None
    assert other.model_dump_json() == said.model_dump_json()
    same = looked(copy.deepcopy(reference), reference, probes)
    assert same.generations is not None
    assert same.generations.repetition == same.generations.reference_repetition
    assert same.generations.surprise.mean == same.generations.reference_surprise.mean
    assert same.reference_check.same_weights
    assert same.margins.kl.mean == 0.0
    assert same.margins.accuracy.mean == 0.0


def test_the_reference_is_run_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second look on only its head computes; and another reference is another run."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy, later = perturbed(reference, 0.1), perturbed(reference, 0.2)
    probes, cache = random_pairs(8), ReferenceCache()
    calls: list[int] = []
    reference.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    looked(policy, reference, probes, cache=cache)
    first = len(calls)
    calls.clear()
    second = looked(later, reference, probes, cache=cache)
    # Opening it tries a few tokens, and it reads the policy's continuations.
    assert 0 < len(calls) < first
    assert second.margins.model_dump_json() == looked(later, reference, probes).margins.model_dump_json()
    moved = perturbed(reference, 0.05)
    again = looked(later, moved, probes, cache=cache)
    assert again.margins.model_dump_json() == looked(later, moved, probes).margins.model_dump_json()
    assert again.margins.reference != second.margins.reference


def test_what_cannot_be_continued_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy, probes = perturbed(reference, 0.1), random_pairs(8)
    off = AuditConfig.from_dict({**QUICK, "generations": {"enabled": False}})
    record = looked(policy, reference, probes, off)
    assert (record.generations, record.reasons["generations"]) == (None, "switched off (generations.enabled)")

    def broken(self: Any, **_: Any) -> Any:
        raise ValueError("this model has no cache")

    monkeypatch.setattr(type(policy), "generate", broken)
    record = looked(policy, reference, probes)
    assert record.generations is None
    assert record.reasons["generations"] == "generate() failed: this model has no cache"
    assert math.isfinite(record.margins.kl.mean)


def test_a_policy_of_nan_says_so_and_ends_no_audit() -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference, 0.1)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.fill_(math.nan)
    record = looked(policy, reference, random_pairs(8))
    assert record.generations is not None
    assert math.isfinite(record.generations.surprise.mean), "whatever it writes, the reference is sound"
    assert math.isnan(record.margins.policy.mean)
