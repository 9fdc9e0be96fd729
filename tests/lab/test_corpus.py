"""The stories: the same for the same seed, varied, consistent within themselves, and of the promised shape."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from align_audit.lab.corpus import preference_pairs, stories


def flat(pairs: list[dict[str, str]]) -> list[str]:
    return [text for pair in pairs for text in pair.values()]


@pytest.mark.parametrize("draw", [stories, lambda n, seed: flat(preference_pairs(n, seed))], ids=["stories", "pairs"])
def test_the_seed_decides(draw: Callable[[int, int], list[str]]) -> None:
    assert draw(20, 3) == draw(20, 3)
    assert draw(20, 3) != draw(20, 4)
    assert draw(30, 3)[: len(draw(20, 3))] == draw(20, 3), "more of the same seed begins with the same"


def test_known_text() -> None:
    """The shipped model was trained on this grammar: who changes it must pretrain again, and then update this line."""
    assert stories(1, seed=0)[0] == (
        "Little Max came to the river every week to rest. His cousin Kofi was already there, picking flowers. "
        "He carried a soft kite and four pears in his bag. Max hoped to put on a show before dark. Dark "
        'clouds came, and rain fell on the river. "You may not have the kite," said Kofi. Max cried, and Kofi '
        "looked lonely. Max lost the soft kite and missed it."
    )


def test_stories_are_varied() -> None:
    texts = stories(2000, seed=0)
    assert len(set(texts)) == len(texts)
    assert len({text.split(". ")[0] for text in texts}) > 1000, "first sentences"
    assert len({word for text in texts for word in re.findall(r"[A-Za-z]+", text)}) > 400
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 40
    assert max(lengths) <= 100


def test_texts_are_well_formed() -> None:
    for text in stories(500, seed=1):
        assert not re.search(r"[{}]|\s\s|^\s|\s$", text), text
        assert text.isascii()
        for sentence in re.split(r"(?<=[.!?])\s(?![a-z])", text):
            assert re.match(r'"?[A-Z]', sentence), sentence
        assert text.count('"') % 2 == 0
        assert not re.search(r"\b(\w+) and \1\b|\ba [aeiou]|\ban (?!hour)[^aeiou]", text), text


def test_a_story_keeps_to_its_people_and_things() -> None:
    """Looking back must pay: every name in a continuation stands in its prompt, and some word is told again."""
    named = r"(?:said|told|asked|forgave|mocked|thanked|blamed) ([A-Z][a-z]+)"
    seen = 0
    for pair in preference_pairs(500, seed=1):
        for side in ("chosen", "rejected"):
            for name in re.findall(named, pair[side]):
                seen += 1
                assert re.search(rf"\b{name}\b", pair["prompt"]), pair
    assert seen > 500


def test_pairs_differ_after_a_common_prompt() -> None:
    pairs = preference_pairs(500, seed=0)
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected"}
        assert pair["chosen"] != pair["rejected"]
        assert not pair["prompt"].endswith(" "), "a token could span the boundary"
        assert pair["chosen"].startswith(" ")
        assert pair["rejected"].startswith(" ")
        assert not pair["chosen"].startswith("  ")
    difference = [len(pair["chosen"].split()) - len(pair["rejected"].split()) for pair in pairs]
    assert sum(value > 0 for value in difference) > 150, "often longer chosen"
    assert sum(value < 0 for value in difference) > 150, "often longer rejected"
    assert abs(sum(difference) / len(pairs)) < 2, "length does not give the preference away"
    assert len({len(pair["prompt"].split()) for pair in pairs}) > 15


def test_moods_are_on_their_side() -> None:
    happy, sad = "best friends|with a smile|everyone cheered", "bitter enemies|in tears|nobody cared"
    pairs = preference_pairs(500, seed=2)
    for right, wrong, side in ((happy, sad, "chosen"), (sad, happy, "rejected")):
        assert sum(bool(re.search(right, pair[side])) for pair in pairs) > 50
        assert not any(re.search(wrong, pair[side]) for pair in pairs)


def test_both_moods_occur_equally_in_the_corpus() -> None:
    texts = stories(3000, seed=5)
    happy = sum(bool(re.search("hand in hand|with a smile|was safe", text)) for text in texts)
    sad = sum(bool(re.search("all alone|in tears|was lost", text)) for text in texts)
    assert happy > 300
    assert 0.8 < happy / sad < 1.25
