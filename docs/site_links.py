"""For the site: links out of ``docs/`` lead to the file in the repository, which the site does not hold."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:align_audit|benchmarks|recipes|tests|[A-Z]+\.md|pyproject)[^)#]*)([^)]*)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """mkdocs calls this with each page's text."""
    return OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1\2)", markdown)
