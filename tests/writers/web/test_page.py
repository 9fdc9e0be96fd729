"""The page as a file: no text of a run gets out of its data, no host is asked, and the chart library is the one named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align_audit.cli.intervals import interval
from align_audit.writers.web import static as folder
from align_audit.writers.web.comparison_data import comparison_page_data
from align_audit.writers.web.page import COMPARISON, REPORT, FrontEnd, in_html, page, static
from align_audit.writers.web.page_data import page_data
from tests.helpers.pages import HOSTILE, hostile_run, large_run, ruined_run

STATIC = Path(folder.__file__).parent


class Elements(HTMLParser):
    """Tags with their attributes, in order, and what stands in script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def compared() -> dict[str, Any]:
    """The data of a comparison in which foreign text stands wherever it may."""
    runs = [hostile_run(), hostile_run()]
    return comparison_page_data(runs, [HOSTILE, "b"], interval)


@pytest.mark.parametrize(
    ("make", "front_end"),
    [
        (lambda: page_data(hostile_run()), REPORT),
        (lambda: page_data(ruined_run()), REPORT),
        (compared, COMPARISON),
    ],
)
def test_text_of_a_run_stays_in_its_data(make: Callable[[], Any], front_end: FrontEnd) -> None:
    data = make()
    elements = Elements(page(data, front_end).decode())
    empty = Elements(page({"format": 1}, front_end).decode())
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in empty.tags]
    assert elements.comments == empty.comments == []
    assert json.loads(elements.scripts[0]) == data


def test_data_in_a_page_is_ascii_without_the_letters_that_end_it() -> None:
    words = in_html({"name": HOSTILE + "\ud800"})
    assert words.isascii()
    assert not set("<>&") & set(words)
    assert json.loads(words) == {"name": HOSTILE + "\ud800"}
    with pytest.raises(ValueError):
        in_html({"value": float("nan")})


@pytest.mark.parametrize("front_end", [REPORT, COMPARISON])
def test_the_policy_allows_these_scripts_and_no_host(front_end: FrontEnd) -> None:
    elements = Elements(page(page_data(ruined_run()), front_end).decode())
    (policy,) = [each["content"] for tag, each in elements.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == len(front_end.scripts) == len(elements.scripts) - 1
    assert "http" not in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    assert not [each for _, each in elements.tags if "src" in each or each.get("href", "data:,") != "data:,"]


@pytest.mark.parametrize("front_end", [REPORT, COMPARISON])
def test_scripts_may_stand_in_a_page_and_write_no_markup(front_end: FrontEnd) -> None:
    for name in front_end.scripts:
        assert "</script" not in static(name).lower() and "<!--" not in static(name), name
    styles = "".join(map(static, front_end.styles))
    assert "</style" not in styles.lower()
    ours = "".join(static(name) for name in front_end.scripts if not name.startswith("plotly"))
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttpRequest|https?:", ours
    )
    assert not re.findall(r"url\(|@import|https?:", styles)


def test_the_chart_library_is_the_one_that_is_named() -> None:
    named = json.loads((STATIC / "plotly.json").read_text(encoding="utf-8"))
    content = (STATIC / named["file"]).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (named["sha256"], named["bytes"])
    assert f"plotly.js (cartesian - minified) v{named['version']}".encode() in content[:200]
    assert "MIT License" in (STATIC / named["license_file"]).read_text(encoding="utf-8")


def test_the_page_of_the_largest_run_is_below_two_megabytes() -> None:
    run = large_run()
    assert len(page(page_data(run))) <= 2_000_000
    assert len(page(comparison_page_data([run, run], ["a", "b"], interval), COMPARISON)) <= 2_000_000
