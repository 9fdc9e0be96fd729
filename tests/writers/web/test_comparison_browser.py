"""A comparison as a file, as a browser shows it: drawn, quiet, in both themes and widths, and foreign text as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from align_audit.cli.intervals import interval
from align_audit.record.run import AuditRun
from align_audit.writers.web.comparison_data import comparison_page_data
from align_audit.writers.web.page import COMPARISON, page
from tests.helpers.browser import Browser, open_browser, skip_without_browser
from tests.helpers.pages import HOSTILE, health_run, healthy_run, hostile_run, ruined_run, sets_run, unknown_run
from tests.helpers.stored_runs import store_path

pytestmark = pytest.mark.browser

PANELS = ("chosen", "kl", "tokens", "accuracy")
RUNS = {
    "two": (healthy_run, ruined_run), "three": (healthy_run, ruined_run, healthy_run), "sets": (sets_run, sets_run),
    "hostile": (hostile_run, hostile_run), "unknown": (unknown_run, health_run),
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    skip_without_browser()
    with open_browser() as opened:
        yield opened


def written(folder: Path, runs: Sequence[AuditRun], names: Sequence[str] = ()) -> Path:
    """The page of these runs."""
    names = names or [f"run-{number}" for number in range(len(runs))]
    path = folder / "comparison.html"
    path.write_bytes(page(comparison_page_data(runs, names, interval), COMPARISON))
    return path


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (390, "light"), (1300, "dark"), (1300, "light")])
@pytest.mark.parametrize("name", list(RUNS))
def test_it_is_whole_and_asks_no_host(browser: Browser, tmp_path: Path, name: str, width: int, theme: str) -> None:
    browser.show(written(tmp_path, [make() for make in RUNS[name]]), width, theme)
    browser.open_all()
    assert browser.js("return document.documentElement.scrollWidth") <= width
    charts = browser.charts()
    assert [f"compare-{panel}" for panel in PANELS] == charts[:4]
    for chart in charts:
        assert browser.marks(chart, "svg.main-svg .xtick, svg.main-svg .xaxislayer-above") > 0, chart
    assert browser.complaints() == []
    assert browser.requests() == []


def test_the_sentence_is_first_and_every_mark_is_drawn(browser: Browser, tmp_path: Path) -> None:
    runs = [healthy_run(), ruined_run()]
    browser.show(written(tmp_path, runs, ["well", "spoilt"]))
    assert browser.js("return document.body.innerText.trimStart()").replace("Dark\n", "").startswith(
        "B is in ERROR since step 20 (the policy is leaving its language), A is HEALTHY; at equal reward margin"
    )  # fmt: skip
    names = browser.js("return [...document.querySelectorAll('.standings h2')].map(each => each.textContent)")
    assert names == ["A · HEALTHY · well", "B · ERROR since step 20 · spoilt"]
    assert browser.js("return document.querySelectorAll('.open').length") == 0, "there is no page to open"
    steps = sum(len({record.step for record in run.records}) for run in runs)
    for panel in PANELS:
        unknown = 2 if panel == "accuracy" else 0  # of equal models there is none
        assert browser.marks(f"compare-{panel}", ".scatterlayer .points path") == steps - unknown, panel
        assert browser.marks(f"compare-{panel}", ".scatterlayer .js-line") == 2
        assert browser.marks(f"compare-{panel}", ".scatterlayer .errorbar path") > 0
    for letter in "AB":
        assert browser.marks(f"compare-where-{letter}", ".barlayer .point path") == 12
    titles = browser.js("return [...document.querySelectorAll('section')].map(each => each.getAttribute('aria-label'))")
    assert titles == ["Side by side", "Is the model all right?", "Where?"]
    assert "Latest healthy: A step 40; B step 10." in browser.text("section")
    assert browser.complaints() == []


def test_differences_have_intervals_at_the_common_step_and_at_equal_margin(browser: Browser, tmp_path: Path) -> None:
    runs = [AuditRun.load(store_path(tmp_path / name, [0.0, 1.0], [0.0, kl])) for name, kl in (("a", 0.1), ("b", 0.4))]
    browser.show(written(tmp_path, runs))
    headings = browser.js("return [...document.querySelectorAll('.meetings h3')].map(each => each.textContent)")
    assert headings[0] == "At the last common step, 10" and headings[1].startswith("At equal reward margin, +")
    cells = browser.js(
        "return [...document.querySelectorAll('.meetings table')].map(each => [...each.querySelectorAll('tr')]"
        ".find(row => row.textContent.startsWith('KL')).lastChild.textContent)"
    )
    assert len(cells) == 2 and all("[" in cell and "]" in cell for cell in cells), cells


def test_a_probe_set_is_chosen_and_the_theme_turned(browser: Browser, tmp_path: Path) -> None:
    browser.show(written(tmp_path, [sets_run(), sets_run()]))
    first = browser.text("h1")
    chosen = browser.js("return [...document.querySelectorAll('.standings p')].map(each => each.textContent)[0]")
    assert chosen == "Probe pairs: helpful", "the one that is worse off"
    browser.js("const s = document.getElementById('probe-set'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert browser.text("h1") != first
    assert "harmless" in browser.text(".standings p")
    assert browser.marks("compare-kl", ".scatterlayer .points path") == 6
    line = "return getComputedStyle(document.querySelector(\"[data-chart='compare-kl'] .js-line\")).stroke"
    light = browser.js(line)
    browser.js("document.querySelector('.theme').click()")
    assert browser.js(line) != light
    assert browser.complaints() == []


def test_foreign_text_is_text(browser: Browser, tmp_path: Path) -> None:
    browser.show(written(tmp_path, [hostile_run(), hostile_run()], [HOSTILE, HOSTILE]))
    browser.open_all()
    assert browser.js("return document.title") == "Comparison · align_audit"
    assert "</script><img src=x" in browser.text(".standings h2")
    assert browser.js("return document.querySelectorAll('#align-audit img, #align-audit script').length") == 0
    unnamed = browser.js(
        "return [...document.querySelectorAll('button, select')].filter(e => !(e.ariaLabel || e.textContent)).length"
    )
    assert unnamed == 0
