"""Folders of checkpoints as somebody else left them: what is audited of them, what is left out, and what is said of it."""

from __future__ import annotations

import doctest
import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align_audit import AuditRun
from align_audit.cli import app as cli
from align_audit.cli.options import find_checkpoints, left_out
from align_audit.errors import ConfigurationError, ReferenceUnavailableError
from align_audit.models import folders
from align_audit.models.reference import load_policy
from align_audit.record.checkpoint_names import step_of
from tests.cli.commands import arguments, refused
from tests.helpers.screens import a_run
from tests.helpers.stored_runs import store


def test_the_examples_hold() -> None:
    results = doctest.testmod(folders)
    assert results.attempted and not results.failed


def model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


# -- which folders are checkpoints -------------------------------------------------------------------------------------

ARRANGED: dict[str, tuple[Callable[[Path], Any], list[tuple[str, int]], list[str]]] = {
    # how they lie there: (what makes it, (name, step) of the checkpoints, names left out)
    "by number": (lambda run: [model_at(run / f"checkpoint-{n}") for n in (10, 9)],
        [("checkpoint-9", 9), ("checkpoint-10", 10)], []),
    "the start": (lambda run: [model_at(run / f"checkpoint-{n}") for n in (0, 5)],
        [("checkpoint-0", 0), ("checkpoint-5", 5)], []),
    "with zeros": (lambda run: [model_at(run / f"checkpoint-{n}") for n in ("0010", "0002")],
        [("checkpoint-0002", 2), ("checkpoint-0010", 10)], []),
    "others beside them": (lambda run: [model_at(run / name) for name in ("checkpoint-1", "checkpoint-best", "base", "ref")],
        [("checkpoint-1", 1)], ["checkpoint-best"]),
    "links to a store": (lambda run: (run / "checkpoint-7").symlink_to(model_at(run / "store" / "af12")),
        [("checkpoint-7", 7)], []),
    "a link to another number": (lambda run: (run / "checkpoint-7").symlink_to(model_at(run / "old" / "checkpoint-2")),
        [("checkpoint-7", 7)], []),
    "a link to the last": (lambda run: (run / "checkpoint-last").symlink_to(model_at(run / "checkpoint-3")),
        [("checkpoint-3", 3)], []),
    "a link to nothing": (lambda run: [model_at(run / "checkpoint-1"), (run / "checkpoint-3").symlink_to(run / "gone")],
        [("checkpoint-1", 1), ("checkpoint-3", 3)], []),
    "links in a circle": (lambda run: [model_at(run / "checkpoint-1"), (run / "checkpoint-3").symlink_to(run / "checkpoint-3")],
        [("checkpoint-1", 1), ("checkpoint-3", 3)], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRANGED)
def test_a_checkpoint_is_what_is_called_so(kind: str, tmp_path: Path) -> None:
    make, expected, beside = ARRANGED[kind]
    make(tmp_path)
    found = find_checkpoints(tmp_path)
    assert [(folder.name, step_of(folder)) for folder in found] == expected
    assert left_out(tmp_path, found) == beside


def test_a_name_that_says_no_step_has_that_of_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").symlink_to(model_at(tmp_path / "checkpoint-3"))
    assert step_of(tmp_path / "latest") == 3
    monkeypatch.chdir(tmp_path / "checkpoint-3")
    assert step_of(Path()) == 3


def test_two_of_one_step_are_refused(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-0010"):
        model_at(tmp_path / name)
    with pytest.raises(ConfigurationError, match="checkpoint-0010 and checkpoint-10, both of step 10"):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize("names", [["checkpoint-best"], ["step_100", "step_200"], ["mine"]])
def test_models_that_are_called_otherwise_are_named(names: list[str], tmp_path: Path) -> None:
    for name in names:
        model_at(tmp_path / name)
    with pytest.raises(ConfigurationError, match=f"the models in it are called {', '.join(names)}: name one"):
        find_checkpoints(tmp_path)


def test_one_that_leads_nowhere_fails_the_command_and_one_left_out_is_said(
    command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place.full / "checkpoint-1", run / "checkpoint-1")
    shutil.copytree(place.full / "checkpoint-2", run / "checkpoint-best")
    (run / "checkpoint-2").symlink_to(run / "deleted")
    done = command(*arguments(place, run, tmp_path / "out", "--reference", place.base))
    assert done.code == 1
    assert "align-audit: checkpoint-best is left out, since its name says no step" in done.err
    assert "align-audit: checkpoint-2 is passed over: " in done.err
    assert [record.step for record in AuditRun.load(tmp_path / "out").records] == [1]


@pytest.mark.parametrize("step", ["-7", str(10**18)])
def test_a_step_that_no_checkpoint_can_have_is_refused(
    step: str, command: Any, place: SimpleNamespace, tmp_path: Path
) -> None:
    given = arguments(place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base, "--step", step)
    refused(command(*given), "--step")


# -- which folders are a reference -------------------------------------------------------------------------------------

NO_REFERENCE: dict[str, tuple[str, ...]] = {
    "empty": (),
    "a run": ("checkpoint-1", "checkpoint-2"),
    "of named adapters": ("policy", "second"),
}


@pytest.mark.parametrize("kind", NO_REFERENCE)
def test_a_reference_without_a_model_is_refused_before_anything_is_loaded(
    kind: str, command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start").mkdir()
    for name in NO_REFERENCE[kind]:
        model_at(tmp_path / "start" / name)
    monkeypatch.setattr("align_audit.monitoring.checkpoints.audit_saved", None)
    monkeypatch.chdir(tmp_path)
    words = ["--reference: start holds no config.json and no adapter_config.json", *NO_REFERENCE[kind]]
    refused(command(*arguments(place, place.full, tmp_path / "out", "--reference", "start")), *words)


def test_the_runs_own_folder_as_reference_is_said(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place.full / "checkpoint-1", run / "checkpoint-1")
    shutil.copytree(place.full / "checkpoint-2", run, dirs_exist_ok=True)  # as trainer.save_model leaves it
    for meant in (run, run / "checkpoint-1"):
        done = command(*arguments(place, meant, tmp_path / "out", "--reference", run))
        assert done.code == 0, done.err
        assert "is the folder that the checkpoints lie in" in done.err
    usual = command(*arguments(place, run, tmp_path / "usual", "--reference", place.base))
    assert "is the folder that" not in usual.err


# -- what breaks beside the audits -------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_pictures_takes_no_gate_away(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").write_text("")
    given = arguments(place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base)
    for more, code in (((), 0), (("--gate", "kl>1000"), 2)):
        done = command(*given, *more, pictures=True)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        assert "align-audit: the pictures could not be written (" in done.err
        assert "the log is " in done.out


def test_pictures_of_a_transfer_too(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").write_text("")
    given = [
        "transfer",
        place.full / "checkpoint-1",
        "--reference",
        place.base,
        "--config",
        place.options,
        "--max-pairs",
        8,
    ]
    done = command(
        *given, "--probes", f"a={place.probes}", "--probes", f"b={place.probes}", "--output", tmp_path / "out"
    )
    assert done.code == 0, done.err
    assert "the pictures could not be written (" in done.err
    assert json.loads((tmp_path / "out" / "transfer.json").read_text())


def test_what_is_noted_of_a_log_is_said_as_all_else_is(command: Any, place: SimpleNamespace, tmp_path: Path) -> None:
    given = arguments(place, place.full / "checkpoint-1", tmp_path / "out", "--reference", place.base)
    assert command(*given).code == 0
    log = tmp_path / "out" / "align_audit" / "records.jsonl"
    whole = log.read_bytes()
    for damaged, words in ((b"junk\n" + whole, "line 1 of "), (whole + whole[:99], "ended in the middle of a line")):
        log.write_bytes(damaged)
        done = command(*given)
        assert done.code == 0, done.err
        (line,) = [line for line in done.err.splitlines() if words in line]
        assert line.startswith("align-audit: ")
        assert "Warning" not in done.err


INTERRUPTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("align_audit.monitoring.checkpoints.audit_saved", ("run", "{model}", "--probes", "{probes}")),
    "transfer": (
        "align_audit.monitoring.checkpoints.transfer_saved",
        ("transfer", "{model}", "--probes", "a={probes}", "--probes", "b={probes}", "--output", "{out}"),
    ),
    "card": ("align_audit.record.run.AuditRun.load", ("card", "{model}")),
    "compare": ("align_audit.record.run.AuditRun.load", ("compare", "{model}", "{model}")),
    "report": ("align_audit.record.run.AuditRun.load", ("report", "{model}")),
    "demo": ("align_audit.lab.demo.run_demo", ("demo",)),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_is_said(
    name: str, command: Any, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    what, words = INTERRUPTED[name]
    monkeypatch.setattr(what, interrupt)
    there = {"model": place.full / "checkpoint-1", "probes": place.probes, "out": tmp_path / "out"}
    done = command(*(word.format(**there) for word in words))
    assert (done.code, done.err) == (130, "align-audit: interrupted\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize(
    "words", [["card", "one"], ["compare", "one", "two"], ["watch", ".", "--once"], ["report", "one"]]
)
def test_an_encoding_without_our_characters_ends_no_command(
    words: list[str], encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "one", a_run("ruined"))
    store(tmp_path / "two", a_run("well"))
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setattr(sys, "argv", ["align-audit", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.stdout.flush()
    assert end.value.code == (1 if words[0] == "watch" else 0)
    assert sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_off_a_terminal_no_name_of_a_run_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{end}-{'of-a-long-name-' * 4}" for end in ("ruined", "well")]
    for name in names:
        store(tmp_path / name, a_run(name.partition("-")[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr(sys, "argv", ["align-audit", "watch", ".", "--once"])
    with pytest.raises(SystemExit):
        cli.main()
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert all(name in printed for name in names)


# -- adapters and tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["/gone/base", None, ""])
def test_an_adapter_without_a_base_of_its_own_takes_the_reference(
    named: str | None, command: Any, place: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(place.base),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    folder = tmp_path / "checkpoint-3"
    model.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": named}))
    done = command(*arguments(place, folder, tmp_path / "out", "--reference", place.base))
    assert done.code == 0, done.err
    # What the tokenizers' library says of an empty folder ends in the middle of a sentence.
    assert "none in checkpoint-3: no tokenizer files" in caplog.text


def test_without_a_reference_it_says_which_option_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(ReferenceUnavailableError, match=r"names no base model\. Pass its folder as --reference"):
        load_policy(tmp_path)


# -- paths that are none -----------------------------------------------------------------------------------------------

LONG = "a" * 5000
RUN = ("run", "{model}", "--probes", "{probes}", "--reference", "{base}")
TOO_LONG = {
    "run": ("run", LONG, *RUN[2:]),
    "run --reference": (*RUN[:5], LONG),
    "run --output": (*RUN, "--output", LONG),
    "run --report": (*RUN, "--report", LONG),
    "run --config": (*RUN, "--config", LONG),
    "card": ("card", LONG),
    "report": ("report", LONG),
    "compare": ("compare", LONG, LONG),
    "watch": ("watch", LONG, "--once"),
    "watch --probes": ("watch", LONG, "--probes", "{probes}"),
    "doctor": ("doctor", LONG, "--probes", "{probes}"),
    "demo": ("demo", "--output", LONG),
}


@pytest.mark.parametrize("kind", TOO_LONG)
def test_a_path_that_is_too_long_is_refused_in_a_line(kind: str, command: Any, place: SimpleNamespace) -> None:
    there = {"model": place.full / "checkpoint-1", "probes": place.probes, "base": place.base}
    refused(command(*(word.format(**there) for word in TOO_LONG[kind])))


@pytest.mark.parametrize("name", ["card", "report", "compare"])
def test_a_path_that_is_forbidden_too(name: str, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("align_audit.record.run.AuditRun.load", forbidden)
    refused(
        command(name, "theirs", *(["theirs"] if name == "compare" else [])),
        "theirs: Permission denied; expected a path",
    )
