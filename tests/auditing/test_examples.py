"""What changed in text: the right pairs, and of each token what a plain forward of both models says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align_audit import AuditConfig, ProbeSet
from align_audit.auditing.examples import MOST_OF_PROMPT, MOST_TOKENS, MovedPair, moved_most, pair_texts
from align_audit.probes.pairs import ProbePair
from align_audit.record.pair_texts import PairText, PairTexts
from tests.helpers.audits import QUICK, audited_whole
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import perturbed, tiny_model

Models = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def models() -> Models:
    """A policy and its reference, of the vocabulary of the tokenizer."""
    reference = tiny_model("llama", vocab_size=512)
    return perturbed(reference), reference


@functools.cache
def pairs(count: int = 9) -> ProbeSet:
    endings = ["Paris", "a little dog", "😀 or 東京", "the sky, the world"]
    rows = [
        {
            "prompt": f"What is {at}?",
            "chosen": f" It is {endings[at % 4]}.",
            "rejected": f" No {endings[-at % 3]}" + "!" * at,
        }
        for at in range(count)
    ]
    return ProbeSet.from_dataset(rows, make_tokenizer())


def texts(models: Models, probes: ProbeSet, kind: str = "health", **changes: Any) -> PairTexts | None:
    config = AuditConfig.from_dict({**QUICK, **changes})
    result = audited_whole(*models, probes, config, kind=kind)
    return None if result.texts is None else result.texts()


def of(models: Models, probes: ProbeSet, **changes: Any) -> PairTexts:
    made = texts(models, probes, **changes)
    assert made is not None
    return made


def token_changes(models: Models, ids: tuple[int, ...], start: int) -> list[float]:
    """log π − log ρ of ``ids[start:]``, by one plain forward of each; NaN at position 0."""
    logp = []
    for model in models:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logp.append([float(scores[at - 1, ids[at]]) if at else float("nan") for at in range(start, len(ids))])
    return [policy - reference for policy, reference in zip(*logp, strict=True)]


def shift(models: Models, pair: ProbePair) -> float:
    chosen = token_changes(models, pair.chosen_ids, pair.chosen_start)
    rejected = token_changes(models, pair.rejected_ids, pair.rejected_start)
    return float(np.nansum(chosen) - np.nansum(rejected))


def same(left: PairTexts, right: PairTexts) -> bool:
    """Equal texts, and changes equal but for rounding."""

    def plain(made: PairTexts) -> Any:
        return made.model_dump(exclude={"lost": {"__all__": _NUMBERS}, "gained": {"__all__": _NUMBERS}})

    numbers = [
        [value for pair in made.lost + made.gained for value in
         [pair.shift, *(token.change for token in pair.chosen + pair.rejected)]]
        for made in (left, right)
    ]  # fmt: skip
    return plain(left) == plain(right) and np.allclose(*numbers, atol=2e-5, equal_nan=True)


_NUMBERS = {"shift": True, "chosen": {"__all__": {"change"}}, "rejected": {"__all__": {"change"}}}


def test_every_tokens_change_is_that_of_a_plain_forward(models: Models) -> None:
    probes = pairs()
    made = of(models, probes, examples={"pairs": 9})
    assert len(made.lost) + len(made.gained) == 9
    by_index = {pair.index: pair for pair in probes}
    for text in made.lost + made.gained:
        pair = by_index[text.pair]
        assert text.shift == pytest.approx(shift(models, pair), abs=1e-9)
        for side, ids, start in (
            (text.chosen, pair.chosen_ids, pair.chosen_start), (text.rejected, pair.rejected_ids, pair.rejected_start),
        ):  # fmt: skip
            tokenizer: Any = probes.tokenizer
            assert "".join(token.text for token in side) == tokenizer.decode(ids[start:])
            expected, place = token_changes(models, ids, start), 0
            for token in side:  # each piece takes as many tokens as its text does
                tokens = len(tokenizer.encode(token.text)) if "<eos>" not in token.text else 1
                assert token.change == pytest.approx(sum(expected[place : place + tokens]), abs=2e-5)
                place += tokens
            assert place == len(expected)
        assert text.prompt == f"What is {text.pair}?"
        assert text.chosen_tokens is text.rejected_tokens is None


def test_the_pairs_are_those_that_moved_most(models: Models) -> None:
    shifts = {pair.index: shift(models, pair) for pair in pairs()}
    order = sorted(shifts, key=shifts.__getitem__)
    made = of(models, pairs(), examples={"pairs": 2})
    assert [text.pair for text in made.lost] == [at for at in order[:2] if shifts[at] < 0] != []
    assert [text.pair for text in made.gained] == [at for at in order[:-3:-1] if shifts[at] > 0] != []


@pytest.mark.parametrize(
    "changes", [{"batch_tokens": 1}, {"batch_tokens": 100_000}, {"share_prompts": False}, {"kind": "full"}]
)
def test_no_batch_and_no_kind_of_audit_changes_them(changes: dict[str, Any], models: Models) -> None:
    assert same(of(models, pairs(), **changes), of(models, pairs(), batch_tokens=90))


def test_nor_does_the_order_of_the_pairs_or_one_that_comes_twice(models: Models) -> None:
    probes = pairs()
    turned = replace(probes, pairs=(*probes.pairs[::-1], *(replace(pair, index=50) for pair in probes.pairs[:2])))
    made = of(models, turned, examples={"pairs": 20})
    assert same(made, of(models, probes, examples={"pairs": 20}))
    named = [text.pair for text in made.lost + made.gained]
    assert len(named) == len(set(named)) == 9


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_few_pairs_none_is_in_both_lists(count: int, models: Models) -> None:
    made = of(models, pairs()[:count])
    lost, gained = ([text.pair for text in texts] for texts in (made.lost, made.gained))
    assert not set(lost) & set(gained)
    assert len(lost + gained) == len(set(lost + gained)) >= min(count, 3), "three of five are of one sign"
    assert all(text.shift < 0 for text in made.lost)
    assert all(text.shift > 0 for text in made.gained)


def test_equal_models_have_moved_no_pair(models: Models) -> None:
    made = of((perturbed(models[1], scale=0.0), models[1]), pairs())
    assert (made.lost, made.gained) == ([], [])


def test_what_is_not_known_is_ranked_nowhere_and_what_is_infinite_first() -> None:
    shifts = np.array([np.nan, 1.0, -np.inf, -2.0, 0.0, np.inf, 1.0])
    assert moved_most(shifts, 9) == ([2, 3], [5, 1, 6])
    assert moved_most(shifts, 1) == ([2], [5])


def test_0_keeps_no_text_and_no_numbers_of_tokens(models: Models) -> None:
    for kind in ("health", "full"):
        assert texts(models, pairs(), kind=kind, examples={"pairs": 0}) is None


def test_without_a_tokenizer_tokens_are_ids(models: Models) -> None:
    made = of(models, replace(pairs(), tokenizer=None))
    text, pair = made.lost[0], pairs()[made.lost[0].pair]
    assert [token.text for token in text.chosen] == [f"⟨id {token}⟩" for token in pair.chosen_ids[pair.chosen_start :]]
    expected = token_changes(models, pair.chosen_ids, pair.chosen_start)
    assert [token.change for token in text.chosen] == pytest.approx(expected, abs=2e-5)


def test_a_token_that_nothing_predicts_has_no_change(models: Models) -> None:
    cut = ProbeSet((ProbePair(0, (5, 6, 7), (5, 8, 9), 0, 0),), "a", {}, 3, "keep_end", None)
    made = of(models, cut)
    (text,) = made.lost + made.gained
    assert text.prompt == ""
    assert [token.change for token in text.chosen] == pytest.approx(
        token_changes(models, (5, 6, 7), 0), abs=2e-5, nan_ok=True
    )
    assert np.isnan(text.chosen[0].change)


def clipped(prompt: str, chosen: str) -> PairText:
    tokenizer = make_tokenizer()
    (before, after), (rejected,) = (tokenizer([prompt, chosen])["input_ids"], tokenizer(["No"])["input_ids"])
    pair = ProbePair(7, (*before, *after), (*before, *rejected), len(before), len(before))
    moved = MovedPair(pair, -1.0, np.ones(len(after), np.float32), np.ones(len(rejected), np.float32))
    return pair_texts([moved], [], tokenizer).lost[0]


def test_long_texts_are_cut_and_say_so() -> None:
    tokenizer: Callable[..., Any] = make_tokenizer()
    prompt, completion = "x" * 300 + "y" * MOST_OF_PROMPT, "q" * (MOST_TOKENS - 2) + "😀" + "z" * 40
    text = clipped(prompt, completion)
    assert text.prompt == "…" + "y" * MOST_OF_PROMPT
    assert text.chosen_tokens == len(tokenizer(completion)["input_ids"]) == MOST_TOKENS + 42
    assert text.rejected_tokens is None
    # The character that would be split is left out with the rest.
    assert "".join(token.text for token in text.chosen) == "q" * (MOST_TOKENS - 2)
    assert sum(token.change for token in text.chosen) == MOST_TOKENS - 2


def test_texts_that_just_fit_are_whole() -> None:
    text = clipped("y" * MOST_OF_PROMPT, "q" * (MOST_TOKENS - 4) + "😀")
    assert text.prompt == "y" * MOST_OF_PROMPT
    assert text.chosen_tokens is None
    assert text.chosen[-1].text == "😀"
    assert text.chosen[-1].change == 4.0
