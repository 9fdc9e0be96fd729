"""What happens before the first step: what is a finding refuses to start, and what breaks in a library does not."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, ClassVar

import pytest
import torch

from align_audit.errors import ConfigurationError
from align_audit.models.reference import resolve_reference
from align_audit.monitoring import start
from align_audit.ranks import Ranks
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


class Places(Ranks):
    """One process that writes down where it would meet others."""

    met: ClassVar[list[int | str]] = []

    def check(self, place: int) -> None:
        self.met.append(place)

    def any(self, decision: bool) -> bool:
        self.met.append("any")
        return decision


def checked(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The check before training, in which something breaks."""
    reference = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(reference)

    def breaks(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(start, "check_audit", breaks)
    resolved = resolve_reference(policy, reference)
    Places.met.clear()
    start.check(policy, resolved, {None: random_pairs(2)}, quick(), contextlib.nullcontext, None, Places())


@pytest.mark.parametrize("error", [ValueError("planted"), SystemExit("planted"), MemoryError("planted")])
def test_a_check_that_breaks_is_said_and_training_begins(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=start.__name__):
        checked(monkeypatch, error)
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert said == f"align_audit could not check its set-up: {type(error).__name__}: planted"


def test_a_finding_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="planted"):
        checked(monkeypatch, ConfigurationError("planted"))


def test_the_processes_meet_at_a_place_of_its_own_for_each_thing_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, ValueError("planted"))
    assert Places.met == [start._CHECKED, start._REFUSED, "any"]
    assert start._CHECKED != start._REFUSED
