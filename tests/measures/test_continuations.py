"""Repetition and ends of texts, from their tokens alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_audit.measures.continuations import GRAM, repeated_share, until_end

TOKENS = st.lists(st.integers(0, 5), max_size=40)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        (range(20), 0.0),
        ([7] * 6, 2 / 3),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 2 / 7),
        ([1, 2] * 8, 11 / 13),
    ],
)
def test_known_shares(tokens: list[int], expected: float) -> None:
    assert math.isclose(repeated_share(list(tokens)), expected)


@given(TOKENS)
def test_it_is_a_share_that_a_copy_raises_and_new_words_lower(tokens: list[int]) -> None:
    share = repeated_share(tokens)
    assert 0 <= share < 1
    if len(tokens) >= GRAM:
        assert repeated_share(tokens + tokens) > share
        assert repeated_share([*tokens, *range(100, 140)]) <= share


@given(TOKENS)
def test_by_counting(tokens: list[int]) -> None:
    """Each 4-gram that stood anywhere before, counted one by one."""
    starts = range(len(tokens) - 3)
    again = sum(any(tokens[i : i + 4] == tokens[j : j + 4] for j in range(i)) for i in starts)
    assert math.isclose(repeated_share(tokens), again / len(starts) if len(starts) else 0.0)


@given(TOKENS, st.frozensets(st.integers(0, 5)))
def test_a_text_ends_with_its_first_end(tokens: list[int], ends: frozenset[int]) -> None:
    text, ended = until_end(tokens, ends)
    assert text == tokens[: len(text)]
    assert ended == any(token in ends for token in tokens)
    assert not any(token in ends for token in text[:-1])
    assert ended or text == tokens
