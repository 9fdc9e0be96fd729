"""The rooms of the house keep their doors shut: which module may import which, and how light the package is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import align_audit
from tests import house
from tests.helpers.longest import LONGEST
from tests.house import (
    LIMITS,
    ROOT,
    WITHIN,
    circles,
    climbing,
    files,
    imports,
    misplaced,
    module_of,
    out_of_order,
    plurals_by_hand,
    room_of,
    too_long,
    vague_names,
)

HEAVY = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "sklearn", "matplotlib", "tensorboard", "pandas",
)  # fmt: skip
LONGER: dict[str, str] = {}
"""What is longer than ``house.LIMITS`` and stays so, as ``python -m tests.house`` calls it → why its parts would be worse."""
FRAMEWORKS = {"transformers", "peft", "trl", "accelerate", "datasets"}


def roots(path: Path, *, top: bool = False) -> set[str]:
    """The packages that a file imports from."""
    return {used.module.split(".")[0] for used in imports(path, top=top)}


def rooms(path: Path) -> set[str]:
    """The parts of align_audit among a file's imports."""
    return {room_of(used.module) for used in imports(path) if used.module.startswith("align_audit.")}


def inside(*parts: str) -> list[Path]:
    found = [path for path in files() if path.relative_to(ROOT).parts[0] in parts]
    assert found
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_that_are_put_first_are_there() -> None:
    assert [file for file in LONGEST if not (ROOT.parent / "tests" / file).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)


def test_every_module_is_in_a_room() -> None:
    assert misplaced() == []


def test_imports_go_down_only() -> None:
    assert climbing() == []


def test_rooms_are_in_order_inside() -> None:
    assert out_of_order() == []
    for room, entries in WITHIN.items():
        for entry in entries:
            assert (ROOT / room / entry).is_dir() or (ROOT / room / f"{entry}.py").is_file(), f"{room}/{entry} is gone"


def test_no_modules_import_each_other_in_circles() -> None:
    assert circles() == []


def a_house(root: Path, **modules: str) -> Path:
    """A package on disk with these modules (``measures__patching="import …"``)."""
    for dotted, code in modules.items():
        path = root / "align_audit" / (dotted.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return root / "align_audit"


def test_an_import_upward_or_across_is_seen(tmp_path: Path) -> None:
    root = a_house(
        tmp_path,
        measures__patching="def f():\n    from align_audit.auditing import audit\n",
        alerts__detectors="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import align_audit.writers.words\n",
        cli__app="import align_audit.measures.patching\nfrom align_audit.errors import X\n",
        errors="",
    )
    assert {line.split(" imports ")[0] for line in climbing(root)} == {
        "measures/patching.py:2",
        "alerts/detectors.py:3",
    }
    assert "up: align_audit.auditing" in " ".join(climbing(root))
    assert "across: align_audit.writers" in " ".join(climbing(root))


def test_an_import_from_above_inside_a_room_is_seen(tmp_path: Path) -> None:
    root = a_house(
        tmp_path,
        auditing__audit="import align_audit.auditing.measurements.patching\nfrom align_audit.auditing import session\n",
        auditing__previous="def f():\n    from align_audit.auditing.audit import audit\n",
        auditing__session__walk="from align_audit.auditing.session.layout import X\nimport align_audit.auditing.previous\n",
        auditing__session__layout="",
        auditing__measurements__patching="import align_audit.auditing.session.walk, align_audit.auditing.request\n",
        auditing__request="from align_audit.auditing.measurements import patching\n",
    )
    assert {line.split(" imports ")[0] for line in out_of_order(root)} == {
        "auditing/previous.py:2",
        "auditing/session/walk.py:2",
        "auditing/request.py:1",
    }


def test_nothing_is_too_long_but_what_has_a_reason() -> None:
    assert set(too_long()) == set(LONGER)


def test_what_is_too_long_is_seen(tmp_path: Path) -> None:
    def of(header: str, kind: str, more: int) -> str:
        return "\n    ".join([header, '"""Counts too."""', *["pass"] * (LIMITS[kind] - 2 + more)]) + "\n"

    root = a_house(
        tmp_path,
        measures__a=of("def at_limit():", "functions", 0) + of("async def above():", "functions", 1),
        measures__b="class C:\n    " + of("def f(self):", "functions", 1).replace("\n", "\n    "),
        measures__c=of("class D:", "classes", 0) + "\n" + "x = 1\n" * (LIMITS["files"] - LIMITS["classes"]),
        measures__d=of("class E:", "classes", 1) + "x = 1\n" * (LIMITS["files"] - LIMITS["classes"] - 1),
    )
    assert sorted(too_long(root)) == ["measures/a.py: above", "measures/b.py: f", "measures/c.py", "measures/d.py: E"]


def test_no_name_is_vague() -> None:
    assert vague_names() == {}


def test_vague_names_are_counted_where_they_are_given(tmp_path: Path) -> None:
    root = a_house(
        tmp_path,
        measures__a="def f(other, margin):\n    found = other\n    return found\nclass C:\n    own: int\n    _known = 1\n",
        measures__b="margin = found = 1\nprint(found)\n",
        measures__c="margin = 1\n",
    )
    assert vague_names(root) == {
        "measures/a.py": {"other": 1, "found": 1, "own": 1, "_known": 1},
        "measures/b.py": {"found": 1},
    }


def test_no_plural_is_made_by_hand(tmp_path: Path) -> None:
    assert plurals_by_hand() == []
    by_hand = """a = f"{n} audit{'s' if n != 1 else ''}"\nb = "s" * (n != 1)\nc = f"{n} audit(s) in {t} s"\n"""
    assert sorted(plurals_by_hand(a_house(tmp_path, writers__a=by_hand))) == [
        f"writers/a.py:{line}" for line in (1, 2, 3)
    ]


def test_a_module_in_no_room_and_a_circle_are_seen(tmp_path: Path) -> None:
    root = a_house(
        tmp_path,
        helpers="import align_audit.measures.a",
        measures__a="import align_audit.measures.b",
        measures__b="from align_audit.measures import a",
        measures__c="def f():\n    import align_audit.measures.a",
    )
    assert misplaced(root) == ["helpers"]
    assert circles(root) == [["align_audit.measures.a", "align_audit.measures.b"]]


def test_the_report_is_made_of_what_is_there() -> None:
    report = "\n".join(house._report())
    assert "circles: 0" in report
    assert f"{house.lengths()['files'][0][0]} {house.lengths()['files'][0][1]}" in report


@pytest.mark.parametrize("path", inside("measures"), ids=name)
def test_measures_know_tensors_only(path: Path) -> None:
    assert not roots(path) & FRAMEWORKS


@pytest.mark.parametrize("path", inside("alerts", "writers", "record", "config.py"), ids=name)
def test_what_is_read_back_needs_no_model(path: Path) -> None:
    assert not rooms(path) & {"models", "measures", "probes", "auditing"}
    assert not roots(path, top=True) & {*FRAMEWORKS, "torch", "matplotlib", "sklearn"}
    assert not roots(path) & FRAMEWORKS


@pytest.mark.parametrize("path", inside("alerts", "config.py", "errors.py"), ids=name)
def test_what_judges_needs_no_tensors(path: Path) -> None:
    assert not roots(path) & set(HEAVY)


def test_nothing_but_the_lab_knows_what_was_planted() -> None:
    """The audit cannot lean on it, and planting reads models by itself: neither can make the other right."""
    planting = [path for path in files() if "planting" in path.parts]
    assert planting
    for path in planting:
        assert not rooms(path) & {"measures", "record", "config", "auditing"}, name(path)
    for path in set(inside("auditing", "measures", "models", "monitoring", "record", "alerts", "writers")):
        assert not any("planting" in used.module for used in imports(path)), name(path)


def test_the_reading_of_imports_sees_them_all(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport os.path\nfrom align_audit import record\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import json\n"
        "def f():\n    from align_audit.models.anatomy import Anatomy\n"
        "class C:\n    import math\n    def g(self):\n        import trl\n"
        "try:\n    import yaml\nexcept ImportError:\n    pass\n"
    )
    seen = {used.module for used in imports(path)}
    assert seen >= {"torch", "json", "trl", "math", "yaml", "os.path", "align_audit.models.anatomy"}
    at_load = {used.module for used in imports(path, top=True)}
    assert at_load >= {"json", "math", "yaml", "os.path", "align_audit.record"}
    assert not at_load & {"torch", "trl", "align_audit.models.anatomy"}
    assert module_of(ROOT / "measures" / "patching.py") == "align_audit.measures.patching"


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
        "import align_audit.alerts.detectors, align_audit.writers",
    ],
)
def test_records_and_alerts_load_without_torch(code: str) -> None:
    assert not modules_after(code) & {"torch", "transformers", "trl", "peft", "sklearn", "matplotlib"}


def test_torch_is_noticed_where_it_is_needed() -> None:
    """The check above could fail."""
    assert "torch" in modules_after("from align_audit.probes.batches import make_batch")


def test_every_public_name_can_be_had() -> None:
    for public in align_audit.__all__:
        assert getattr(align_audit, public).__name__ == public
    with pytest.raises(AttributeError, match=r"'align_audit' has no attribute 'Audit'; it has Alert, .*, audit"):
        align_audit.Audit  # noqa: B018
