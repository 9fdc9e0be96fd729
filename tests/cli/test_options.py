"""What commands read from their options."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from align_audit.cli import options
from align_audit.cli.options import read_arguments
from align_audit.errors import ConfigurationError
from align_audit.record import log


@pytest.mark.parametrize(("module", "examples"), [(options, 1), (log, 1)])
def test_the_examples_hold(module: object, examples: int) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted >= examples
    assert results.failed == 0


def test_paths_and_named_paths(tmp_path: Path) -> None:
    assert read_arguments(["a.jsonl"]) == Path("a.jsonl")
    assert read_arguments(["x=a.jsonl"]) == {"x": Path("a.jsonl")}
    assert read_arguments(["x=a=b.jsonl", "y=c"]) == {"x": Path("a=b.jsonl"), "y": Path("c")}
    assert read_arguments(["runs/lr=3/pairs.jsonl"]) == Path("runs/lr=3/pairs.jsonl"), "no name has a separator"
    odd = tmp_path / "lr=3.jsonl"
    odd.touch()
    assert read_arguments([str(odd)]) == odd


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.jsonl", "b.jsonl"], r"found 2 probe sets, of which a.jsonl, b.jsonl has no name; expected name=path"),
        (["x=a.jsonl", "b.jsonl"], r"of which b.jsonl has no name"),
        (["x=a.jsonl", "x=b.jsonl"], "two probe sets called 'x' and 'x'"),
        (["=a.jsonl"], "found '' as the name"),
        (["my set=a.jsonl"], "found 'my set' as the name"),
    ],
)
def test_sets_without_a_name_of_their_own_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_arguments(arguments)


def test_models_load_without_bars_of_others() -> None:
    """Every command that loads one asks for the device first."""
    transformers_logging.enable_progress_bar()
    options.device_option("cpu")
    assert not transformers_logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled(), "a download is worth a bar"
