"""Outside text in Markdown: what it holds is shown, and never formats, links, mentions, typesets or loads anything.

TensorBoard, trackers and model hubs read different Markdown: what means something in one of them is escaped for all.
"""

from __future__ import annotations

import re

from align_audit.errors import plain

_ENTITIES = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "~": "&#126;", "$": "&#36;", "@": "&#64;", "://": "&#58;//", "www.": "www&#46;",
}  # fmt: skip
"""What is HTML, struck out, a formula, a mention, or taken for an address. A backslash before it is shown by some."""
_ENTITY = re.compile("|".join(map(re.escape, _ENTITIES)), re.IGNORECASE)
_MARKUP = re.compile(r"[\\`*|]|\](?=\s*[\[(:])|(?<![^\W_])_|_(?![^\W_])")
"""Characters that mean something: a bracket where it ends the name of a link, an underscore everywhere but inside a word."""
_BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|)([-+.)#\[])")
"""What begins a list, a rule, a heading or the definition of a link at the beginning of a line."""


def code(text: object) -> str:
    """A text as code, also in a cell of a table."""
    return "`" + plain(text).replace("`", "'").replace("|", "\\|") + "`"


def escaped(text: object) -> str:
    r"""A text as one line of Markdown that shows just this text.

    Example:
        >>> print(escaped("1. *bold* [link](http://x) kl_out_of_bounds"))
        1\. \*bold\* [link\](http&#58;//x) kl_out_of_bounds
    """
    words = " ".join(plain(" ".join(str(text).split())).split())
    words = _BLOCK.sub(r"\1\\\2", _MARKUP.sub(lambda match: f"\\{match[0]}", words))
    return _ENTITY.sub(lambda match: _ENTITIES.get(match[0], f"{match[0][:-1]}&#46;"), words)
