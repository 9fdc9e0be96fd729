"""What is declared about the package agrees: the lock with the bounds, versions and addresses with each other, distributions
with the repository."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import re
import subprocess
import tomllib
from collections.abc import Iterable
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import align_audit
from align_audit.options.trackers import TRACKER_NAMES
from tests.house import files, imports
from tests.wheel import REPOSITORY, source_faults, wheel_faults

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^()\s]+)\)")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def lock() -> dict[str, Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def direct(project: dict[str, Any]) -> list[Requirement]:
    """What pyproject.toml names for `make install`."""
    extras = project["optional-dependencies"]
    named = [Requirement(line) for line in [*project["dependencies"], *extras["test"], *extras["dev"]]]
    return [requirement for requirement in named if canonicalize_name(requirement.name) != "align-audit"]


def needed(requirements: Iterable[Requirement]) -> set[str]:
    """The names of what these need here, and what that needs in turn, as far as it is installed."""
    names: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in names:
            continue
        names.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        extras = {*requirement.extras, ""}
        for further in map(Requirement, lines):
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return names


def test_the_lock_names_all_that_is_installed(project: dict[str, Any], lock: dict[str, Requirement]) -> None:
    names = needed(direct(project))
    assert len(names) > 60
    assert sorted(names - set(lock)) == [], "run `make lock`"


def test_the_lock_pins_what_the_bounds_allow(project: dict[str, Any], lock: dict[str, Requirement]) -> None:
    for requirement in direct(project):
        (pin,) = lock[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow {pin}: run `make lock`"


def test_what_the_package_imports_is_declared(project: dict[str, Any]) -> None:
    """Every distribution that a module of the package imports is named, not only one that needs it."""
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    of_module = importlib.metadata.packages_distributions()
    imported = set()
    for path in (REPOSITORY / "align_audit").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    imported -= set(TRACKER_NAMES)  # an extra: the next test is of them
    # pydantic requires the one version of its core that fits it.
    ours = {"align-audit", "pydantic-core"}
    external = {canonicalize_name(name) for module in imported for name in of_module.get(module, [])} - ours
    assert {"torch", "pyarrow"} <= external
    assert sorted(external - declared) == []


def test_clients_of_trackers_are_imported_where_a_run_of_theirs_is_open(project: dict[str, Any]) -> None:
    """They come with an extra: nothing imports them at its top, nor outside what writes to them."""
    clients = {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"]["trackers"]}
    importing = {
        path: roots for path in files() if (roots := {each.module.split(".")[0] for each in imports(path)} & clients)
    }
    assert {name for roots in importing.values() for name in roots} == clients == set(TRACKER_NAMES)
    assert {path.parent.name for path in importing} == {"trackers"}
    assert not [each for path in importing for each in imports(path, top=True) if each.module.split(".")[0] in clients]


def test_versions_agree(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"] == align_audit.__version__
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Source"]


def test_pictures_of_the_readme_are_shown_elsewhere_too(project: dict[str, Any]) -> None:
    """A package index shows only pictures with whole addresses; theirs are of files that are here."""
    beginning = project["urls"]["Source"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    pictures = PICTURE.findall(README)
    assert pictures
    for address in pictures:
        assert address.startswith(beginning)
        assert (REPOSITORY / address.removeprefix(beginning)).is_file()


def test_faults_of_a_wheel_are_seen() -> None:
    tracked = ["align_audit/__init__.py", "align_audit/py.typed", "tests/test_a.py", "README.md"]
    metadata = ["a-1.dist-info/METADATA", "a-1.dist-info/entry_points.txt"]
    assert wheel_faults([*tracked[:2], *metadata], tracked) == []
    assert wheel_faults(["align_audit/__init__.py", "tests/test_a.py", metadata[0]], tracked) == [
        "the wheel lacks align_audit/py.typed",
        "the wheel has tests/test_a.py, which is none of the package",
        "the wheel's metadata lacks entry_points.txt",
    ]


def test_faults_of_a_source_distribution_are_seen() -> None:
    tracked = ["align_audit/__init__.py", "tests/test_a.py", ".gitignore", ".ci/run"]
    assert source_faults([*tracked[:2], "PKG-INFO", "setup.cfg", "a.egg-info/SOURCES.txt"], tracked) == []
    assert source_faults(["align_audit/__init__.py", "notes.txt"], tracked) == [
        "the source distribution lacks tests/test_a.py",
        "the source distribution has notes.txt",
    ]


def test_every_file_at_the_top_is_in_the_source_distribution() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no repository here")
    top = {name for name in done.stdout.splitlines() if "/" not in name and not name.startswith(".")}
    (words,) = [
        line.split()[1:]
        for line in (REPOSITORY / "MANIFEST.in").read_text().splitlines()
        if line.startswith("include ")
    ]
    told = {name for name in top if any(fnmatch.fnmatch(name, word) for word in words)}
    assert top - told <= {"LICENSE", "pyproject.toml"}, "setuptools takes those by itself"
