"""Names of probe sets: what may be one, and how a command line gives them."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

from align_audit.errors import ConfigurationError
from align_audit.probes import names as probe_names
from align_audit.probes.names import as_name, check_names, read_arguments


def test_the_examples_hold() -> None:
    results = doctest.testmod(probe_names)
    assert results.attempted >= 4
    assert results.failed == 0


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".", "é", "a\n", "a=b", 7, None])
def test_what_cannot_be_a_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"as the name of a probe set; a name is of letters, digits, '_', '.'"):
        check_names(["harmless", name])


def test_names_are_told_apart_on_any_disk() -> None:
    check_names(["a", "b.1", "c-2", "_", "...x"])
    with pytest.raises(ConfigurationError, match="two probe sets called 'Help' and 'help'"):
        check_names(["Help", "a", "help"])
    with pytest.raises(ConfigurationError, match="found no probe set"):
        check_names([])


def test_names_of_others_become_names() -> None:
    assert as_name("my set/ü") == "my_set__"


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
