"""What cannot be used is refused in one line: what was found, the nearest name, what to do; and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from align_audit.record.audit_record import SCHEMA_VERSION
from tests.helpers.dpo import ROWS, saved_model
from tests.helpers.screens import a_run
from tests.helpers.stored_runs import store


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its base, pairs, options and a run; nothing in it was trained."""
    folder = tmp_path_factory.mktemp("stock")
    saved_model(folder / "base")
    saved_model(folder / "runs" / "checkpoint-5", seed=3)
    store(folder / "logged", a_run("ruined"))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]), encoding="utf-8")
    (folder / "audit.yaml").write_text("max_pairs: 4\nprogress: false\n", encoding="utf-8")
    return folder


def as_pickle(folder: Path) -> None:
    """The same weights in the older form."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_more_tokens(folder: Path) -> None:
    """A tokenizer that gives ids which the model has no embedding of."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = {word for row in ROWS[:4] for text in row.values() for word in str(text).split()}
    tokenizer.add_tokens(sorted(words))
    tokenizer.save_pretrained(folder)


def newer(folder: Path) -> None:
    path = folder / "align_audit" / "records.jsonl"
    values = json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) | {"schema_version": SCHEMA_VERSION + 1}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def an_adapter(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base", "peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").touch()


def unchanged(folder: Path) -> None:
    """As it is."""


RUN = ("run", "runs/checkpoint-5", "--reference", "base", "--probes", "pairs.jsonl", "--config", "audit.yaml")
KINDS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    # what is wrong: (what is spoilt, how, arguments, words of the message)
    "no such checkpoint": (
        "base", unchanged, ("run", "runs/checkpoint-55", *RUN[2:]),
        ("no checkpoint at runs/checkpoint-55 (did you mean runs/checkpoint-5?)", "expected a folder with a saved model"),
    ),
    "a file": ("base", unchanged, ("run", "pairs.jsonl", *RUN[2:]), ("no checkpoint at pairs.jsonl: expected a folder",)),
    "no model in it": (
        "base", unchanged, ("run", ".", *RUN[2:]), ("holds no config.json, no adapter_config.json and no checkpoint-N folder",),
    ),
    "an adapter without its base": (
        "runs/checkpoint-5", an_adapter, RUN[:2] + RUN[4:],
        ("the base model of runs/checkpoint-5, /gone/base, is not there", "Pass its folder as --reference"),
    ),
    "a checkpoint against itself": (
        "base", unchanged, ("run", "runs/checkpoint-5", "--reference", "runs/checkpoint-5", *RUN[4:]),
        ("the reference is checkpoint-5 itself", "expected the model that its training started from"),
    ),
    "a pickle": (
        "runs/checkpoint-5", as_pickle, RUN,
        ("the weights of runs/checkpoint-5 are a pickle (pytorch_model.bin), which can run code", "--allow-pickle"),
    ),
    "a reference of pickles": ("base", as_pickle, RUN, ("the weights of base are a pickle", "--allow-pickle")),
    "a tokenizer of more tokens": ("runs/checkpoint-5", with_more_tokens, RUN, ("they were tokenized with another",)),
    "no such pairs": (
        "base", unchanged, (*RUN[:4], "--probes", "pair.jsonl"),
        ("--probes: pair.jsonl: no such file (did you mean pairs.jsonl?)",),
    ),
    "no such options": (
        "base", unchanged, (*RUN[:6], "--config", "audits.yaml"),
        ("--config: audits.yaml: no such file (did you mean audit.yaml?)",),
    ),
    "an unknown measure": (
        "base", unchanged, (*RUN, "--gate", "spinal.coherense>=1"),
        ("called 'spinal.coherense' (did you mean 'spinal.coherence'?)",),
    ),
    "a gate without a number": ("base", unchanged, (*RUN, "--gate", "kl"), ("--gate: found 'kl'; expected NAME>=NUMBER",)),
    "an unknown level": ("base", unchanged, (*RUN, "--fail-on", "eror"), ("found 'eror' (did you mean 'error'?)",)),
    "an option misspelt": (
        "base", unchanged, (*RUN, "--fail-onn", "error"),
        ("No such option: --fail-onn", "--fail-on", "see align-audit run --help"),
    ),
    "a command misspelt": ("base", unchanged, ("rnu",), ("No such command 'rnu'", "'run'", "see align-audit --help")),
    "an argument left out": ("base", unchanged, ("run",), ("Missing argument", "see align-audit run --help")),
    "a word for a number": (
        "base", unchanged, (*RUN, "--max-pairs", "many"), ("Invalid value for '--max-pairs'", "see align-audit run --help"),
    ),
    "a run that is not there": (
        "base", unchanged, ("card", "loged"), ("no run log at loged", "(did you mean logged?)"),
    ),
    "a newer log": (
        "logged", newer, ("card", "logged"),
        (f"has schema version {SCHEMA_VERSION + 1}; this align_audit reads up to", "Upgrade with"),
    ),
    "a newer log beside another": ("logged", newer, ("compare", "logged", "logged"), ("Upgrade with",)),
    "a step that was not audited": (
        "base", unchanged, ("card", "logged", "--step", "7"), ("no audit of step 7", "those audited are 0, 5, 10, 20, 40"),
    ),
    "control characters": (
        "base", unchanged, ("run", "runs/\x1b[31mred", *RUN[2:]), ("no checkpoint at runs/\\x1b[31mred",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_one_line(
    kind: str, command: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt, harm, arguments, words = KINDS[kind]
    place = Path(shutil.copytree(stock, tmp_path / "place"))
    harm(place / spoilt)
    monkeypatch.chdir(place)
    done = command(*arguments)
    message = _line_of(done)
    assert done.code == 2
    for word in words:
        assert word in message
    assert done.out == ""
    log = place / "align-audit-run" / "align_audit" / "records.jsonl"
    assert not log.exists() or log.read_bytes() == b""


def _line_of(done: SimpleNamespace) -> str:
    """The message: the only line that is ours, and no traceback or escape beside it."""
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err
    (line,) = [line for line in done.err.splitlines() if "align-audit: " in line]
    # Beside it there is the progress of loading, if anything was loaded.
    assert all("%|" in each or each in ("", line) for each in done.err.splitlines()), done.err
    return str(line)


def test_a_pickle_is_read_where_the_option_says_so(
    command: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(stock, tmp_path / "place"))
    monkeypatch.chdir(place)
    (place / "audit.yaml").write_text(
        "max_pairs: 2\nprogress: false\npatching: {enabled: false}\nspinal: {enabled: false}\ngenerations: {enabled: false}\n"
    )
    as_pickle(place / "runs" / "checkpoint-5")
    done = command(*RUN, "--allow-pickle")
    assert done.code == 0, done.err
    assert "1 audit in " in done.out
    assert "--allow-pickle" in command("transfer", "--help").out


def test_a_torn_log_is_read_without_its_last_line_and_it_is_said(command: Any, tmp_path: Path) -> None:
    run = store(tmp_path / "run", a_run("well"))
    with (run / "align_audit" / "records.jsonl").open("ab") as file:
        file.write(b'{"step": 60, "sche')
    for arguments in (("card", run), ("compare", run, run)):
        done = command(*arguments)
        assert done.code == 0, done.err
        assert "HEALTHY" in done.out
        lines = done.err.splitlines()
        assert lines
        assert all(line.startswith("align-audit: ") and "UserWarning" not in line for line in lines), lines


def test_no_arguments_show_the_help(command: Any) -> None:
    done = command()
    assert done.code == 2
    for name in ("run", "transfer", "compare", "card", "demo", "--version"):
        assert name in done.out + done.err


def test_the_version(command: Any) -> None:
    import align_audit

    done = command("--version")
    assert (done.code, done.out) == (0, f"align-audit {align_audit.__version__}\n")
