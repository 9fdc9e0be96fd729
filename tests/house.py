"""The house as it stands: floors, circles, and what has grown long.

    python -m tests.house

prints them. :data:`FLOORS` is the one table of which part of the package lies where; ``test_house.py`` holds it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "align_audit"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("measures", "ranks", "errors", "files", "rules", "webhook_options", "yaml_lines"),
    ("probes", "models", "record", "config"),
    ("auditing", "alerts", "writers"),
    ("monitoring",),
    ("lab", "__init__"),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room imports from floors below its own, and from itself; ``errors`` and ``files`` are for all."""


@dataclass(frozen=True)
class Import:
    """One import of one file."""

    path: Path
    line: int
    module: str


def files(root: Path = ROOT) -> list[Path]:
    """Every module of the package."""
    return sorted(path for path in root.rglob("*.py"))


def module_of(path: Path, root: Path = ROOT) -> str:
    """The dotted name of a file."""
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path, *, top: bool = False) -> list[Import]:
    """What a file imports anywhere (``top``: outside functions and ``if TYPE_CHECKING``).

    ``from a import b`` counts as both ``a`` and ``a.b``.
    """
    found: list[Import] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found.append(Import(path, node.lineno, node.module or ""))
            found.extend(Import(path, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        if top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def room_of(module: str) -> str:
    """The part of the package that a module lies in: ``models``, ``record``, …"""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor_of(room: str) -> int | None:
    """Where a room lies; None: in no floor of the table."""
    return next((floor for floor, rooms in enumerate(FLOORS, start=1) if room in rooms), None)


def misplaced(root: Path = ROOT) -> list[str]:
    """Parts of the package's top level that are in no floor."""
    entries = {path.stem if path.suffix == ".py" else path.name for path in root.iterdir() if _is_code(path)}
    return sorted(entry for entry in entries if floor_of(entry) is None)


def _is_code(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))


def climbing(root: Path = ROOT) -> list[str]:
    """Imports upward, or across a floor, in words."""
    found = []
    for path in files(root):
        own = room_of(module_of(path, root))
        here = floor_of(own)
        for used in imports(path):
            if not used.module.startswith(f"{root.name}."):
                continue
            other = room_of(used.module)
            there = floor_of(other)
            if other == own or other in ("errors", "files") or here is None or there is None:
                continue
            if there >= here:
                words = "up" if there > here else "across"
                found.append(f"{path.relative_to(root)}:{used.line} imports {words}: {used.module}")
    return sorted(set(found))


def circles(root: Path = ROOT) -> list[list[str]]:
    """Modules that import each other at load, in circles (strongly connected components of more than one)."""
    known = {module_of(path, root): path for path in files(root)}
    edges = {
        name: {used.module for used in imports(path, top=True) if used.module in known and used.module != name}
        for name, path in known.items()
    }
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str, along: dict[str, set[str]], into: list[str]) -> None:
        stack = [(name, iter(along[name]))]
        seen.add(name)
        while stack:
            at, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                into.append(at)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(along[following])))

    for name in known:
        if name not in seen:
            visit(name, edges, order)
    against: dict[str, set[str]] = {name: set() for name in known}
    for name, used in edges.items():
        for other in used:
            against[other].add(name)
    seen.clear()
    found = []
    for name in reversed(order):
        if name not in seen:
            component: list[str] = []
            visit(name, against, component)
            if len(component) > 1:
                found.append(sorted(component))
    return found


def lengths(root: Path = ROOT) -> dict[str, list[tuple[int, str]]]:
    """Lines of every file, function and class, longest first."""
    found: dict[str, list[tuple[int, str]]] = {"files": [], "functions": [], "classes": []}
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        where = str(path.relative_to(root))
        found["files"].append((text.count("\n"), where))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "classes" if isinstance(node, ast.ClassDef) else "functions"
                found[kind].append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{where}: {node.name}"))
    return {kind: sorted(rows, reverse=True) for kind, rows in found.items()}


def _report() -> Iterator[str]:
    entries = sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__" and path.name != "py.typed")
    yield f"entries of the top level: {len(entries)}: {', '.join(entries)}"
    yield f"floors: {len(FLOORS)}"
    for floor in range(len(FLOORS), 0, -1):
        yield f"  {floor}  {'  '.join(FLOORS[floor - 1])}"
    yield f"in no floor: {', '.join(misplaced()) or 'nothing'}"
    yield f"imports upward or across: {len(climbing())}"
    yield from (f"  {words}" for words in climbing())
    yield f"circles: {len(circles())}"
    yield from ("  " + " ".join(circle) for circle in circles())
    for kind, rows in lengths().items():
        yield f"longest {kind}:"
        yield from (f"  {lines:5} {name}" for lines, name in rows[:10])


if __name__ == "__main__":
    print("\n".join(_report()))
