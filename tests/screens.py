"""The pictures of the report in the documents, taken of a demo's two runs in headless Chromium.

    align-audit demo --output align-audit-demo
    python -m tests.screens align-audit-demo

writes ``docs/images/report-*.png`` and ``tensorboard-tab.png``, the two runs compared in TensorBoard. It needs ``chromium``,
``chromium-driver`` and selenium.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from align_audit.writers.web.report_writer import report_of
from tests.helpers.browser import Browser, open_browser
from tests.helpers.tensorboard import open_tab, tensorboard

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LARGEST = 200_000
"""Bytes of a picture."""
COLOURS = 128


@dataclass(frozen=True)
class Screen:
    """One picture: of which run, how wide, in which theme, and how much of the page."""

    name: str
    run: str
    width: int = 1300
    theme: str = "light"
    height: int | None = None


SCREENS = (
    Screen("report-healthy", "healthy", height=920),
    Screen("report-ruined", "ruined", height=1150),
    Screen("report-ruined-dark", "ruined", theme="dark", height=1150),
    Screen("report-phone", "ruined", width=390, height=1500),
)


def take(demo: Path, output: Path = IMAGES) -> list[Path]:
    """Take the pictures of a demo's runs.

    Raises:
        ValueError: one is larger than :data:`LARGEST`.
    """
    paths = []
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        for screen in SCREENS:
            _, page, _ = report_of(demo / screen.run, Path(folder) / f"{screen.run}.html")
            browser.show(page, screen.width, screen.theme)
            browser.wait(500)
            paths.append(_write(output / f"{screen.name}.png", browser.picture(screen.height)))
        paths.append(_write(output / "tensorboard-tab.png", tab_picture(browser, demo, Path(folder))))
    return paths


def tab_picture(browser: Browser, demo: Path, folder: Path) -> bytes:
    """TensorBoard's tab with both runs ticked, as a PNG."""
    with tensorboard(demo, folder) as server:
        browser.resize(1300, height=1000)
        open_tab(browser, server)
        _until(browser, "document.querySelectorAll('.run').length === 2")
        browser.js("document.querySelectorAll('.run input').forEach(each => each.click())")
        _until(browser, "document.querySelectorAll('[data-chart^=compare] .scatterlayer .js-line').length === 8")
        browser.wait(500)
        content: bytes = browser.driver.get_screenshot_as_png()
        browser.driver.switch_to.default_content()
    return content


def _until(browser: Browser, true: str) -> None:
    for _ in range(600):
        if browser.js(f"return {true}"):
            return
        browser.wait(50)
    raise RuntimeError(f"the tab never showed what it should: {true}")


def _write(path: Path, picture: bytes) -> Path:
    content = reduced(picture)
    if len(content) > LARGEST:
        raise ValueError(f"{path.name} takes {len(content)} bytes; expected at most {LARGEST}")
    path.write_bytes(content)
    return path


def reduced(picture: bytes) -> bytes:
    """The same PNG in :data:`COLOURS` colours."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    small.save(written, "PNG", optimize=True)
    return written.getvalue()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder of `align-audit demo`")
    for path in take(parser.parse_args().demo):
        print(f"{path} ({path.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
