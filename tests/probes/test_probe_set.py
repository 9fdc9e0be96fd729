"""The set itself: a sequence that is subsampled, split, hashed, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.errors import ProbeError
from align_audit.probes.pairs import EQUAL, ProbePair, ProbeSet
from tests.probes.rows import draw, ready


@pytest.fixture
def probes() -> ProbeSet:
    rows = ready(30, unusable=(4,))
    return draw(rows, max_length=8, source="eval set of the trainer", held_out=True)


def test_reads_like_a_sequence(probes: ProbeSet) -> None:
    assert len(probes) == 29
    assert list(probes) == list(probes.pairs)
    assert probes[-1] is probes.pairs[-1]
    assert isinstance(probes[:2], ProbeSet)
    assert probes[:2].pairs == probes.pairs[:2]
    with pytest.raises(ProbeError, match="at least one pair"):
        probes[:0]
    assert probes.num_tokens == 29 * 8
    assert pickle.loads(pickle.dumps(probes)) == probes
    assert hash(probes) == hash(dataclasses.replace(probes))


def test_repr_tells_what_matters(probes: ProbeSet) -> None:
    text = repr(probes)
    for part in ("29 pairs", "232 tokens", "at most 8 each, keep_start", "eval set of the trainer", "held out"):
        assert part in text
    assert "dropped 1 (equal completions)" in text
    assert probes.content_hash in text
    assert "\n" not in text
    assert "1 pair," in repr(dataclasses.replace(probes[:1], max_length=None, held_out=None))
    assert "not truncated" in repr(dataclasses.replace(probes[:1], max_length=None))
    assert "trained on" in repr(dataclasses.replace(probes, held_out=False))


def test_subsample(probes: ProbeSet) -> None:
    part = probes.subsample(7, seed=5)
    assert len(part) == 7
    assert set(part) < set(probes)
    assert [pair.index for pair in part] == sorted(pair.index for pair in part)
    assert part == probes.subsample(7, seed=5) != probes.subsample(7, seed=6)
    assert probes.subsample(100, seed=5) == probes
    with pytest.raises(ProbeError, match="n: expected"):
        probes.subsample(0, seed=5)


@settings(deadline=None)
@given(st.integers(2, 29), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 9))
def test_split_parts_make_up_the_set(size: int, fraction: float, seed: int) -> None:
    probes = draw(ready(size))
    first, second = probes.split(fraction, seed)
    assert len(first) + len(second) == size
    assert abs(len(first) - fraction * size) < 1.01
    assert sorted([*first, *second], key=lambda pair: pair.index) == list(probes)
    assert [pair.index for pair in second] == sorted(pair.index for pair in second)
    assert probes.split(fraction, seed) == (first, second)


def test_split_refuses(probes: ProbeSet) -> None:
    assert probes.split(0.5, 0) != probes.split(0.5, 1)
    for fraction in (0.0, 1.0, -2.0, float("nan")):
        with pytest.raises(ProbeError, match="fraction"):
            probes.split(fraction, 0)
    with pytest.raises(ProbeError, match="at least 2 pairs"):
        probes[:1].split(0.5, 0)


def test_the_hash_sees_tokens_and_starts_and_nothing_else(probes: ProbeSet) -> None:
    pair = ProbePair(0, (1, 2, 3, 4), (1, 2, 5, 6), 2, 2)
    base = ProbeSet((pair,), "a", {}, 8, "keep_start", None)
    # Pinned: stored records refer to probes by this value, so it may never change.
    assert base.content_hash == "fd94d6906d100372"
    for values in (
        {"chosen_ids": (1, 2, 3, 5)},
        {"rejected_ids": (1, 2, 5)},
        {"chosen_start": 1},
        {"rejected_start": 3},
    ):
        other = dataclasses.replace(base, pairs=(dataclasses.replace(pair, **values),))  # type: ignore[arg-type]
        assert other.content_hash != base.content_hash, values
    moved = dataclasses.replace(pair, index=9, reference_logps=(-1.0, -2.0))
    assert ProbeSet((moved,), "b", {EQUAL: 2}, None, "keep_end", True).content_hash == base.content_hash
    assert dataclasses.replace(probes, pairs=probes.pairs[::-1]).content_hash != probes.content_hash


@pytest.mark.parametrize("name", ["probes.json", "deep/probes.json.gz"])
def test_saved_and_loaded(tmp_path: Path, name: str, probes: ProbeSet) -> None:
    pair = dataclasses.replace(probes[3], reference_logps=(-1.25, -0.1))
    probes = dataclasses.replace(probes, pairs=(*probes.pairs[:3], pair))
    path = tmp_path / name
    probes.save(path)
    first = path.read_bytes()
    assert ProbeSet.load(path) == probes
    probes.save(str(path))
    assert path.read_bytes() == first
    if name.endswith(".gz"):
        assert first[4:8] == bytes(4), "the time of writing is in the file"
    assert list(path.parent.iterdir()) == [path], "a partial file was left"
    # Another process, with another hash seed, finds the same.
    command = f"from align_audit.probes.pairs import ProbeSet; print(ProbeSet.load({str(path)!r}).content_hash)"
    seeded = {**os.environ, "PYTHONHASHSEED": "77"}
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, env=seeded)
    assert found.stdout.strip() == probes.content_hash


def test_saving_fails_whole(tmp_path: Path, probes: ProbeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "probes.json"
    probes.save(path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        probes[:2].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loading_refuses(tmp_path: Path, probes: ProbeSet) -> None:
    path = tmp_path / "probes.json"
    probes.save(path)
    content = json.loads(path.read_text())

    def refused(message: str, **changes: Any) -> None:
        path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))
        with pytest.raises(ProbeError, match=message):
            ProbeSet.load(path)

    pairs = content["pairs"]
    refused("format version 3.*up to 2", format_version=3)
    refused("no format_version", format_version=...)
    refused("damaged", source=...)
    refused("damaged", pairs=3)
    refused("damaged", pairs=[])
    refused("damaged", pairs=[{**pairs[0], "colour": 1}])
    for damage in ("x", -1, 2**63, 1.5, None, True):
        refused("damaged.*prompt_hash of 63 bits", pairs=[{**pair, "prompt_hash": damage} for pair in pairs])
    refused("do not match the stored content hash", pairs=pairs[1:])
    path.write_text("not json")
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(path)
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(tmp_path / "absent.json.gz")
    path.rename(tmp_path / "probes.json.gz")
    with pytest.raises(ProbeError, match="cannot be read"):
        ProbeSet.load(tmp_path / "probes.json.gz")


def test_the_import_is_light() -> None:
    command = (
        "import sys, align_audit.probes.pairs; "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
