"""The house as it stands: floors, circles, what has grown long, and names that say nothing.

    python -m tests.house

prints them. :data:`FLOORS` is the one table of which part of the package lies where, :data:`WITHIN` of what lies below what in
a room, :data:`LIMITS` of how long a file, a function and a class may be; ``test_house.py`` holds them.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "align_audit"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("measures", "ranks", "errors", "files", "options"),
    ("probes", "models", "record", "config"),
    ("auditing", "alerts", "writers"),
    ("monitoring",),
    ("lab", "__init__"),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room imports from floors below its own, and from itself; ``errors`` and ``files`` are for all."""

WITHIN: dict[str, tuple[str, ...]] = {
    "auditing": ("session", "previous", "request", "measurements"),
    "models": ("anatomy", "weights"),
    "writers": ("words", "standing", "plots"),
    "lab": ("planting",),
}
"""Inside a room, from the ground up: each of these imports, of its room, only itself and those before it; the rest is above."""

LIMITS = {"files": 450, "functions": 60, "classes": 250}
"""Lines at most, with docstrings, comments and empty ones."""

VAGUE = frozenset(
    [
        "found",
        "own",
        "other",
        "others",
        "known",
        "one",
        "whole",
        "before",
        "build",
        "built",
        "ours",
        "theirs",
        "mine",
        "its",
    ]
)
"""Names that say nothing to a search: pronouns, participles and numbers where a noun of the field belongs."""


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
    return _imports(path, top, path.stat().st_mtime_ns)


@functools.cache
def _imports(path: Path, top: bool, written: int) -> list[Import]:
    """:func:`imports` of the file as it was ``written`` at that time; asked for many times over."""
    seen: list[Import] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            seen.extend(Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            seen.append(Import(path, node.lineno, node.module or ""))
            seen.extend(Import(path, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        if top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return seen


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
    words = set()
    for path in files(root):
        room = room_of(module_of(path, root))
        floor = floor_of(room)
        for used in imports(path):
            if not used.module.startswith(f"{root.name}."):
                continue
            used_room = room_of(used.module)
            used_floor = floor_of(used_room)
            if used_room in (room, "errors", "files") or floor is None or used_floor is None:
                continue
            if used_floor >= floor:
                way = "up" if used_floor > floor else "across"
                words.add(f"{path.relative_to(root)}:{used.line} imports {way}: {used.module}")
    return sorted(words)


def out_of_order(root: Path = ROOT) -> list[str]:
    """Imports inside a room from what lies above, in words."""
    words = set()
    for path in files(root):
        room, entry = _place(module_of(path, root))
        order = WITHIN.get(room, ())
        for used in imports(path):
            used_room, used_entry = _place(used.module)
            if (
                not used.module.startswith(f"{root.name}.")
                or used_room != room
                or used_entry == entry
                or not used_entry
            ):
                continue
            # ``from a.room import name`` counts as ``a.room.name``, which may be no module.
            if not _is_code(root / room / used_entry) and not (root / room / f"{used_entry}.py").exists():
                continue
            if entry in order and used_entry not in order[: order.index(entry)]:
                words.add(f"{path.relative_to(root)}:{used.line} imports from above, within {room}: {used.module}")
    return sorted(words)


def _place(module: str) -> tuple[str, str]:
    """The room of a module, and which entry of it the module is or lies in; empty for the room itself."""
    parts = module.split(".")
    return room_of(module), parts[2] if len(parts) > 2 else ""


def circles(root: Path = ROOT) -> list[list[str]]:
    """Modules that import each other at load, in circles (strongly connected components of more than one)."""
    paths = {module_of(path, root): path for path in files(root)}
    edges = {
        name: {used.module for used in imports(path, top=True) if used.module in paths and used.module != name}
        for name, path in paths.items()
    }
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str, along: dict[str, set[str]], into: list[str]) -> None:
        stack = [(name, iter(along[name]))]
        seen.add(name)
        while stack:
            at, rest = stack[-1]
            following = next((module for module in rest if module not in seen), None)
            if following is None:
                into.append(at)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(along[following])))

    for name in paths:
        if name not in seen:
            visit(name, edges, order)
    against: dict[str, set[str]] = {name: set() for name in paths}
    for name, used in edges.items():
        for module in used:
            against[module].add(name)
    seen.clear()
    components = []
    for name in reversed(order):
        if name not in seen:
            component: list[str] = []
            visit(name, against, component)
            if len(component) > 1:
                components.append(sorted(component))
    return components


def lengths(root: Path = ROOT) -> dict[str, list[tuple[int, str]]]:
    """Lines of every file, function and class, longest first."""
    rows: dict[str, list[tuple[int, str]]] = {"files": [], "functions": [], "classes": []}
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        where = str(path.relative_to(root))
        rows["files"].append((text.count("\n"), where))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "classes" if isinstance(node, ast.ClassDef) else "functions"
                rows[kind].append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{where}: {node.name}"))
    return {kind: sorted(longest, reverse=True) for kind, longest in rows.items()}


def too_long(root: Path = ROOT) -> list[str]:
    """Files, functions and classes above :data:`LIMITS`, as :func:`lengths` calls them."""
    return [name for kind, rows in lengths(root).items() for lines, name in rows if lines > LIMITS[kind]]


def vague_names(root: Path = ROOT) -> dict[str, Counter[str]]:
    """How often each file gives one of the :data:`VAGUE` names to something: a variable, an argument, a field, a function."""
    counts: dict[str, Counter[str]] = {}
    for path in files(root):
        names = Counter(
            name for name in _given(ast.parse(path.read_text(encoding="utf-8"))) if name.strip("_") in VAGUE
        )
        if names:
            counts[str(path.relative_to(root))] = names
    return counts


def plurals_by_hand(root: Path = ROOT) -> list[str]:
    """Where a text chooses between an ``s`` and none, or leaves it to the reader: ``errors.plural`` does it."""
    places = []
    for path in files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            chooses = isinstance(node, ast.IfExp) and {_text(node.body), _text(node.orelse)} == {"", "s"}
            times = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _text(node.left) == "s"
            if chooses or times or (_text(node) or "").endswith("(s)") or "(s) " in (_text(node) or ""):
                places.append(f"{path.relative_to(root)}:{node.lineno}")  # type: ignore[attr-defined]
    return places


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _given(tree: ast.AST) -> Iterator[str]:
    """Every name that is given in a file, as often as it is, but for operators' ``other``, which is Python's name for it."""
    operators = {
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("__") and node.name.endswith("__")
        for argument in node.args.args[1:2]
        if argument.arg == "other"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg) and node not in operators:
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def _report() -> Iterator[str]:
    entries = sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__" and path.name != "py.typed")
    yield f"entries of the top level: {len(entries)}: {', '.join(entries)}"
    yield f"floors: {len(FLOORS)}"
    for floor in range(len(FLOORS), 0, -1):
        yield f"  {floor}  {'  '.join(FLOORS[floor - 1])}"
    yield f"in no floor: {', '.join(misplaced()) or 'nothing'}"
    in_circles = [" ".join(circle) for circle in circles()]
    for what, lines in (
        ("imports upward or across", climbing()),
        ("imports from above within a room", out_of_order()),
        ("circles", in_circles),
    ):
        yield f"{what}: {len(lines)}"
        yield from (f"  {line}" for line in lines)
    for kind, rows in lengths().items():
        yield f"longest {kind} (at most {LIMITS[kind]} lines):"
        yield from (f"  {lines:5} {name}" for lines, name in rows[:10])
    by_file, by_room = vague_names(), Counter[str]()
    for name, names in by_file.items():
        by_room[name.split("/")[0].removesuffix(".py")] += names.total()
    yield f"vague names given: {by_room.total()}"
    yield from (f"  {count:5} {room}" for room, count in by_room.most_common())
    yield "most of them in:"
    for name, names in sorted(by_file.items(), key=lambda item: -item[1].total())[:15]:
        yield f"  {names.total():5} {name}: {', '.join(f'{word} {count}' for word, count in names.most_common())}"


if __name__ == "__main__":
    print("\n".join(_report()))
