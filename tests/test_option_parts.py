"""Parts of a configuration that are made by themselves, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from align_audit import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.options.part import Part
from align_audit.options.webhook import WebhookConfig


def parts(of: type[Part]) -> list[type[Part]]:
    """All kinds of them."""
    return [each for kind in of.__subclasses__() for each in (kind, *parts(kind))]


@pytest.mark.parametrize("part", parts(Part), ids=lambda part: part.__name__)
def test_a_part_by_itself_is_refused_as_in_the_whole(part: type[Part]) -> None:
    name = next(iter(part.model_fields))
    with pytest.raises(ConfigurationError, match=rf"unknown option '{name}s' \(did you mean '{name}'\?\)"):
        part(**{f"{name}s": 1})
    with pytest.raises(ConfigurationError, match=rf"^invalid audit configuration:\n  {name}"):
        part(**{name: object()})


def test_places_are_those_of_the_whole() -> None:
    places = r"\n  schedule\.first_health: [^\n]*\n  alerts\.webhook\.url: [^\n]*$"
    with pytest.raises(ConfigurationError, match=places):
        AuditConfig(alerts={"webhook": {"url": "ftp://x"}}, schedule={"first_health": 0})


def test_a_webhook_by_itself_is_not_quoted() -> None:
    for options in (
        {"url": "https://user:secret@host"},
        {"headers": {"a": "secret\n"}},
        {"form": "json", "url": ["secret"]},
    ):
        with pytest.raises(ConfigurationError) as refused:
            WebhookConfig(**options)
        assert "secret" not in str(refused.value)
