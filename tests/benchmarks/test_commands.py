"""Every benchmark command starts and says what it does, and has the options that are written about it."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

# One process for all of them: each is run as `python PATH --help` would run it, but what they all import is imported once.
RUN_ALL = """
import contextlib, io, json, re, runpy, sys
from pathlib import Path

start = sys.path[1:]
root, *commands = sys.argv[1:]

def run(path, *arguments):
    sys.path[:] = [str(path if path.is_dir() else path.parent), *start]
    sys.argv[:] = [str(path), *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(path), run_name="__main__")
        status = "ended without an exit status"
    except SystemExit as exit:
        status = exit.code or 0
    except Exception as error:
        status = f"{type(error).__name__}: {error}"
    for name, module in list(sys.modules.items()):  # the next one has to find its own neighbours
        if (getattr(module, "__file__", None) or "").startswith(root):
            del sys.modules[name]
    return status, said.getvalue()

outcome = {}
for command in commands:
    status, said = run(Path(root, command), "--help")
    parts = re.search(r"[{]([\\w,-]+)[}] [.][.][.]", said)  # commands of its own, each with its own help
    for part in parts[1].split(",") if parts else ():
        ended, more = run(Path(root, command), part, "--help")
        status, said = status or ended, said + more
    outcome[command] = [status, said]
print(json.dumps(outcome))
"""


def commands() -> list[str]:
    """Every script, and every folder that is one, relative to ``benchmarks/``."""
    folders = [path.parent for path in BENCHMARKS.rglob("__main__.py")]
    scripts = [
        path for path in BENCHMARKS.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    ]
    inside = [path for path in scripts if path.parent not in folders]
    return sorted(str(path.relative_to(BENCHMARKS)) for path in [*folders, *inside])


@pytest.fixture(scope="module")
def outcome() -> dict[str, tuple[int | str, str]]:
    """Per command: its exit status, or what went wrong, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(BENCHMARKS), *commands()],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (status, said) for name, (status, said) in json.loads(done.stdout).items()}


def test_the_commands_are_seen() -> None:
    assert {"engine", "cost/memory.py", "evidence/null_audits.py"} <= set(commands())
    assert "evidence/shares.py" not in commands()


@pytest.mark.parametrize("command", commands())
def test_it_starts(command: str, outcome: dict[str, tuple[int | str, str]]) -> None:
    status, said = outcome[command]
    assert status == 0
    assert said.startswith("usage:")


def of_the_package() -> list[tuple[str, str, str]]:
    """(file, module, name) of every name that a benchmark takes from align_audit, also inside its functions."""
    return [
        (str(path.relative_to(BENCHMARKS)), node.module, alias.name)
        for path in sorted(BENCHMARKS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "align_audit"
        for alias in node.names
    ]


def test_what_benchmarks_take_from_the_package_is_there() -> None:
    """Most of them import late, so that starting one does not tell."""
    taken = of_the_package()
    assert ("evidence/null_audits.py", "align_audit.config", "AuditConfig") in taken
    assert [each for each in taken if not is_there(*each[1:])] == []


def is_there(module: str, name: str) -> bool:
    """Whether ``from module import name`` works."""
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(f"{module}.{name}"))
    except ImportError:
        return False


def test_a_name_that_is_gone_is_seen() -> None:
    assert is_there("align_audit.config", "AuditConfig")
    assert is_there("align_audit", "config")
    assert not is_there("align_audit.config", "Nothing")
    assert not is_there("align_audit.nothing", "AuditConfig")


def written(command: str) -> set[str]:
    """The options that follow ``python benchmarks/COMMAND`` in the documents and the benchmarks' own docstrings."""
    name = command.removesuffix("/")
    documents = [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *BENCHMARKS.rglob("*.py"),
        *ROOT.glob("align_audit/**/*.py"),
    ]
    options: set[str] = set()
    for path in documents:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        # In prose a command ends with its backtick, and may run over a line; in a block of code it ends with the line.
        for call in re.findall(rf"`python benchmarks/{re.escape(name)}(?=[\s`])([^`]*)`", text):
            options |= set(re.findall(r"--[a-z][a-z-]*", call))
        for call in re.findall(rf"^ *python benchmarks/{re.escape(name)}(?=\s)(.*)$", text, re.MULTILINE):
            options |= set(re.findall(r"--[a-z][a-z-]*", call.split("#")[0]))
    return options


@pytest.mark.parametrize("command", commands())
def test_it_has_the_options_that_are_written(command: str, outcome: dict[str, tuple[int | str, str]]) -> None:
    has = set(re.findall(r"--[a-z][a-z-]*", outcome[command][1].split("options:", 1)[1]))
    assert written(command) <= has


def test_written_options_are_read() -> None:
    assert written("evidence/null_audits.py") >= {"--audits", "--processes", "--json", "--trained", "--first"}
    assert written("engine") >= {"--sweeps", "--peer-python", "--device", "--max-tokens", "--scaling"}
