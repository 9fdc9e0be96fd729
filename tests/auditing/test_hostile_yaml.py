"""Configurations that are no YAML, or YAML meant to do harm: a short ConfigurationError, and nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError


def refused(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError) as caught:
        AuditConfig.from_yaml(path)
    words = str(caught.value)
    assert len(words) < 10_000
    assert words.replace("\n", "").isprintable()
    return words


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['exit 1']",
        "seed: !!python/object:builtins.dict {}",
        "seed: 2020-99-99",
        "seed: !!int x",
        "[" * 20_000,
        "? [1]\n: 2",
        "seed: *nowhere",
        b"\xff\xfe\x00",
        "seed: [",
        "{{1: 2}: 3}",
        "1: 2",
        "just words",
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    words = refused(tmp_path / "audit.yaml", text)
    assert "audit.yaml" in words
    assert "\n" not in words


def test_aliases_are_not_written_out(tmp_path: Path) -> None:
    levels = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    text = "\n".join(levels) + "\nseed: *a29\nmax_pairs: &self [*self]\n"
    words = refused(tmp_path / "audit.yaml", text)
    assert "and 12 more" in words


def test_a_mistake_is_still_told_with_its_place_and_value(tmp_path: Path) -> None:
    words = refused(tmp_path / "audit.yaml", "max_pairs: 0\npatching: {exact_pears: 3}\n")
    assert "max_pairs (line 1): Input should be greater than or equal to 1 (found 0)" in words
    assert "unknown option 'patching.exact_pears' (line 2) (did you mean 'exact_pairs'?)" in words
    assert "line 2, column 1" in refused(tmp_path / "audit.yaml", "seed: 1\n\tb: 2\n")


def test_control_characters_of_names_and_paths_are_shown_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2J"
    folder.mkdir()
    assert "\\x1b[2J" in refused(folder / "audit.yaml", "[")
    assert "\\x1b[31m" in refused(tmp_path / "audit.yaml", '"seed\\e[31m": 1')
    assert "\\x1b[31m" in refused(tmp_path / "audit.yaml", 'seed: "\\e[31m"')
