"""The documents speak of what is there: links, pictures, paths, commands and imports, and a README that stays short."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from align_audit import AuditConfig
from align_audit.cli.app import app
from tests.house import FLOORS

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED_PATH = re.compile(r"(?<![\w/.~<>-])(align_audit/[\w./-]*\.py|(?:tests|benchmarks|docs|recipes)/[\w./*-]*[\w/*])")
MODULE_RUN = re.compile(r"python -m ([\w.]+)")


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def prose(text: str) -> str:
    """The text without its blocks of code, in which nothing is a link."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Relative links and pictures of a document that lead nowhere."""
    broken = []
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, heading = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        if not there.exists() or (heading and heading not in anchors(there.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def named_paths(text: str) -> set[str]:
    """Paths of this repository that a document names: files, folders, patterns; of a test, its file.

    (``align_audit/margins`` may be a curve, and ``align_audit/records.jsonl`` a file of a run: of the package, modules only.)
    """
    return {path.rstrip(".") for path in NAMED_PATH.findall(text)}


def snippets(path: Path) -> list[str]:
    return [code for language, code in FENCE.findall(path.read_text(encoding="utf-8")) if language == "python"]


def imported(code: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a piece of Python; the name is None for ``import module``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_and_pictures_are_there(path: Path) -> None:
    assert broken_links(path) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# What is *there*, exactly\n")
    page.write_text(
        "## Here\n[a](other.md) [b](other.md#what-is-there-exactly) [c](#here) [d](https://example.org/x) ![e](no.png)\n"
        "[f](other.md#elsewhere) [g](#there)\n```\n[h](in/code.md)\n```\n"
    )
    assert broken_links(page) == ["no.png", "other.md#elsewhere", "#there"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_paths_and_modules_that_are_named_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = [named for named in named_paths(text) if not any(REPOSITORY.glob(named.rstrip("/")))]
    assert missing == []
    for module in MODULE_RUN.findall(text):
        assert importlib.util.find_spec(module) is not None, module


def test_named_paths_are_read() -> None:
    text = "`tests/test_docs.py::test_x`, `python benchmarks/engine --json x` and runs/tests/a.py, in docs/guides/, ../docs/b"
    more = "align_audit/margins/kl of `align_audit/cli/app.py`."
    assert named_paths(text) == {"tests/test_docs.py", "benchmarks/engine", "docs/guides/"}
    assert named_paths(more) == {"align_audit/cli/app.py"}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if snippets(path)], ids=name)
def test_imports_of_the_snippets_resolve(path: Path) -> None:
    for code in snippets(path):
        for module, attribute in imported(code):
            loaded = importlib.import_module(module)
            assert attribute is None or hasattr(loaded, attribute), f"{module}.{attribute}"


def configurations(text: str) -> Iterator[str]:
    """Every ``AuditConfig(...)`` that a document writes, in a snippet or in prose."""
    inline = re.findall(r"`(AuditConfig\([^`]*\))`", prose(text))
    for code in [*(code for language, code in FENCE.findall(text) if language == "python"), *inline]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "AuditConfig":
                yield ast.unparse(node)


def test_configurations_that_are_written_are_valid() -> None:
    written = [code for path in DOCUMENTS for code in configurations(path.read_text(encoding="utf-8"))]
    assert "AuditConfig(alerts={'action': 'stop'})" in written
    assert len(written) >= 5
    for code in written:
        eval(code, {"AuditConfig": AuditConfig})  # a wrong option raises


def test_options_of_the_command_that_are_written_are_there() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    has = {
        command: {name for each in commands[command].params for name in (*each.opts, *each.secondary_opts)}
        for command in commands
    }
    written = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"^align-audit (\w+)(.*)$", text, re.MULTILINE):
            # What stands behind -- is another program's.
            written += [(command, option) for option in re.findall(r"--[a-z-]+", rest.split(" -- ")[0])]
    table = (REPOSITORY / "docs" / "guides" / "checkpoints.md").read_text(encoding="utf-8")
    written += [
        ("run", option)
        for row in re.findall(r"^\| (`--.*?) \|", table, re.MULTILINE)
        for option in re.findall(r"--[a-z-]+", row)
    ]
    assert ("transfer", "--basis") in written
    assert ("run", "--max-length") in written
    assert [(command, option) for command, option in written if option not in has[command]] == []


def test_some_snippets_import() -> None:
    """The check above has something to check, in the README and in the guides."""
    assert ("align_audit", "AlignmentAuditCallback") in [each for code in snippets(README) for each in imported(code)]
    guides = [path for path in DOCUMENTS if path.parent.name == "guides"]
    assert sum(bool(list(imported(code))) for path in guides for code in snippets(path)) >= 5


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert text.count("![") == 1
    linked = {(README.parent / target.partition("#")[0]).resolve() for target in LINK.findall(text)}
    assert set(DOCUMENTS) - {README} <= linked


def test_the_table_of_floors_is_the_house() -> None:
    """docs/architecture.md names every room on its floor, and no other."""
    table = (
        (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Floors")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", table, re.MULTILINE)
    written = {(int(floor), room) for floor, rooms in rows for room in re.findall(r"`([\w.]+?)(?:/|\.py)`", rooms)}
    house = {(number, room) for number, rooms in enumerate(FLOORS, start=1) for room in rooms if room != "__main__"}
    assert written == house
