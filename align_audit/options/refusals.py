"""What is wrong with a configuration, in words: of each problem where it stands, what was found, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from align_audit.errors import ConfigurationError, plain, quoted
from align_audit.options.rules import did_you_mean
from align_audit.options.yaml_lines import Place, line_at

_EXPLAINED = 20
"""Problems of a configuration that are told; the rest are counted."""


class Refused(ConfigurationError):
    """Options that are not valid, with what pydantic says of them."""

    def __init__(self, error: ValidationError, config: type[BaseModel]) -> None:
        super().__init__(explained(error, config))
        self.error = error


def explained(error: ValidationError, config: type[BaseModel], lines: Mapping[Place, int] | None = None) -> str:
    """Say each problem in one line: where, what was found, what is allowed; ``lines``: where in a YAML file places stand."""
    told = []
    problems = error.errors(include_url=False)
    for problem in problems[:_EXPLAINED]:
        place: Place = (*problem["loc"], *problem.get("ctx", {}).get("place", ()))
        where = ".".join(plain(part, 60) for part in place) or config.__name__
        line = line_at(lines or {}, place)
        at = "" if line is None else f" (line {line})"
        if problem["type"] == "extra_forbidden":
            names = _options_at(config, place[:-1])
            told.append(
                f"unknown option {where!r}{at}{did_you_mean(str(place[-1]), names)}; the options there are {', '.join(names)}"
            )
        elif "place" in problem.get("ctx", {}):
            told.append(f"{where}{at}: {plain(problem['msg'], 800)}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            told.append(
                f"{where}{at}: {plain(said, 800)}{_quotation((config.__name__, *problem['loc']), problem['input'])}"
            )
    if len(problems) > _EXPLAINED:
        told.append(f"and {len(problems) - _EXPLAINED} more")
    return "invalid audit configuration:\n  " + "\n  ".join(told)


def _quotation(where: Place, value: Any) -> str:
    """What was found there, for a message; nothing from a URL or the options of a webhook on, which may be secret."""
    if {"webhook", "WebhookConfig"} & set(where) and where[-1] not in ("form", "timeout_seconds"):
        return ""
    text = quoted(value)
    secret = re.search(r"(?<=://)|(?<=webhook)", text)
    return f" (found {text if secret is None else text[: secret.start()] + '…'})"


def _options_at(config: type[BaseModel], place: Place) -> list[str]:
    """The names of the options of a part."""
    part: Any = config
    for name in place:
        # A place in a tuple of parts: what it holds.
        part = get_args(part)[0] if isinstance(name, int) else part.model_fields[name].annotation
        # ``WebhookConfig | None``: the part itself.
        part = get_args(part)[0] if type(None) in get_args(part) else part
    return list(part.model_fields)
