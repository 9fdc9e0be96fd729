"""The rooms of the house keep their doors shut: which module may import which, and how light the package is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import align_audit

ROOT = Path(align_audit.__file__).parent
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "pandas",
)


def imports(path: Path, *, top: bool = False) -> set[str]:
    """Dotted names that a file imports anywhere (``top``: outside functions and ``if TYPE_CHECKING``).

    ``from a import b`` counts as both ``a`` and ``a.b``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def rooms(path: Path, *, top: bool = False) -> set[str]:
    """The parts of align_audit among a file's imports: ``models``, ``record``, …"""
    return {name.split(".")[1] for name in imports(path, top=top) if name.startswith("align_audit.")}


def files(*parts: str) -> list[Path]:
    found: list[Path] = []
    for part in parts:
        place = ROOT / part
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert found
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


ABOVE = {"conductor", "auditing", "callback", "cli", "saved", "writers", "alerts", "runlog"}


@pytest.mark.parametrize("path", files("measures"), ids=name)
def test_measures_know_tensors_only(path: Path) -> None:
    forbidden = ABOVE | {"models", "record", "config", "probes", "batches"}
    assert not rooms(path) & forbidden
    assert not {root.split(".")[0] for root in imports(path)} & {
        "transformers",
        "peft",
        "trl",
        "accelerate",
        "datasets",
    }


@pytest.mark.parametrize("path", files("models"), ids=name)
def test_models_know_neither_measures_nor_records(path: Path) -> None:
    assert not rooms(path) & (ABOVE | {"measures", "record", "config", "probes", "batches"})


@pytest.mark.parametrize("path", files("alerts.py", "writers", "record.py"), ids=name)
def test_alerts_and_writers_see_records_only(path: Path) -> None:
    assert not rooms(path) & {"models", "measures", "conductor", "auditing", "callback", "probes", "batches", "cli"}
    loaded = {root.split(".")[0] for root in imports(path, top=True)}
    assert not loaded & {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib"}
    if path.name != "locate.py":
        assert not {root.split(".")[0] for root in imports(path)} & {"transformers", "trl", "peft", "accelerate"}


@pytest.mark.parametrize("path", files("alerts.py", "record.py", "config.py", "errors.py"), ids=name)
def test_what_records_are_made_of_needs_no_tensors(path: Path) -> None:
    assert not {root.split(".")[0] for root in imports(path)} & set(HEAVY)


@pytest.mark.parametrize("path", files(""), ids=name)
def test_data_never_walks_back(path: Path) -> None:
    """Nobody imports the command line, and only the package's own surface and the command line the callback."""
    own = name(path)
    if own not in ("cli.py", "__main__.py"):
        assert "cli" not in rooms(path)
    if own not in ("__init__.py", "cli.py", "saved.py"):
        assert "callback" not in rooms(path)
    if own.startswith("conductor/"):
        assert not rooms(path) & {"auditing", "callback", "alerts", "writers", "runlog", "saved"}


def test_nothing_but_planting_knows_what_was_planted() -> None:
    """The audit cannot lean on it, and it reads models by itself: neither can make the other right."""
    inside = set(files("planting"))
    for path in set(ROOT.rglob("*.py")) - inside:
        assert "planting" not in rooms(path), name(path)
    for path in inside:
        assert not rooms(path) & (ABOVE | {"measures", "record", "config", "batches"}), name(path)


def test_the_reading_of_imports_sees_them_all(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport os.path\nfrom align_audit import record\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import json\n"
        "def f():\n    from align_audit.models.anatomy import Anatomy\n"
        "class C:\n    import math\n    def g(self):\n        import trl\n"
        "try:\n    import yaml\nexcept ImportError:\n    pass\n"
    )
    assert imports(path) >= {"torch", "json", "trl", "math", "yaml", "os.path", "align_audit.models.anatomy"}
    assert rooms(path) == {"record", "models"}
    assert rooms(path, top=True) == {"record"}
    assert imports(path, top=True) >= {"json", "math", "yaml", "os.path"}
    assert not imports(path, top=True) & {"torch", "trl"}


def modules_after(code: str) -> set[str]:
    """Top-level names in ``sys.modules`` after ``code`` ran in a new process."""
    program = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    loaded = modules_after("import align_audit; dir(align_audit); align_audit.__version__")
    assert "align_audit" in loaded
    assert not loaded & {*HEAVY, "numpy", "scipy", "pydantic", "rich", "typer"}


@pytest.mark.parametrize(
    "code",
    [
        "from align_audit import AuditConfig; AuditConfig()",
        "from align_audit import AuditRecord, Alert",
        "import align_audit.alerts, align_audit.writers",
    ],
)
def test_records_and_alerts_load_without_torch(code: str) -> None:
    assert not modules_after(code) & {"torch", "transformers", "trl", "peft", "sklearn", "matplotlib"}


def test_torch_is_noticed_where_it_is_needed() -> None:
    """The check above could fail."""
    assert "torch" in modules_after("from align_audit.batches import make_batch")


def test_every_public_name_can_be_had() -> None:
    for public in align_audit.__all__:
        assert getattr(align_audit, public).__name__ == public
    with pytest.raises(AttributeError, match=r"'align_audit' has no attribute 'Audit'; it has Alert, .*, audit"):
        align_audit.Audit  # noqa: B018
