"""Where in a YAML file something stands, so that what is wrong with it can be said with its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from align_audit.errors import SHOWN, first_line, plain, quoted

Place = tuple[str | int, ...]
"""Keys and indices from the top of the file to a value."""

_DEEPEST = 8


def lines_of(text: str) -> dict[Place, int]:
    """The line, from 1, of each key and item of a YAML text, down to eight levels.

    What an alias repeats is entered where it stands first alone: written out, a few lines may be billions of places.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    lines: dict[Place, int] = {}
    entered: set[int] = set()

    def visit(node: yaml.Node | None, place: Place) -> None:
        if len(place) == _DEEPEST or id(node) in entered:
            return
        entered.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    inner: Place = (*place, key.value)
                    lines[inner] = key.start_mark.line + 1
                    visit(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[*place, index] = value.start_mark.line + 1
                visit(value, (*place, index))

    top = yaml.compose(text, Loader=yaml.SafeLoader)
    visit(top, ())
    return lines


def loaded(text: str) -> Any:
    """What a YAML text says, in which no key stands twice: YAML would take the last one without a word.

    Raises:
        yaml.YAMLError: the text is no YAML, or a key of one mapping comes again.
    """
    values = yaml.safe_load(text)
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting, entered = [top] if top is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in entered:
            continue
        entered.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                    continue
                if (first := seen.get(key.value)) is not None:
                    problem = f"{quoted(key.value)} stands a second time, after line {first}; expected it once"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = key.start_mark.line + 1
    return values


def line_at(lines: Mapping[Place, int], place: Place) -> int | None:
    """The line of a place, or of what is called so further in (an option of a rule is one of all alerts), or of the nearest one
    around it that the file has."""
    if place in lines:
        return lines[place]
    around = place[:-1]
    inside = (lines[each] for each in lines if each[: len(around)] == around and each[-1:] == place[-1:])
    return next(inside, None) or next(
        (lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in lines), None
    )


def in_a_line(error: Exception) -> str:
    """What PyYAML found, and where: its own text is of several lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and (mark := error.problem_mark):
        return f"{plain(error.problem, SHOWN)} (line {mark.line + 1}, column {mark.column + 1})"
    return first_line(error)
