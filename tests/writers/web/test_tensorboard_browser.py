"""The tab in a real ``tensorboard``, as a browser shows it: drawn, quiet, and renewed while training goes on.

One server and one browser, which opens the tab once, serve the whole file: a test chooses the run that it looks at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from tests.helpers.browser import Browser, open_browser, skip_without_browser
from tests.helpers.pages import HOSTILE, healthy_run, hostile_run
from tests.helpers.screens import LOG, a_run, calm
from tests.helpers.tensorboard import Server, open_tab, tensorboard

pytestmark = pytest.mark.browser

NAME = HOSTILE.replace("/", "∕")
HEALTHY, RUINED = healthy_run().records, a_run("ruined", ["checkpoint-10"])


def append(folder: Path, *records: AuditRecord) -> None:
    log = RunLog(folder)
    for record in records:
        log.append(record)
    log.close()


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as training leaves them: events in ``runs/<date>``, audits in ``align_audit``."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = tmp_path_factory.mktemp("logs")
    for name, records in (("well", HEALTHY), ("spoilt", RUINED), (NAME, hostile_run().records)):
        append(folder / name, *records)
        EventFileWriter(str(folder / name / "runs" / "Jan01_00-00-00_host")).close()
    training = TrainingLog(folder / "spoilt")
    for row in LOG:
        training.append(row.step, row.logs)
    return folder


@pytest.fixture(scope="module")
def server(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    skip_without_browser()
    with tensorboard(logdir, tmp_path_factory.mktemp("tensorboard")) as running:
        yield running


@pytest.fixture(scope="module")
def tab(server: Server) -> Iterator[Browser]:
    """The tab, opened by its address, once."""
    with open_browser() as browser:
        browser.resize(1300)
        open_tab(browser, server)
        until(lambda: browser.js("return document.querySelector('#align-audit h1') !== null"))
        yield browser


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def click(tab: Browser, selector: str, text: str) -> None:
    """Click the control of the run whose name begins so."""
    tab.js(
        "[...document.querySelectorAll('.run')].find(e => e.querySelector('.name').textContent.startsWith(arguments[1]))"
        ".querySelector(arguments[0]).click()",
        selector,
        text,
    )


def headline(tab: Browser) -> str:
    return tab.text("#align-audit h1, #align-audit h2")


def show(tab: Browser, name: str) -> None:
    click(tab, "button", name)
    until(lambda: name in headline(tab) and "kl" in tab.charts())


def test_the_tab_is_drawn_and_asks_no_other_host(tab: Browser, server: Server) -> None:
    names = tab.js("return [...document.querySelectorAll('.run')].map(e => e.querySelector('.word').textContent)")
    assert names == ["ERROR", "ERROR", "HEALTHY"]
    show(tab, "spoilt")
    assert headline(tab).startswith("ERROR since step 20 · spoilt")
    for panel in ("chosen", "kl", "tokens"):
        assert tab.marks(panel, ".scatterlayer .points path") == len(RUINED)
        assert tab.marks(panel, ".shapelayer path") == 3
    assert tab.marks("training-rewards-margins", ".scatterlayer .js-line") == 1
    assert tab.marks("layers", ".heatmaplayer image") == 1
    assert tab.marks("audit", ".barlayer .point path") == 12
    tab.open_all()
    for chart in tab.charts():
        assert tab.marks(chart, "svg.main-svg .xtick, svg.main-svg .xaxislayer-above") > 0, chart
    asked = tab.requests()
    assert any("/data/plugin/align_audit/data" in address for address in asked)
    assert {urlsplit(address).netloc for address in asked} == {urlsplit(server.url).netloc}
    assert complaints(tab) == []


def complaints(tab: Browser) -> list[str]:
    """Of this plugin, and of the policy of its frame; TensorBoard's own scripts have some."""
    return [each for each in tab.complaints() if "align_audit" in each.split("#")[0] or "Refused" in each]


@pytest.mark.parametrize("width", [390, 1300])
def test_it_fits_the_window(tab: Browser, width: int) -> None:
    tab.resize(width)
    show(tab, "spoilt")
    tab.open_all()
    assert tab.js("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    click(tab, "input", "spoilt")
    click(tab, "input", NAME[:8])
    until(lambda: "compare-kl" in tab.charts())
    assert tab.js("return document.documentElement.scrollWidth") == width
    tab.resize(1300)


def test_a_run_is_chosen_and_two_are_compared(tab: Browser) -> None:
    show(tab, "well")
    assert headline(tab).startswith("HEALTHY")
    assert tab.marks("site-head", ".heatmaplayer image") == 0, "folded"
    click(tab, "input", "spoilt")
    click(tab, "input", "well")
    until(lambda: "compare-kl" in tab.charts())
    said = tab.js("return [...document.querySelectorAll('.standings h2')].map(each => each.textContent)")
    assert said == ["A · ERROR since step 20 · spoilt", "B · HEALTHY · well"]
    points = tab.marks("compare-kl", ".scatterlayer .points path")
    assert points == len(RUINED) + len(tab.js("return [...new Set(arguments[0])]", [each.step for each in HEALTHY]))
    assert tab.marks("compare-where-A", ".barlayer .point path") == 12
    assert tab.marks("compare-where-B", ".barlayer .point path") == 12
    assert tab.text(".finding").startswith("A is in ERROR since step 20")
    cells = tab.js("return [...document.querySelectorAll('.meetings tr')].map(each => each.children.length)")
    assert len(cells) > 20 and set(cells) == {4}
    tab.js("document.querySelectorAll('.open')[1].click()")
    until(lambda: "kl" in tab.charts())
    assert headline(tab).startswith("HEALTHY")
    assert tab.js("return document.querySelectorAll('.run input:checked').length") == 0
    assert complaints(tab) == []


def test_a_new_audit_appears_and_all_stays_as_it_was_left(tab: Browser, logdir: Path) -> None:
    show(tab, "well")
    steps = len(tab.js("return [...document.querySelectorAll(\"[data-chart='kl'] .points path\")]"))
    tab.js(
        "const s = document.getElementById('audit-slider'); s.value = 1; s.dispatchEvent(new Event('input'));"
        "const m = document.getElementById('measure'); m.value = 1; m.dispatchEvent(new Event('change'));"
        "for (const fold of ['low-rank', 'sites', 'table-kl'])"
        "  document.querySelector(`[data-fold='${fold}']`).open = true;"
        "document.querySelector('.theme').click()"
    )
    tab.wait(100)
    tab.js("window.scrollTo(0, 300); document.getElementById('audit-slider').focus({preventScroll: true})")
    left = state(tab)
    assert left["step"] == "step 5" and left["scroll"] == 300 and "low-rank" in left["folds"]
    append(logdir / "well", calm(50))
    until(lambda: tab.marks("kl", ".points path") == steps + 1, seconds=25)
    assert state(tab) == left
    assert tab.marks("low-rank-shift", ".scatterlayer .points path") >= 5, "drawn again, not only unfolded"
    assert "at step 50" in tab.js("return document.querySelector('.run [aria-current=true]').textContent")
    tab.js("document.querySelector('.theme').click()")
    assert complaints(tab) == []


def state(tab: Browser) -> dict[str, Any]:
    """What somebody looks at."""
    seen: dict[str, Any] = tab.js(
        "return {step: document.querySelector('output').textContent, measure: document.getElementById('measure').value,"
        "folds: [...document.querySelectorAll('details[open]')].map(e => e.dataset.fold).filter(Boolean).sort(),"
        "theme: document.documentElement.dataset.theme, scroll: scrollY, focus: document.activeElement.id}"
    )
    return seen


def test_it_is_dark_where_tensorboard_is(tab: Browser) -> None:
    show(tab, "spoilt")
    paper = "return getComputedStyle(document.body).backgroundColor"
    line = "return getComputedStyle([...document.querySelectorAll(\"[data-chart='kl'] .js-line\")].at(-1)).stroke"
    light = tab.js(paper), tab.js(line)
    tab.js("parent.document.body.classList.add('dark-mode')")
    until(lambda: tab.js(paper) != light[0] and tab.js(line) != light[1])
    tab.js("parent.document.body.classList.remove('dark-mode')")
    until(lambda: (tab.js(paper), tab.js(line)) == light)


def test_foreign_text_is_text(tab: Browser) -> None:
    click(tab, "button", NAME[:8])
    until(lambda: "<∕script><img src=x" in headline(tab))
    tab.open_all()
    assert tab.js("return document.querySelectorAll('#align-audit img, #align-audit script, .runs img').length") == 0
    assert not tab.js("return document.title").startswith("taken")


def test_the_reader_of_screens_is_told_what_each_control_is(tab: Browser) -> None:
    show(tab, "well")
    named = tab.js(
        "return [...document.querySelectorAll('.runs button, .runs input')].map(e => e.ariaLabel || e.textContent.trim())"
    )
    assert len(named) == 6 and all(named)
    assert tab.js("return document.querySelectorAll('.run [aria-current=true]').length") == 1
    assert tab.js("return document.documentElement.lang") == "en"
