"""Arguments of ``align-audit`` that nobody would type: a result, or words on stderr and exit status 1 or 2."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hypothesis import strategies as st

from align_audit.cli import app as cli
from align_audit.cli.options import find_checkpoints, layers_option, read_arguments, settings
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError
from tests.fuzz.cases import fuzz, told

ROW = '{"prompt": "a", "chosen": " b", "rejected": " c"}\n'
FLAGS = (
    "--probes", "--reference", "--output", "--config", "--max-pairs", "--max-length", "--step", "--device", "--dtype",
    "--trust-remote-code", "--layer", "--basis", "--help", "--version", "--", "-x", "--gate", "--fail-on", "--fresh",
    "--allow-pickle", "--json", "--write",
)  # fmt: skip
# The demo trains for a minute: it is no argument here, nor a place to begin.
WORDS = (
    "run", "transfer", "report", "compare", "card", "kl>=0", "pairs.jsonl", "a=pairs.jsonl", "b=pairs.jsonl",
    "empty.jsonl", "broken", "adapter", "folder", "nowhere", "audit.yaml", "bad.yaml", ".", "/", "", "0", "-1", "3",
    "99999999999999999999", "1e3", "cpu", "meta", "cuda:99",
    "float32", "float3", "auto", "all", "0,1", "shift", "=", "a=", "é", "\udcff", "\x1b[2J", "x" * 300,
)  # fmt: skip
argument = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)


@contextmanager
def surroundings() -> Iterator[Path]:
    """A working directory with files that are nearly right: no model in it can be opened."""
    place = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.jsonl").write_text(ROW * 3)
        (folder / "empty.jsonl").write_text("")
        (folder / "audit.yaml").write_text("max_pairs: 2\n")
        (folder / "bad.yaml").write_text("max_pears: [\n")
        for inside in ("broken", "adapter", "folder/checkpoint-1", "folder/checkpoint-2"):
            (folder / inside).mkdir(parents=True)
            (folder / inside / "config.json").write_text('{"model_type": "llama"' + "}" * (inside == "broken"))
        (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(place)


def called(arguments: list[str]) -> None:
    """The command with streams as a terminal's: what cannot be encoded breaks there."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    kept = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = ["align-audit", *arguments], out, err
    status: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert status in (0, 1, 2), status
    assert "Traceback" not in said
    assert status == 0 or said.strip()


@fuzz(0.5, arguments=st.lists(argument, max_size=6).filter(lambda arguments: "demo" not in arguments))
def test_any_arguments(arguments: list[str]) -> None:
    with surroundings():
        called(arguments)


@fuzz(
    0.25,
    command=st.sampled_from(["run", "transfer"]),
    place=st.sampled_from(["broken", "adapter", "folder", "nowhere", ".", "folder/checkpoint-1"]),
    probes=st.lists(st.sampled_from(["a=pairs.jsonl", "b=pairs.jsonl", "pairs.jsonl", "empty.jsonl"]), max_size=2),
    more=st.lists(st.tuples(st.sampled_from(FLAGS[1:12]), argument), max_size=3),
)
def test_arguments_that_are_nearly_right(
    command: str, place: str, probes: list[str], more: list[tuple[str, str]]
) -> None:
    arguments = [command, place]
    for path in probes:
        arguments += ["--probes", path]
    for flag, value in more:
        arguments += [flag] if flag == "--trust-remote-code" else [flag, value]
    with surroundings():
        called(arguments)


def refused_or(read: Callable[[], object]) -> None:
    try:
        read()
    except AlignAuditError as error:
        told(error)


@fuzz(arguments=st.lists(argument, max_size=4), path=argument, layer=st.one_of(st.none(), argument))
def test_what_options_are_read_as(arguments: list[str], path: str, layer: str | None) -> None:
    with surroundings() as folder:
        refused_or(lambda: read_arguments(arguments))
        refused_or(lambda: find_checkpoints(folder / path))
        refused_or(lambda: layers_option(layer))
        refused_or(lambda: settings(Path(path), 3, None))


@fuzz(pairs=st.one_of(st.none(), st.integers()), length=st.one_of(st.none(), st.integers()), seed=st.integers())
def test_numbers_of_options(pairs: int | None, length: int | None, seed: int) -> None:
    with surroundings() as folder:
        (folder / "audit.yaml").write_text(yaml.safe_dump({"seed": seed}))
        try:
            config = settings(folder / "audit.yaml", pairs, length)
        except AlignAuditError as error:
            told(error)
            return
        assert isinstance(config, AuditConfig)
        assert config.max_pairs == (64 if pairs is None else pairs)
