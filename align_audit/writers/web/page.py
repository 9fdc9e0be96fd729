"""The report: one HTML file that asks no host for anything, made of a run's data and the front end.

The content security policy allows no request, and no script but those of this package, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from importlib.resources import files
from typing import Any

SCRIPTS = ("plotly-cartesian.min.js", "charts.js", "align_audit.js", "start.js")
"""In the order in which they run."""
STYLE = "align_audit.css"


def page(data: dict[str, Any]) -> bytes:
    """A page that shows the value of :func:`align_audit.writers.web.page_data.page_data`, in UTF-8.

    Raises:
        ValueError: a number in it is not finite.
    """
    head, tail = _around()
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
def _around() -> tuple[bytes, bytes]:
    """What stands before and after the data: the same in every page."""
    scripts = [static(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    without = "This report draws itself with the script that it holds; the browser runs none."
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
{static(STYLE)}</style>
</head>
<body>
<div id="align-audit"><noscript><p>{without}</p></noscript></div>
<script type="application/json" id="align-audit-data">"""
    tail = "</script>\n" + "\n".join(f"<script>{script}</script>" for script in scripts) + "\n</body>\n</html>\n"
    return head.encode(), tail.encode()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
