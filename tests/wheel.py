"""The wheel and the source distribution, built, looked into, and the wheel's demo run from an environment of its own.

    python -m tests.wheel

does it all in a temporary folder, takes minutes (``--no-demo``: up to the demo), and exits 1 with what is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[1]

PACKAGE = "align_audit"
OF_THE_REPOSITORY_ALONE = (".ci/", ".gitignore")
"""Tracked, and in no distribution."""


def tracked_files() -> set[str]:
    """What git keeps, as paths below the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {path for path in listed.stdout.split("\0") if path}


def wheel_faults(inside: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """What a wheel has that it should not, and lacks that it should have: all of the package and its metadata."""
    inside = set(inside)
    package = {path for path in tracked if PurePosixPath(path).parts[0] == PACKAGE}
    metadata = {path for path in inside if PurePosixPath(path).parts[0].endswith(".dist-info")}
    faults = [f"the wheel lacks {path}" for path in sorted(package - inside)]
    faults += [f"the wheel has {path}, which is none of the package" for path in sorted(inside - package - metadata)]
    files = {str(PurePosixPath(*PurePosixPath(path).parts[1:])) for path in metadata}
    return faults + [
        f"the wheel's metadata lacks {name}" for name in ("entry_points.txt", "METADATA") if name not in files
    ]


def source_faults(inside: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Tracked files that a source distribution lacks, and others that it has; paths below its one folder."""
    inside = set(inside)
    expected = {path for path in tracked if not path.startswith(OF_THE_REPOSITORY_ALONE)}
    made = {path for path in inside if path in ("PKG-INFO", "setup.cfg") or ".egg-info/" in path}
    faults = [f"the source distribution lacks {path}" for path in sorted(expected - inside)]
    return faults + [f"the source distribution has {path}" for path in sorted(inside - expected - made)]


def read_distributions(folder: Path) -> tuple[Path, set[str], set[str]]:
    """The wheel's path, what is in it, and what is in the source distribution below its folder."""
    (wheel,), (source,) = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(source) as archive_of_source:
        members = [PurePosixPath(member.name) for member in archive_of_source.getmembers() if member.isfile()]
    return wheel, packed, {str(PurePosixPath(*member.parts[1:])) for member in members}


def do(*arguments: str | Path, cwd: Path = REPOSITORY) -> None:
    """Run a command without this checkout on Python's path."""
    print("$", *arguments, flush=True)
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([str(part) for part in arguments], cwd=cwd, env=environment, check=True)


def pinned(name: str) -> str:
    """The lock's line of a package."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def check_wheel(folder: Path, demo: bool, torch_index: str) -> list[str]:
    """Build, look inside, install the wheel and run it, all in ``folder``; what is wrong with the files.

    Args:
        torch_index: address of a package index that torch is taken from; empty: the usual one.
    """
    uv = Path(sys.executable).with_name("uv")
    # The wheel is built from the source distribution, which has to be enough for it.
    do(uv, "build", "--quiet", "--python", sys.executable, "--out-dir", folder / "dist")
    wheel, packed, source = read_distributions(folder / "dist")
    tracked = tracked_files()
    faults = wheel_faults(packed, tracked) + source_faults(source, tracked)
    print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 2**20:.1f} MiB; source: {len(source)} files")
    environment = folder / "environment"
    python = environment / "bin" / "python"
    do(sys.executable, "-m", "venv", environment)
    # pip, as users have it.
    if torch_index:
        do(python, "-m", "pip", "install", "--quiet", "--index-url", torch_index, pinned("torch"))
    do(python, "-m", "pip", "install", "--quiet", "--constraint", REPOSITORY / "constraints.txt", wheel)
    do(python, "-c", f"import {PACKAGE}; assert {str(environment)!r} in {PACKAGE}.__file__", cwd=folder)
    do(environment / "bin" / "align-audit", "--help", cwd=folder)
    if demo:
        do(environment / "bin" / "align-audit", "demo", "--output", folder / "demo", cwd=folder)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-demo", action="store_true", help="do not run the demo")
    parser.add_argument("--torch-index", default="", help="address of the package index that torch is taken from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = check_wheel(Path(folder).resolve(), not options.no_demo, options.torch_index)
    print("\n".join(faults) or "the wheel and the source distribution hold what they should")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
