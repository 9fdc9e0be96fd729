"""An exit that a handler of a signal asks for ends the program, wherever in align_audit it comes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "align_audit"
CATCHING = {"SystemExit", "BREAKS", "_ANYTHING"}
"""What an ``except`` names that catches exits."""
PASSING = {"pass_exit_on", "fail"}
"""What is called that lets such an exit pass; ``Findings.fail`` does so first."""
ELSEWHERE = {
    "writers/trackers/sender.py: _tried": "runs in a thread of its own, and handlers of signals run in the main one",
    "monitoring/callback.py: on_train_begin": "is raised again, on all processes together, by what follows",
}


def _names(node: ast.expr | None) -> set[str]:
    return set() if node is None else {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _passes(handler: ast.ExceptHandler) -> bool:
    """Whether it lets exits pass, or raises whatever comes again."""
    calls = [each.func for statement in handler.body for each in ast.walk(statement) if isinstance(each, ast.Call)]
    called = {getattr(func, "id", getattr(func, "attr", None)) for func in calls}
    last = handler.body[-1]
    return bool(called & PASSING) or (isinstance(last, ast.Raise) and last.exc is None)


def _catching(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.ExceptHandler]]:
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.ExceptHandler) and _names(node.type) & CATCHING:
            yield name, node
        yield from _catching(node, name)


def _all() -> list[tuple[str, bool]]:
    places = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        for function, handler in _catching(ast.parse(path.read_text(encoding="utf-8"))):
            places.append((f"{where}: {function}", _passes(handler)))
    return places


PLACES = _all()


@pytest.mark.parametrize("place", sorted({place for place, _ in PLACES}))
def test_an_exit_passes(place: str) -> None:
    passing = all(passes for where, passes in PLACES if where == place)
    assert passing is not (place in ELSEWHERE), "expected pass_exit_on(error) first"


def test_the_places_are_found() -> None:
    assert len(PLACES) > 15
    assert set(ELSEWHERE) <= {place for place, _ in PLACES}
