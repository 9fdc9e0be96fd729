"""The table of rules as ``docs/alerts.md`` prints it.

``python -m align_audit.options.rules_markdown docs/alerts.md`` writes it there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from align_audit.options.rules import CAUSES, RULES, Limit, Rule

BEGIN, END = "<!-- rules: made by align_audit.options.rules_markdown -->", "<!-- end of rules -->"


def tables() -> str:
    """One table a cause: the rule, what it fires on, what it reads, its limits, and what it is worth alone."""
    parts = []
    for cause, words in CAUSES.items():
        lines = [
            f"### `{cause}`: {words}",
            "",
            "| rule | fires when | reads | limits (option, default) | alone | family | looks |",
            "|---|---|---|---|---|---|---|",
            *(_row(rule) for rule in RULES if rule.cause == cause),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(rule: Rule) -> str:
    reads = ", ".join(f"`{signal}`" for signal in rule.reads)
    limits = "<br>".join(map(_limit, rule.limits)) or "–"
    highest = {"none": "nothing: a witness"}.get(rule.highest, rule.highest)
    return f"| `{rule.name}` | {rule.says} | {reads} | {limits} | {highest} | {rule.family} | {rule.patience} |"


def _limit(limit: Limit) -> str:
    if limit.level is None:
        return f"`{limit.option}` {limit.default:g} {limit.unit}: {limit.says}"
    return f"`{limit.option}` {limit.default:g} {limit.unit}: {limit.says} {limit.direction} it, {limit.level}"


def written_into(text: str) -> str:
    """A page with the tables between its two marks.

    Raises:
        ValueError: the page lacks a mark.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a page with the marks {BEGIN} and {END}; found it without")
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(written_into(page.read_text(encoding="utf-8")), encoding="utf-8")
