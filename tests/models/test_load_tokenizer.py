"""The tokenizer that belongs to a model is found where it really is, and is the one that was saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, ByT5Tokenizer

from align_audit.errors import ConfigurationError
from align_audit.models.loading import load_tokenizer
from tests.helpers.probe_tokenizer import SENTENCES, make_tokenizer

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi3", "olmo2", "opt", "bloom", "falcon"]


def with_config(folder: Path, kind: str) -> Path:
    AutoConfig.for_model(kind).save_pretrained(folder)
    return folder


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in SENTENCES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_tokenizer_is_passed_over(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For many kinds transformers makes a tokenizer of nothing, or of another kind than was saved."""
    bare, base = with_config(tmp_path / "bare", kind), with_config(tmp_path / "base", kind)
    make_tokenizer().save_pretrained(base)
    with caplog.at_level(logging.WARNING, "align_audit"):
        assert ids(load_tokenizer([bare, base])) == ids(make_tokenizer())
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("align_audit")]
    assert line.startswith("align_audit takes the tokenizer of base; none in bare: ")
    with pytest.raises(ConfigurationError, match="no tokenizer found in bare"):
        load_tokenizer([bare])


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "trunc', b"\xff\xfe\x00", b"[1]", b'{"a":' * 100_000])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_passed_over_and_named(
    file: str, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("damaged", "base"):
        make_tokenizer().save_pretrained(with_config(tmp_path / name, "llama"))
    (tmp_path / "damaged" / file).write_bytes(content)
    with caplog.at_level(logging.WARNING, "align_audit"):
        assert ids(load_tokenizer([tmp_path / "damaged", tmp_path / "base"])) == ids(make_tokenizer())
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("align_audit")]
    assert "none in damaged: " in line
    assert "\n" not in line
    with pytest.raises(ConfigurationError, match="no tokenizer found in damaged: "):
        load_tokenizer([tmp_path / "damaged"])


def test_a_tokenizer_of_bytes_has_no_vocabulary_to_save(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert ids(load_tokenizer([tmp_path])) == ids(ByT5Tokenizer())


def test_the_first_place_that_has_one_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer(eos_token="<first>").save_pretrained(tmp_path / "first")
    make_tokenizer().save_pretrained(tmp_path / "second")
    with caplog.at_level(logging.WARNING, "align_audit"):
        assert load_tokenizer([tmp_path / "first", tmp_path / "second"]).eos_token == "<first>"
    assert not [record for record in caplog.records if record.name.startswith("align_audit")]
