"""A report or a comparison: one HTML file that asks no host for anything, made of the data of runs and the front end.

The content security policy allows no request, and no script but those of this package, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class FrontEnd:
    """The files that draw a page.

    Attributes:
        scripts: in the order in which they run.
        styles: a later one goes before an earlier one.
    """

    scripts: tuple[str, ...]
    styles: tuple[str, ...]


_CHARTS = ("plotly-cartesian.min.js", "charts.js", "align_audit.js")
REPORT = FrontEnd((*_CHARTS, "start.js"), ("align_audit.css",))
COMPARISON = FrontEnd((*_CHARTS, "comparison.js", "start_comparison.js"), ("align_audit.css", "comparison.css"))


def page(data: dict[str, Any], front_end: FrontEnd = REPORT) -> bytes:
    """A page, in UTF-8, that shows the value of :func:`align_audit.writers.web.page_data.page_data`.

    Args:
        data: of a comparison, the value of :func:`align_audit.writers.web.comparison_data.comparison_page_data`.
        front_end: what draws it: :data:`REPORT` or :data:`COMPARISON`.

    Raises:
        ValueError: a number in it is not finite.
    """
    head, tail = _around(front_end)
    return b"".join((head, in_html(data).encode("ascii"), tail))


def in_html(data: Any) -> str:
    """JSON that may stand in a script element: no character of it ends the element, or begins a comment or a tag.

    Example:
        >>> in_html({"name": "</script>"})
        '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    words = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and its like are escaped
    for letter in "<>&":
        words = words.replace(letter, f"\\u{ord(letter):04x}")
    return words


@functools.cache
def static(name: str) -> str:
    """A file of the front end."""
    return files("align_audit.writers.web.static").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _around(front_end: FrontEnd) -> tuple[bytes, bytes]:
    """What stands before and after the data: the same in every page of a front end."""
    scripts = [static(name) for name in front_end.scripts]
    styles = "".join(static(name) for name in front_end.styles)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    without = "This page draws itself with the scripts that it holds; the browser runs none."
    head = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>align_audit</title>
<style>
{styles}</style>
</head>
<body>
<div id="align-audit"><noscript><p>{without}</p></noscript></div>
<script type="application/json" id="align-audit-data">"""
    tail = "</script>\n" + "\n".join(f"<script>{script}</script>" for script in scripts) + "\n</body>\n</html>\n"
    return head.encode(), tail.encode()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
