"""The page as a browser shows it: every chart is drawn, nothing is asked of any host, and the controls do what they say.

One headless Chromium serves the whole file. Marks are counted, not the elements that should hold them: a chart library that
lacks a kind of chart draws nothing, and says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align_audit.record.run import AuditRun
from align_audit.writers.web.report_writer import write_report
from tests.helpers.alert_cases import with_margins
from tests.helpers.browser import Browser, open_browser, skip_without_browser
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
from tests.helpers.screens import a_run

pytestmark = pytest.mark.browser

RUNS = {
    "healthy": healthy_run, "ruined": ruined_run, "hostile": hostile_run, "unknown": unknown_run, "health": health_run,
    "failed": failed_run, "sets": sets_run, "large": large_run, "none": lambda: as_run([]),
}  # fmt: skip


class Pages:
    """Pages of runs in a browser; each is written once."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self._browser, self._folder = browser, folder

    def show(self, run: str | AuditRun, width: int = 1300, theme: str = "light") -> None:
        """Open the page of a run of :data:`RUNS`, or of a given one."""
        path = self._folder / f"{run if isinstance(run, str) else 'given'}.html"
        if not isinstance(run, str):
            write_report(run, path)
        elif not path.exists():
            write_report(RUNS[run](), path)
        self._browser.show(path, width, theme)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._browser, name)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """Headless Chromium, one for all tests of this file."""
    skip_without_browser()
    with open_browser() as opened:
        yield Pages(opened, tmp_path_factory.mktemp("pages"))


# --- drawn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1300, "light")])
@pytest.mark.parametrize("run", list(RUNS))
def test_any_page_is_whole_and_asks_no_host(browser: Pages, run: str, width: int, theme: str) -> None:
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


def test_every_mark_of_the_charts_is_drawn(browser: Pages) -> None:
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


def test_the_heat_map_has_colours_of_both_directions(browser: Pages) -> None:
    """Counted in its picture: a map of one colour would be drawn, and say nothing."""
    browser.show("ruined")
    colours = browser.driver.execute_async_script(
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


def test_finer_sites_and_folded_charts_are_drawn_when_they_are_opened(browser: Pages) -> None:
    browser.show("healthy")
    assert "site-head" not in browser.charts()
    browser.open_all()
    assert browser.marks("site-head", ".heatmaplayer image") == 1
    assert browser.marks("site-attention_output", ".barlayer .point path") == 12
    assert browser.marks("low-rank-shift", ".scatterlayer .points path") >= 5
    assert browser.marks("spinal-contraction", ".scatterlayer .points path") == 24
    assert browser.marks("spinal-transport", ".scatterlayer .points path") == 22
    assert browser.complaints() == []


def test_tokens_are_shaded_by_their_change_and_say_it(browser: Pages, tmp_path: Path) -> None:
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


def test_what_became_impossible_is_the_worst_shade_and_no_gap_in_a_sum(browser: Pages, tmp_path: Path) -> None:
    browser.show(texts_run(tmp_path, lost=-math.inf))
    assert browser.text(".pair-text:nth-of-type(1) h3") == "Pair 7: margin shift −∞ nats"
    assert browser.text(".pair-text h4").startswith("chosen: −∞ nats")
    token = "document.querySelectorAll('.pair-text .token')[1]"
    assert browser.js(f"return [{token}.className, {token}.title, {token}.style.getPropertyValue('--share')]") == [
        "token low", "−∞ nats", "1.00",
    ]  # fmt: skip


def test_an_alert_that_was_an_error_before_says_so_apart(browser: Pages) -> None:
    records = a_run("ruined")
    error = records[3].alerts[0]
    warning = error.model_copy(update={"level": "warning", "since": 40, "step": 40})
    over = error.model_copy(update={"event": "resolved", "step": 30})
    again = [records[4].model_copy(update={"alerts": [warning]})]
    browser.show(as_run([*records[:4], records[4].model_copy(update={"step": 30, "alerts": [over]}), *again]))
    assert browser.text(".alert .level") == "WARNING"
    assert browser.text(".alert .rule").endswith("since step 40, open; before: error from step 20 to 30")
    assert browser.complaints() == []


def test_what_broke_is_told_at_once_where_nothing_else_is_known(browser: Pages) -> None:
    browser.show("failed")
    browser.wait(100)
    assert "RuntimeError: no memory" in browser.text("main > details table")
    assert browser.complaints() == []


def test_limits_that_move_are_said_to(browser: Pages) -> None:
    browser.show("ruined")
    moving = browser.js(
        "return [...document.querySelectorAll('.panel')].map(e => e.textContent.includes('The limits move'))"
    )
    assert moving[:4] == [False, False, False, True]
    assert "The limits move with the run's best, 90 %." in browser.text(".panel:nth-of-type(4)")


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_slider_shows_another_audit(browser: Pages) -> None:
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
    assert "No shares at this step" in browser.text("section:nth-of-type(3)")
    browser.js("const s = document.getElementById('measure'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert "No shares at this step" not in browser.text("section:nth-of-type(3)")
    assert browser.complaints() == []


def test_the_slider_moves_by_the_keyboard(browser: Pages) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.show("ruined")
    slider = browser.driver.find_element("id", "audit-slider")
    last = browser.text("output")
    slider.send_keys(Keys.ARROW_LEFT)
    assert browser.text("output") != last
    chip = browser.driver.find_element("css selector", ".chip")
    browser.js("arguments[0].focus()", chip)
    assert browser.text(".reason").startswith("noise, ")


def test_pointing_at_a_layer_says_its_value_with_the_interval(browser: Pages) -> None:
    from selenium.webdriver import ActionChains

    browser.show("ruined")
    layers = browser.driver.find_element("css selector", "[data-chart='layers'] .nsewdrag")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", layers)
    ActionChains(browser.driver).move_to_element(layers).perform()
    browser.wait(200)
    words = browser.text("[data-chart='layers'] .hoverlayer")
    assert re.search(r"layer \d+, step \d+: \d+ % \(\d+ % to \d+ %\)", words), words


def test_the_theme_can_be_turned_and_charts_follow(browser: Pages) -> None:
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


def test_a_probe_set_is_chosen_and_the_worst_is_shown_first(browser: Pages) -> None:
    browser.show("sets")
    assert browser.text("h1").startswith("ERROR")
    browser.js("const s = document.getElementById('probe-set'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert browser.text("h1").startswith("HEALTHY")
    assert browser.marks("kl", ".scatterlayer .points path") == 3
    assert browser.js("return document.title").startswith("HEALTHY")
    assert browser.complaints() == []


def test_the_command_is_copied(browser: Pages) -> None:
    browser.show("ruined")
    browser.js("window.kept = ''; document.addEventListener('copy', () => { window.kept = String(getSelection()); })")
    browser.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.driver.find_element("css selector", ".banner .copy").click()
    browser.wait(50)
    assert browser.js("return window.kept") == "trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-10')"
    assert browser.text(".banner .said") == "copied"


# --- who cannot see it, prints it, or wrote it ------------------------------------------------------------------------


def test_every_chart_says_its_finding_and_has_its_numbers_as_a_table(browser: Pages) -> None:
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


def test_foreign_text_is_text(browser: Pages) -> None:
    browser.show("hostile")
    browser.open_all()
    assert browser.js("return document.title").startswith("ERROR")
    shown = HOSTILE.encode("unicode_escape").decode().split("\\u2028")[0]
    for place in (".alert p", ".banner .command code", ".finding"):
        assert shown.lower() in browser.text(place).lower(), place
    assert browser.js("return document.querySelectorAll('#align-audit img, #align-audit script').length") == 0


def test_it_prints_on_one_page(browser: Pages) -> None:
    for run in ("ruined", "healthy"):
        for theme in ("light", "dark"):
            browser.show(run, theme=theme)
            assert len(re.findall(rb"/Type\s*/Page\b", browser.print())) == 1, (run, theme)


def test_a_dark_page_is_printed_with_charts_for_white_paper(browser: Pages) -> None:
    """What is drawn for a dark page is next to white, and is drawn anew for paper, and back."""
    tick = "return getComputedStyle(document.querySelector('.panels .xtick text')).fill"
    browser.show("ruined", theme="light")
    light = browser.js(tick)
    browser.show("ruined", theme="dark")
    dark = browser.js(tick)
    browser.js("dispatchEvent(new Event('beforeprint'))")
    browser.wait(300)
    assert browser.js(tick) == light != dark
    browser.js("dispatchEvent(new Event('afterprint'))")
    browser.wait(300)
    assert browser.js(tick) == dark


def test_a_page_of_numbers_that_end_in_the_middle_draws_what_is_known(browser: Pages) -> None:
    records = list(ruined_run().records)
    unknown = records[2].margins.kl.unknown("nobody knows")
    records[2] = with_margins(records[2], kl=unknown)
    browser.show(as_run(records))
    assert browser.marks("kl", ".scatterlayer .points path") == len(records) - 1
    assert browser.marks("kl", ".scatterlayer .js-fill") == 2, "the band has a gap"
