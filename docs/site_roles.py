"""For the site: what docstrings say in reStructuredText, roles and ``Example::``, becomes Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example::$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """griffe calls this with everything that it has found."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("**Example:**", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text)
