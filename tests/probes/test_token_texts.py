"""Tokens as text: joined they are the text, whatever the tokenizer, and no piece is half a character."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align_audit.probes.token_texts import decoded, text_pieces
from tests.helpers.probe_tokenizer import EOS, make_tokenizer

TEXTS = [
    "Hello world, the little house.",
    "a 😀 b é 東京 \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "😀",
    "  two  spaces\n\n\ttab ",
    "<script>alert(1)</script>\x00\x1b[31m\u2028\u202e<eos>",
    "a \N{REPLACEMENT CHARACTER} stands here",
]


def byte_level() -> Any:
    return make_tokenizer()


def sentence_pieces() -> Any:
    """Words begin with ▁, which the decoder drops at a text's start; characters out of the vocabulary are bytes."""
    words = [
        "<unk>",
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdehlnortuwHT,.",
        "▁He",
        "llo",
        "▁wor",
    ]
    backend = Tokenizer(
        models.BPE(
            {word: at for at, word in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_text_and_no_character_is_split(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in pieces) == decoded(tokenizer, ids) == tokenizer.decode(ids)
    assert sum(tokens for _, tokens in pieces) == len(ids)
    assert all(piece for piece, _ in pieces)
    assert len(pieces) > 1 or text == "😀", "tokens that are text by themselves are not lumped together"
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece, _ in pieces)


def test_a_character_of_several_tokens_is_one_piece_and_a_special_token_its_name() -> None:
    tokenizer = byte_level()
    assert len(tokenizer("😀")["input_ids"]) == 4
    assert text_pieces(tokenizer, tokenizer("a😀b" + EOS)["input_ids"]) == [("a", 1), ("😀", 4), ("b", 1), (EOS, 1)]


def test_what_stands_before_decides_on_a_words_space() -> None:
    tokenizer = sentence_pieces()
    ids = tokenizer.convert_tokens_to_ids(["▁He", "llo", "▁wor", "l", "d"])
    assert [piece for piece, _ in text_pieces(tokenizer, ids)] == ["He", "llo", " wor", "l", "d"]
    assert [piece for piece, _ in text_pieces(tokenizer, ids, 2)] == [" wor", "l", "d"]


def test_a_completion_may_begin_within_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a😀b")["input_ids"]
    assert text_pieces(tokenizer, ids, 2) == [("😀", 3), ("b", 1)]


def test_the_limit_counts_tokens_and_splits_no_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer("ab😀cd")["input_ids"]
    for limit, expected in ((2, "ab"), (3, "ab"), (5, "ab"), (6, "ab😀"), (7, "ab😀c"), (99, "ab😀cd")):
        pieces = text_pieces(tokenizer, ids, 0, limit)
        assert "".join(piece for piece, _ in pieces) == expected
        assert sum(tokens for _, tokens in pieces) <= limit


def test_a_text_that_ends_within_a_character_is_shown_as_the_tokenizer_does() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a😀")["input_ids"][:-1]
    assert text_pieces(tokenizer, ids) == [("a", 1), (tokenizer.decode(ids)[1:], 3)]


def test_tokens_that_make_no_character_do_not_wait_for_one() -> None:
    """Bytes that continue a character which never began: however many, their changes are not summed into one."""
    tokenizer = byte_level()
    lone = tokenizer("é")["input_ids"][1]
    pieces = text_pieces(tokenizer, [lone] * 40)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode([lone] * 40)
    assert len(pieces) == 5


def test_ids_stand_for_tokens_that_no_tokenizer_names() -> None:
    assert text_pieces(None, [7, 523, 9], 1) == [("⟨id 523⟩", 1), ("⟨id 9⟩", 1)]
    assert text_pieces(None, [7, 523, 9], 1, 1) == [("⟨id 523⟩", 1)]
    assert decoded(None, [7, 523]) == "⟨id 7⟩⟨id 523⟩"
    tokenizer = byte_level()  # an embedding is padded: the model has more tokens than the tokenizer
    (a,) = tokenizer("a")["input_ids"]
    assert text_pieces(tokenizer, [a, 5000, a]) == [("a", 1), ("⟨id 5000⟩", 1), ("a", 1)]
    assert decoded(tokenizer, [a, 5000, a]) == "a⟨id 5000⟩a"


def test_a_tokenizer_is_left_as_it_was() -> None:
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    ids = tokenizer.convert_tokens_to_ids(["H", "e", "l", "l", "o", "!", EOS])
    state = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.deprecation_warnings), dict(tokenizer.init_kwargs)
    assert [piece for piece, _ in text_pieces(tokenizer, ids)] == ["H", "e", "l", "l", "o", "!", EOS]
    assert decoded(tokenizer, ids) == "Hello!" + EOS
    after = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.deprecation_warnings), dict(tokenizer.init_kwargs)
    assert state == after
