"""A real ``tensorboard`` process that has this checkout's plugin, whatever is installed in the environment."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.browser import Browser

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Server:
    """A ``tensorboard`` that answers.

    Attributes:
        url: of its page, with a slash at its end.
        log: what it has written so far.
    """

    url: str
    log: Path

    def get(self, route: str) -> bytes:
        """What a route of TensorBoard answers."""
        with urllib.request.urlopen(f"{self.url}{route}", timeout=60) as answer:
            content: bytes = answer.read()
        return content


def entry_points() -> dict[str, str]:
    """What pyproject declares for TensorBoard: name → module and class."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared: dict[str, str] = tomllib.load(file)["project"]["entry-points"]["tensorboard_plugins"]
    return declared


def installed(folder: Path) -> Path:
    """Write the metadata that installing this checkout would write, and return the folder, to stand on Python's path."""
    place = folder / "align_audit-0.1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: align-audit\nVersion: 0.1.0\n")
    lines = [f"{name} = {target}" for name, target in entry_points().items()]
    (place / "entry_points.txt").write_text("\n".join(["[tensorboard_plugins]", *lines, ""]))
    return folder


@contextlib.contextmanager
def tensorboard(
    logdir: Path, folder: Path, *, modules: Mapping[str, str] | None = None, options: tuple[str, ...] = ()
) -> Iterator[Server]:
    """Run ``tensorboard --logdir`` on a free port while the block runs.

    Args:
        folder: an empty one, for what it needs.
        modules: name → code of modules that stand before all others on its path.

    Raises:
        RuntimeError: it ended, or does not answer within two minutes.
    """
    site = installed(folder / "site")
    for name, code in (modules or {}).items():
        (site / f"{name}.py").write_text(code)
    log = folder / "tensorboard.log"
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--host", "127.0.0.1"]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [*command, *options], stdout=written, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
        )
    try:
        yield Server(_address(process, log), log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def open_tab(browser: Browser, server: Server, dark: bool = False) -> None:
    """Open the tab by its address, and look into its frame from now on."""
    browser.driver.switch_to.default_content()
    browser.driver.get("about:blank")
    for kind in ("browser", "performance"):
        browser.driver.get_log(kind)
    browser.driver.get(f"{server.url}?darkMode={str(dark).lower()}#align_audit")
    end = time.monotonic() + 60
    while not (frames := browser.driver.find_elements("css selector", "iframe")):
        if time.monotonic() > end:
            raise RuntimeError("tensorboard shows no frame of the tab")
        time.sleep(0.02)
    browser.driver.switch_to.frame(frames[0])


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        said = log.read_text(errors="replace")
        at = re.search(r"http://\S+:\d+/\S*", said)
        if at:
            return at.group(0)
        if process.poll() is not None:
            raise RuntimeError(f"tensorboard ended with {process.returncode}: {said}")
        time.sleep(0.1)
    raise RuntimeError(f"tensorboard did not answer in two minutes: {log.read_text(errors='replace')}")
