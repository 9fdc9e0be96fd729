"""The page as a browser shows it: every chart is drawn, nothing is asked of any host, and the controls do what they say.

One headless Chromium serves the whole file. Marks are counted, not the elements that should hold them: a chart library that
lacks a kind of chart draws nothing, and says nothing.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_audit.record.run import AuditRun
from align_audit.writers.web.report_writer import write_report
from tests.helpers.alert_cases import with_margins
from tests.helpers.pages import (
    HOSTILE,
    as_run,
    failed_run,
    health_run,
    healthy_run,
    hostile_run,
    large_run,
    ruined_run,
    sets_run,
    texts_run,
    unknown_run,
)

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
RUNS = {
    "healthy": healthy_run, "ruined": ruined_run, "hostile": hostile_run, "unknown": unknown_run, "health": health_run,
    "failed": failed_run, "sets": sets_run, "large": large_run, "none": lambda: as_run([]),
}  # fmt: skip


class Browser:
    """One page at a time, at a width and in a theme."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self._folder = driver, folder

    def show(self, run: str | AuditRun, width: int = 1300, theme: str = "light") -> Browser:
        """Open the page of a run. What the browser logged of the page before is forgotten."""
        path = self._folder / f"{run if isinstance(run, str) else 'given'}.html"
        if not isinstance(run, str):
            write_report(run, path)
        elif not path.exists():
            write_report(RUNS[run](), path)
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(path.as_uri())
        return self

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
            self.driver.execute_async_script("setTimeout(arguments[0], 50)")

    def print(self) -> bytes:
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
        return base64.b64decode(printed["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium, without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or its driver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver, tmp_path_factory.mktemp("pages"))
    finally:
        driver.quit()


# --- drawn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1300, "light")])
@pytest.mark.parametrize("run", list(RUNS))
def test_any_page_is_whole_and_asks_no_host(browser: Browser, run: str, width: int, theme: str) -> None:
    """Nothing stands out of the window, no script complains, no chart is empty, and nothing is asked for."""
    browser.show(run, width, theme)
    browser.open_all()
    assert browser.js("return document.documentElement.scrollWidth") <= width
    for chart in browser.charts():
        drawn = browser.marks(chart, "svg.main-svg .xtick, svg.main-svg .xaxislayer-above")
        assert drawn > 0, f"{chart} has no axis"
    assert browser.complaints() == []
    assert browser.requests() == []
    assert (
        browser.js(
            "return document.querySelectorAll('#align-audit img, #align-audit script, #align-audit iframe').length"
        )
        == 0
    )


def test_every_mark_of_the_charts_is_drawn(browser: Browser) -> None:
    run = ruined_run()
    browser.show("ruined")
    for panel in ("chosen", "kl", "tokens"):
        assert browser.marks(panel, ".scatterlayer .points path") == len(run.records)
        assert browser.marks(panel, ".scatterlayer .js-fill") == 1, "the band"
        # Two limits, and the first error.
        assert browser.marks(panel, ".shapelayer path") == 3
    assert browser.marks("accuracy", ".scatterlayer .points path") == len(run.records) - 1, (
        "none where models are equal"
    )
    assert browser.marks("training-rewards-margins", ".scatterlayer .js-line") == 1
    assert browser.marks("layers", ".heatmaplayer image") == 1
    assert browser.marks("audit", ".barlayer .point path") == 12
    assert browser.marks("audit", ".barlayer .errorbar path") > 0
    assert browser.complaints() == []


def test_the_heat_map_has_colours_of_both_directions(browser: Browser) -> None:
    """Counted in its picture: a map of one colour would be drawn, and say nothing."""
    colours = browser.show("ruined").driver.execute_async_script(
        """const [image, done] = [document.querySelector("[data-chart='layers'] .heatmaplayer image"), arguments[0]];
        const picture = new Image();
        picture.onload = () => {
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [picture.width, picture.height];
          const context = canvas.getContext("2d");
          context.drawImage(picture, 0, 0);
          const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
          const seen = new Set();
          for (let at = 0; at < pixels.length; at += 4) if (pixels[at + 3]) seen.add(pixels.slice(at, at + 3).join());
          done([...seen]);
        };
        picture.src = image.getAttribute("href") || image.getAttribute("xlink:href");"""
    )
    assert len(colours) > 12
    assert any(int(blue) > int(red) + 60 for red, _, blue in (colour.split(",") for colour in colours))


def test_finer_sites_and_folded_charts_are_drawn_when_they_are_opened(browser: Browser) -> None:
    browser.show("healthy")
    assert "site-head" not in browser.charts()
    browser.open_all()
    assert browser.marks("site-head", ".heatmaplayer image") == 1
    assert browser.marks("site-attention_output", ".barlayer .point path") == 12
    assert browser.marks("low-rank-shift", ".scatterlayer .points path") >= 5
    assert browser.marks("spinal-contraction", ".scatterlayer .points path") == 24
    assert browser.marks("spinal-transport", ".scatterlayer .points path") == 22
    assert browser.complaints() == []


def test_tokens_are_shaded_by_their_change_and_say_it(browser: Browser, tmp_path: Path) -> None:
    browser.show(texts_run(tmp_path, HOSTILE))
    tokens = browser.js(
        "return [...document.querySelectorAll('.pair-text .tokens')][0].querySelectorAll('.token').values().map(each => "
        "[each.textContent, each.title, getComputedStyle(each).backgroundColor]).toArray()"
    )
    assert [title for _, title, _ in tokens] == ["+0.4 nats", "−3 nats", "not known", "−0.1 nats"]
    assert "<img src=x" in tokens[1][0]
    shades = [shade for _, _, shade in tokens]
    assert len(set(shades)) == 4, "up, down, not known, and a little down"
    assert not browser.js("return document.querySelector('.pair-text details').open"), "the prompt is folded"
    browser.open_all()
    assert "How are you?" in browser.text(".pair-text pre")
    assert "It+0.4" in browser.text(".pair-text .as-table tbody")
    assert browser.text(".pair-text:nth-of-type(1) h3") == "Pair 7: margin shift −6 nats"
    assert browser.js("return document.querySelectorAll('#align-audit img, #align-audit script').length") == 0
    assert browser.complaints() == []


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_slider_shows_another_audit(browser: Browser) -> None:
    browser.show("ruined")
    said = browser.text(".finding")
    bars = "[data-chart='audit'] .barlayer .point path"
    heights = f'return [...document.querySelectorAll("{bars}")].map(each => each.getBBox().height)'
    last = browser.js(heights)
    move = (
        "const s = document.getElementById('audit-slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    )
    browser.js(move, 0)
    assert (browser.text("output"), browser.js("return document.getElementById('audit-slider').ariaValueText")) == (
        "step 0",
        "step 0",
    )
    assert browser.text(".finding") != said
    assert browser.js(heights) != last
    assert "noise: not run" in browser.text(".chips")
    browser.js("const s = document.getElementById('measure'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert "No shares at this step" in browser.text("section:nth-of-type(3)")
    assert browser.complaints() == []


def test_the_slider_moves_by_the_keyboard(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.show("ruined")
    slider = browser.driver.find_element("id", "audit-slider")
    last = browser.text("output")
    slider.send_keys(Keys.ARROW_LEFT)
    assert browser.text("output") != last
    chip = browser.driver.find_element("css selector", ".chip")
    browser.js("arguments[0].focus()", chip)
    assert browser.text(".reason").startswith("noise, ")


def test_pointing_at_a_layer_says_its_value_with_the_interval(browser: Browser) -> None:
    from selenium.webdriver import ActionChains

    browser.show("ruined")
    layers = browser.driver.find_element("css selector", "[data-chart='layers'] .nsewdrag")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", layers)
    ActionChains(browser.driver).move_to_element(layers).perform()
    browser.driver.execute_async_script("setTimeout(arguments[0], 200)")
    words = browser.text("[data-chart='layers'] .hoverlayer")
    assert re.search(r"layer \d+, step \d+: \S+ \(\S+ to \S+\) nats", words), words


def test_the_theme_can_be_turned_and_charts_follow(browser: Browser) -> None:
    browser.show("ruined", theme="light")
    paper = "return getComputedStyle(document.body).backgroundColor"
    line = "return getComputedStyle([...document.querySelectorAll(\"[data-chart='kl'] .js-line\")].at(-1)).stroke"
    light = browser.js(paper), browser.js(line)
    browser.js("document.querySelector('.theme').click()")
    dark = browser.js(paper), browser.js(line)
    assert light[0] == "rgb(255, 255, 255)" and dark[0] != light[0] and dark[1] != light[1]
    browser.show("ruined", theme="dark")
    assert browser.js(paper) == dark[0]
    browser.js("document.querySelector('.theme').click()")
    assert browser.js(paper) == light[0]


def test_a_probe_set_is_chosen_and_the_worst_is_shown_first(browser: Browser) -> None:
    browser.show("sets")
    assert browser.text("h1").startswith("ERROR")
    browser.js("const s = document.getElementById('probe-set'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert browser.text("h1").startswith("HEALTHY")
    assert browser.marks("kl", ".scatterlayer .points path") == 3
    assert browser.js("return document.title").startswith("HEALTHY")
    assert browser.complaints() == []


def test_the_command_is_copied(browser: Browser) -> None:
    browser.show("ruined")
    browser.js("window.kept = ''; document.addEventListener('copy', () => { window.kept = String(getSelection()); })")
    browser.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.driver.find_element("css selector", ".banner .copy").click()
    browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert browser.js("return window.kept") == "trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-10')"
    assert browser.text(".banner .said") == "copied"


# --- who cannot see it, prints it, or wrote it ------------------------------------------------------------------------


def test_every_chart_says_its_finding_and_has_its_numbers_as_a_table(browser: Browser) -> None:
    browser.show("ruined")
    said = browser.js("return [...document.querySelectorAll('.chart')].map(e => [e.getAttribute('role'), e.ariaLabel])")
    assert said and all(role == "img" and len(label) > 10 for role, label in said)
    assert "KL to the reference: 9.40 nats/token at step 40, warning limit 0.35, error limit 0.70" in [
        label for _, label in said
    ]
    browser.open_all()
    rows = browser.js("return [...document.querySelectorAll('.panel table')][1].textContent")
    assert "KL to the reference" in rows and "409.49.399.41" in rows
    unnamed = browser.js(
        "return [...document.querySelectorAll('button, select, input')].filter(e => !(e.ariaLabel || e.textContent || "
        "(e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
    assert browser.js("return document.documentElement.lang") == "en"


def test_foreign_text_is_text(browser: Browser) -> None:
    browser.show("hostile")
    browser.open_all()
    assert browser.js("return document.title").startswith("ERROR")
    shown = HOSTILE.encode("unicode_escape").decode().split("\\u2028")[0]
    for place in (".alert p", ".banner .command code", ".finding"):
        assert shown.lower() in browser.text(place).lower(), place
    assert browser.js("return document.querySelectorAll('#align-audit img, #align-audit script').length") == 0


def test_it_prints_on_one_page(browser: Browser) -> None:
    for run in ("ruined", "healthy"):
        for theme in ("light", "dark"):
            printed = browser.show(run, theme=theme).print()
            assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1, (run, theme)


def test_a_page_of_numbers_that_end_in_the_middle_draws_what_is_known(browser: Browser) -> None:
    records = list(ruined_run().records)
    unknown = records[2].margins.kl.unknown("nobody knows")
    records[2] = with_margins(records[2], kl=unknown)
    browser.show(as_run(records))
    assert browser.marks("kl", ".scatterlayer .points path") == len(records) - 1
    assert browser.marks("kl", ".scatterlayer .js-fill") == 2, "the band has a gap"
