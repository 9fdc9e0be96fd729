"""A headless Chromium that shows pages: what it drew, what it complains of, what it asked for, and pictures of it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    """One page at a time, at a width and in a theme."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(self, page: Path, width: int = 1300, theme: str = "light") -> None:
        """Open a page. What the browser logged of the one before is forgotten."""
        self.resize(width, mobile=width < 500)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.go_to(page.resolve().as_uri())

    def go_to(self, address: str) -> None:
        """Open an address, and come back when its scripts have run.

        Where the driver is told an address that is open already it may come back before the new document is there.
        """
        self.js("window.left = true")
        self.driver.get(address)
        end = time.monotonic() + 30
        while self.js("return window.left || document.readyState") != "complete":
            assert time.monotonic() < end, f"{address} was not loaded in 30 s"
            time.sleep(0.01)

    def resize(self, width: int, mobile: bool = False, height: int = 900) -> None:
        """Make the window so large; a mobile one follows what a page says of its width."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def marks(self, chart: str, kind: str) -> int:
        """Marks of a kind that a chart has drawn, and that have a size."""
        count: int = self.js(
            "return [...document.querySelectorAll(`[data-chart='${arguments[0]}'] ${arguments[1]}`)]"
            ".filter(e => { const b = e.getBoundingClientRect(); return b.width > 0 || b.height > 0; }).length",
            chart, kind,
        )  # fmt: skip
        return count

    def charts(self) -> list[str]:
        """Those that are to be seen."""
        names: list[str] = self.js(
            "return [...document.querySelectorAll('.chart')].filter(e => e.offsetParent !== null).map(e => e.dataset.chart)"
        )
        return names

    def text(self, selector: str) -> str:
        words: str = self.js("return document.querySelector(arguments[0]).textContent", selector)
        return words

    def complaints(self) -> list[str]:
        """What the browser logged of this page: errors of scripts, requests refused by the policy, and the like."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for, itself left out, and pictures that it holds."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        asked = [each["request"]["url"] for each in sent if each["type"] != "Document"]
        return [address for address in asked if not address.startswith("data:")]

    def open_all(self) -> None:
        """Unfold everything, tables too; what that unfolds as well."""
        for _ in range(3):
            self.js("document.querySelectorAll('details').forEach(each => { each.open = true; })")
            self.wait(50)

    def print(self) -> bytes:
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
        return base64.b64decode(printed["data"])

    def picture(self, height: int | None = None) -> bytes:
        """The page as a PNG, from its top; None: all of it."""
        wide, tall = self.js("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": wide, "height": tall if height is None else min(tall, height), "scale": 1}
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
        )
        return base64.b64decode(taken["data"])

    def wait(self, milliseconds: int) -> None:
        """Let the page go on for so long."""
        self.driver.execute_async_script(f"setTimeout(arguments[0], {milliseconds})")


def skip_without_browser() -> None:
    """Skip the test, saying what to install, where pages cannot be opened."""
    pytest.importorskip("selenium", reason="selenium is missing: pip install selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or its driver is missing: apt-get install chromium chromium-driver")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser while the block runs.

    Raises:
        ImportError: selenium is missing.
        FileNotFoundError: Chromium or its driver is missing.
    """
    from selenium import webdriver

    if CHROMIUM is None or DRIVER is None:
        raise FileNotFoundError("Chromium or its driver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
