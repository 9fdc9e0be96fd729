"""``align-audit report``: the page of a stored run, with no model and none of the libraries that load one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align_audit.record.log import RunLog
from tests.helpers.screens import a_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = RunLog(tmp_path / "dpo")
    for record in a_run("ruined"):
        log.append(record)
    log.close()
    return tmp_path / "dpo"


def test_it_says_how_the_run_stands_and_where_the_page_is(command: Any, run: Path) -> None:
    done = command("report", run)
    path = run / "align_audit" / "report.html"
    assert (done.code, done.err) == (0, "")
    assert done.out == f"ERROR since step 20: the report of 5 audits is {path} (1.6 MB)\n"
    assert path.read_bytes().startswith(b"<!DOCTYPE html>")


def test_it_goes_where_it_is_asked_for_and_is_shown(command: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or False)
    page = run / "a page.html"
    done = command("report", run / "align_audit" / "records.jsonl", "--output", page, "--open")
    assert page.is_file()
    assert shown == [page.as_uri()]
    assert "no browser could be started here" in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_what_is_printed_is_said_in_a_line(run: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "align_audit", "report", str(run)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 70
    assert "Traceback" not in done.stderr
    assert "what is printed could not be written whole: No space left on device" in done.stderr


@pytest.mark.parametrize("text", ['{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9, "# About\n"])
def test_a_file_of_another_kind_costs_no_page(command: Any, run: Path, text: str) -> None:
    """Pairs beside a page of the user's own: it was written over, and that was no error."""
    file, page = run / "held-out.jsonl", run / "report.html"
    file.write_text(text)
    page.write_text("mine")
    for arguments in ([], ["--output", run / "new.html"]):
        done = command("report", file, *arguments)
        assert done.code == 2
        assert "held-out.jsonl holds no audit: none of its first lines is one" in done.err
    assert page.read_text() == "mine" and not (run / "new.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-here"], "no run log at"),
        (["dpo", "--output", "."], "--output . is a folder; expected a file, such as report.html"),
        (["dpo", "--output", "nowhere/page.html"], "cannot write the report to nowhere/page.html"),
        # Procfs takes no file from anybody, whatever its permission bits say.
        (["dpo", "--output", "/proc/page.html"], "cannot write the report to /proc/page.html"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    command: Any, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(run.parent)
    done = command("report", *arguments)
    assert done.code == 2
    assert done.err.startswith("align-audit: ") and done.err.count("\n") == 1
    assert words in done.err


def test_no_model_library_is_loaded(run: Path) -> None:
    program = (
        "import sys\nfrom align_audit.cli.app import app\n"
        f"app(['report', {str(run)!r}], standalone_mode=False)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "align_audit" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "matplotlib", "pandas", "sklearn"}
