"""Continuations: each token by a plain forward of the whole text, surprise from the definition, and what spoils them."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align_audit.auditing.audit import run_audit
from align_audit.auditing.measurements import generations
from align_audit.auditing.measurements.generations import Generations
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.kept import Continued
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.measures.continuations import repeated_share
from align_audit.models.generation import end_tokens
from align_audit.models.reference import resolve_reference
from align_audit.probes.pairs import ProbePair, ProbeSet
from align_audit.ranks import Ranks
from align_audit.record.audit_record import AuditRecord
from tests.helpers.audits import QUICK, session_of
from tests.helpers.tiny import VOCABULARY, perturbed, random_pairs, tiny_model

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


# -- what would break a model that writes ------------------------------------------------------------------------------


def lengthened(limit: int) -> AuditConfig:
    return AuditConfig.from_dict({**QUICK, "generations": {"prompts": 6, "max_new_tokens": limit}})


@pytest.mark.parametrize(("family", "name"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
@pytest.mark.parametrize("narrower", ["policy", "reference", "both"])
def test_no_prompt_is_continued_beyond_the_positions_of_either_model(family: str, name: str, narrower: str) -> None:
    """On a CUDA device a position behind the last one of a learned table ends the process."""
    reference = tiny_model(family, dtype=torch.float32, **{name: 26})
    policy = perturbed(reference, 0.3)
    policy.config = copy.deepcopy(policy.config)
    for model, role in ((policy, "policy"), (reference, "reference")):
        if narrower not in (role, "both"):
            setattr(model.config, name, 512)
    probes = random_pairs(12)
    short = [prompt for prompt in drawn(probes, 99) if len(prompt) <= 4]
    assert 0 < len(short) < 6
    said = looked(policy, reference, probes, lengthened(22)).generations
    assert said is not None
    assert said.prompts == len(short)
    assert math.isfinite(said.surprise.mean)
    record = looked(policy, reference, probes, lengthened(26))
    assert record.generations is None
    assert "go beyond the 26 positions that the models have" in record.reasons["generations"]
    assert math.isfinite(record.margins.kl.mean)


@pytest.mark.parametrize("wider", ["policy", "reference"])
def test_tokens_that_only_one_model_has_are_not_written(wider: str) -> None:
    """Those that were added for training: here they are the likeliest everywhere, and nothing changes."""
    reference = tiny_model("llama")
    policy = perturbed(reference, 0.3)
    plain = looked(policy, reference, random_pairs(6)).generations
    model: Any = policy if wider == "policy" else reference
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    with torch.no_grad():
        row = 100 * model.lm_head.weight[5]
        model.lm_head.weight[VOCABULARY:] = torch.stack([row, -row, row, -row])
    said = looked(policy, reference, random_pairs(6)).generations
    assert plain is not None
    assert said is not None
    for name in ("repetition", "length", "ended", "reference_repetition", "reference_length", "reference_ended"):
        assert getattr(said, name).mean == getattr(plain, name).mean, name
    # The reference says what is likely among all of its tokens.
    if wider == "policy":
        assert said.surprise.mean == pytest.approx(plain.surprise.mean)


def test_it_computes_as_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference, 0.1)
    inside: list[bool] = []
    real = type(policy).generate

    def generate(self: Any, **options: Any) -> Any:
        inside.append(torch.is_autocast_enabled("cpu"))
        return real(self, **options)

    monkeypatch.setattr(type(policy), "generate", generate)
    autocast = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    for options, expected in ((autocast, [True, True]), ({}, [False, False])):
        inside.clear()
        with OpenModels(policy, resolve_reference(policy, reference), **options) as models:
            run_audit(models, AuditRequest(random_pairs(4), CONFIG, kind="health"))
        assert inside == expected


@pytest.mark.parametrize(
    ("completions", "ends"),
    [
        ([[5, 6, 9], [7, 9]], {9}),  # appended by a trainer
        # A chat template: the end of the turn, and a newline (3) that texts hold as well.
        ([[5, 3, 6, 9, 3], [7, 9, 3]], {9}),
        ([[5, 3, 6, 9, 3], [3, 9, 3], [8, 9, 3]], {9}),
        ([[5, 9], [7, 8]], set()),  # cut somewhere
        ([[5, 5, 9, 9], [7, 9]], set()),  # it stands elsewhere, too
        ([[5, 9]], set()),
        ([[5, 9], []], set()),
    ],
)
def test_what_ends_a_text_is_what_ends_all_of_them_and_stands_nowhere_else(
    completions: list[list[int]], ends: set[int]
) -> None:
    assert end_tokens(SimpleNamespace(), completions) == ends
    assert end_tokens(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 2])), completions) == ends | {
        1,
        2,
    }


def test_both_models_stop_where_either_would() -> None:
    """A trainer may set the end of one of them alone."""
    reference = tiny_model("llama")
    policy = perturbed(reference, 0.3)
    probes = random_pairs(8)
    prompts = drawn(probes, 6)
    ends = {greedy(policy, prompts[0], set())[3], greedy(reference, prompts[1], set())[4]}
    for model, end in zip((policy, reference), sorted(ends), strict=True):
        model.generation_config.eos_token_id, model.config.eos_token_id = end, None
    said = looked(policy, reference, probes).generations
    assert said is not None
    for model, length in ((policy, said.length), (reference, said.reference_length)):
        assert length.mean == np.mean([len(greedy(model, prompt, ends)) for prompt in prompts])


def test_the_reference_reads_what_it_does_not_know_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that begins as the reference's own does is read from where it leaves that; and the numbers are the same."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy, probes = perturbed(reference, 0.05), random_pairs(8)
    rows: list[int] = []
    real = generations.token_logp

    def counted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        rows.append(len(target))
        return real(logits, target)

    monkeypatch.setattr(generations, "token_logp", counted)
    cache = ReferenceCache()
    said = looked(policy, reference, probes, cache=cache).generations
    (kept,) = cache._kept.values()
    assert kept.continued is not None and said is not None
    of_reference = sum(map(len, kept.continued.tokens))
    read = sum(rows) - of_reference
    rows.clear()
    monkeypatch.setattr(Continued, "read_before", lambda *_: [])
    plain = looked(policy, reference, probes).generations
    assert plain is not None
    assert 0 < read < sum(rows) - of_reference
    assert said.surprise.mean == pytest.approx(plain.surprise.mean, rel=1e-6)
    assert said.reference_surprise == plain.reference_surprise


# -- what breaks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_prompts_are_continued_one_by_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_model("llama")
    policy, cache = perturbed(reference, 0.3), ReferenceCache()
    plain = looked(policy, reference, random_pairs(6))
    real = generations.continue_greedily
    room = 1

    def continued(model: Any, prompts: Any, *rest: Any) -> Any:
        if len(prompts) > room:
            raise error
        return real(model, prompts, *rest)

    monkeypatch.setattr(generations, "continue_greedily", continued)
    assert looked(policy, reference, random_pairs(6)).generations == plain.generations
    room = 0
    record = looked(policy, reference, random_pairs(6), cache=cache)
    assert record.generations is None
    assert record.reasons["generations"] == "memory ran out, also with one prompt at a time"
    assert record.margins == plain.margins
    room = 6
    again = looked(policy, reference, random_pairs(6), cache=cache)
    assert again.generations == plain.generations, "there may be memory at the next look"


@pytest.mark.parametrize(("role", "tries"), [("reference", 1), ("policy", 2)])
@pytest.mark.parametrize("error", [IndexError("no cache"), ZeroDivisionError("no cache"), SystemExit("no cache")])
def test_a_reference_that_cannot_go_on_is_not_tried_again(role: str, tries: int, error: BaseException) -> None:
    reference = tiny_model("llama", dtype=torch.float32)
    policy, cache, tried = perturbed(reference, 0.1), ReferenceCache(), []

    def broken(**_: Any) -> Any:
        tried.append(role)
        raise error

    {"policy": policy, "reference": reference}[role].generate = broken
    for _ in range(2):
        record = looked(policy, reference, random_pairs(4), cache=cache)
        assert record.reasons["generations"] == "generate() failed: no cache"
    assert len(tried) == tries


class Lacking(Ranks):
    """The processes of a run of two, of which the other one has kept nothing."""

    def gather(self, value: Any) -> list[Any]:
        return [value, True]


def test_what_another_process_has_not_kept_is_made_again_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are spread are brought together by all of them, or by none."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference, 0.1)
    written: list[Any] = []
    real = generations.continue_greedily
    monkeypatch.setattr(
        generations, "continue_greedily", lambda model, *rest: written.append(model) or real(model, *rest)
    )
    probes = random_pairs(4)
    with OpenModels(policy, resolve_reference(policy, reference)) as models:
        task = AuditTask(session_of(models, probes, CONFIG), AuditRequest(probes, CONFIG), ReferenceCache())
        task.begin([Generations])
        task[Generations].look_closer(None)
        assert written == [reference, policy]
        task[Generations].look_closer(None)
        assert written[2:] == [policy]
        models.ranks = Lacking()
        task[Generations].look_closer(None)
        assert written[3:] == [reference, policy]


def test_processes_that_bring_weights_together_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each of them writes; and what is said of it is the same."""
    reference = tiny_model("llama")
    policy = perturbed(reference, 0.3)
    probes = random_pairs(4)
    end = greedy(policy, drawn(probes, 1)[0], set())[2]
    policy.generation_config.eos_token_id = reference.generation_config.eos_token_id = end
    asked: list[Any] = []
    real = generations.continue_greedily
    monkeypatch.setattr(
        generations,
        "continue_greedily",
        lambda model, prompts, count, ends, *rest: asked.append(ends) or real(model, prompts, count, ends, *rest),
    )
    parts = []
    for spread in (False, True):
        with OpenModels(policy, resolve_reference(policy, reference)) as models:
            task = AuditTask(session_of(models, probes, CONFIG), AuditRequest(probes, CONFIG), ReferenceCache())
            task.begin([Generations])
            models.spread = spread
            task[Generations].look_closer(None)
            parts.append(task[Generations].part())
    assert [bool(ends) for ends in asked] == [True, True, False, False]
    assert parts[0] == parts[1]
    assert parts[0][0] is not None
    assert parts[0][0].ended.mean > 0


def test_a_prompt_of_one_token_is_continued_once() -> None:
    """Many tokenizers begin every sequence with one: eight times the same text would be eight values without any spread."""
    reference = tiny_model("llama", dtype=torch.float32)
    pairs = tuple(ProbePair(place, (1, 5 + place, 7), (1, 20 + place, 8), 1, 1) for place in range(8))
    record = looked(perturbed(reference), reference, dataclasses.replace(random_pairs(2), pairs=pairs))
    assert record.provenance.groups == 8
    assert record.generations is not None and record.generations.prompts == 1
