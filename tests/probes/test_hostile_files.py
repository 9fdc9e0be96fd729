"""Probe files that are damaged, far too large or meant to do harm: one line says so, and the memory holds."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align_audit.errors import ProbeError, first_line, listed, plain, quoted
from align_audit.probes.pairs import ProbeSet
from align_audit.probes.sources import MAX_UNZIPPED, open_source

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


def refused(source: Any) -> str:
    """The one line in which a source is refused."""
    with pytest.raises(ProbeError) as caught:
        list(open_source(source, 4, 0).records)
    words = str(caught.value)
    assert "\n" not in words
    assert words.isprintable()
    assert len(words) < 2000
    return words


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["lists", "objects", "integer"],
)
def test_json_that_overwhelms_the_parser(tmp_path: Path, name: str, data: bytes) -> None:
    assert "not JSON that can be read" in refused(written(tmp_path / name, data))


@pytest.mark.parametrize("damage", ["cut", "turned", "zeros"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_every_damage_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    rows = [{**ROW, "chosen": f"b {i} {i**7}"} for i in range(200)]
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        written(path, "\n".join(map(json.dumps, rows)).encode())
    whole = path.read_bytes()
    messages = []
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        turned = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        path.write_bytes({"cut": whole[:place], "turned": turned, "zeros": whole[:place] + bytes(64)}[damage])
        try:
            list(open_source(path, 4, 0).records)
        except ProbeError as error:
            messages.append(str(error))
    assert messages
    assert not [words for words in messages if "\n" in words or name not in words]


def test_a_saved_data_set_that_lost_its_end(tmp_path: Path) -> None:
    Dataset.from_list([ROW] * 100).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-900])
    assert "saved" in refused(tmp_path / "saved")


def test_a_small_file_that_unzips_to_more_than_the_bound(tmp_path: Path) -> None:
    """Two GiB of blank lines in two MB, read in a process that may take half of that."""
    block = 2**24
    member = gzip.compress(b" " * (block - 1) + b"\n", mtime=0)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(member * (MAX_UNZIPPED // block + 2))
    assert path.stat().st_size < 2**23
    code = """
import resource, sys
from pathlib import Path
from align_audit.errors import ProbeError
from align_audit.probes.pairs import ProbeSet
from align_audit.probes.sources import open_source
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_source(Path(sys.argv[1]), 4, 0)
except ProbeError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start, error)
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env, check=True)
    growth, words = said.stdout.split(" ", 1)
    assert "unzips to more than 2 GiB" in words
    if sys.platform == "linux":
        assert int(growth) < 2**19, "kilobytes"


@pytest.mark.parametrize("name", ["probes.json", "probes.json.gz"])
@pytest.mark.parametrize("data", [b"[" * 100_000, b"9" * 5000, b"\xff", b'{"format_version": ' + b"9" * 4000 + b"}"])
def test_saved_probes_that_are_none(tmp_path: Path, name: str, data: bytes) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(ProbeError) as caught:
        ProbeSet.load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_line_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "line.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**24), mtime=0) * 8)
    assert "line 1: longer than 67108864 characters" in refused(path)


def test_control_characters_and_long_names_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "run\x1b[2J"
    folder.mkdir()
    assert "\\x1b[2J" in refused(folder / "absent.jsonl")
    assert "\\x1b[31m" in refused(written(folder / "a.json", json.dumps({"chosen\x1b[31m": 1}).encode()))
    many = {f"column {i}\x07" * 500: 1 for i in range(5000)}
    assert "more" in refused(many)
    assert "b\\x1b" in refused(["b\x1b" * 10_000])
    refused(Path("x" * 5000))
    refused(Path("x\0y"))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_a_name_that_is_no_text_gives_a_description_that_is(tmp_path: Path) -> None:
    for raw in (b"\xff\xfe.jsonl", b"x" * 249 + b".jsonl"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), raw)))
        path.write_text(json.dumps(ROW))
        description = open_source(path, 4, 0).description
        assert description.encode().decode() == description
        assert len(description) < 220


def test_quoting_forms_only_the_beginning_of_a_value() -> None:
    nested: Any = ["x" * 100]
    for _ in range(60):  # as YAML aliases nest: 9**60 strings, if written out
        nested = [nested] * 9
    assert len(quoted(nested)) <= 200
    assert len(quoted("é\x1b" * 10**6)) == 200
    assert quoted(10**5000) == "int" or len(quoted(10**5000)) <= 200
    assert quoted({"b": 1, "a": None}) in ("{'b': 1, 'a': None}", "{'a': None, 'b': 1}")
    assert plain("/tmp/a b/ü\\x") == "/tmp/a b/ü\\x"
    assert listed(range(30)).endswith("18, 19 and 10 more")
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError"
