"""Outside text in Markdown, such as TensorBoard renders: what it holds is shown, and never formats, links or loads anything."""

from __future__ import annotations

import re

from align_audit.errors import plain

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*|]|\](?=\s*[\[(:])|(?<![^\W_])_|_(?![^\W_])")
"""Characters that mean something: a bracket where it ends the name of a link, an underscore everywhere but inside a word."""
_BLOCK = re.compile(r"^(\d*)([-+.)#\[])")
"""What begins a list, a rule, a heading or the definition of a link at the beginning of a line."""


def code(text: object) -> str:
    """A text as code, also in a cell of a table."""
    return "`" + plain(text).replace("`", "'").replace("|", "\\|") + "`"


def escaped(text: object) -> str:
    r"""A text as one line of Markdown that shows just this text.

    Example:
        >>> print(escaped("1. *bold* [link](http://x) kl_out_of_bounds"))
        1\. \*bold\* [link\](http://x) kl_out_of_bounds
    """
    words = " ".join(plain(" ".join(str(text).split())).split())
    words = _BLOCK.sub(r"\1\\\2", _MARKUP.sub(lambda match: f"\\{match[0]}", words))
    return "".join(_HTML.get(letter, letter) for letter in words)
