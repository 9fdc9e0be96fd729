"""Continuations that repeat themselves, grow, never end, or are odd: both sides of the limits, NaN, and none at all."""

from __future__ import annotations

import pytest

from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import NAN, about, healthy, sign, with_texts, without_interval

UNKNOWN = Estimate(mean=NAN, low=NAN, high=NAN, reason="no continuation has two tokens")


@pytest.mark.parametrize(("low", "level"), [(0.34, None), (0.36, "warning"), (0.59, "warning"), (0.61, "error")])
def test_repetition(low: float, level: str | None) -> None:
    record = with_texts(healthy(), repetition=Estimate(mean=low + 0.1, low=low, high=low + 0.2))
    seen = sign("repetition", record, [])
    assert (seen and seen.level) == level
    if seen:
        assert seen.baseline == 0.1
        assert seen.limit == pytest.approx(0.35 if level == "warning" else 0.6)
    assert (
        sign("repetition", with_texts(record, repetition=about(low + 0.1), reference_repetition=about(low)), []) is None
    )


@pytest.mark.parametrize(
    ("length", "level"),
    [(29.0, None), (31.0, "warning"), (51.0, "error"), (11.0, None), (9.0, "warning"), (4.0, "error")],
)
def test_length(length: float, level: str | None) -> None:
    seen = sign("length_exploited", with_texts(healthy(), length=about(length, 0.5)), [])
    assert (seen and seen.level) == level
    if seen:
        assert (seen.value, seen.baseline) == (length, 20.0)
        assert (seen.value - seen.limit) * (1 if length > 20 else -1) > 0


@pytest.mark.parametrize(("ended", "level"), [(0.52, None), (0.48, "warning"), (0.1, "error")])
def test_continuations_that_no_longer_end(ended: float, level: str | None) -> None:
    seen = sign("length_exploited", with_texts(healthy(), ended=about(ended)), [])
    assert (seen and seen.level) == level
    if seen:
        assert "end within 32 tokens" in seen.message


@pytest.mark.parametrize(("surprise", "level"), [(1.69, None), (1.72, "warning"), (3.22, "error")])
def test_surprise(surprise: float, level: str | None) -> None:
    seen = sign("surprising_text", with_texts(healthy(), surprise=about(surprise)), [])
    assert (seen and seen.level) == level


@pytest.mark.parametrize("rule", ["repetition", "length_exploited", "surprising_text"])
def test_what_is_not_known_says_nothing(rule: str) -> None:
    names = ("repetition", "length", "ended", "surprise")
    assert sign(rule, with_texts(healthy(), **dict.fromkeys(names, UNKNOWN)), []) is None
    assert sign(rule, with_texts(healthy(), **{f"reference_{name}": UNKNOWN for name in names}), []) is None
    assert sign(rule, healthy().model_copy(update={"generations": None}), []) is None
    assert sign(rule, with_texts(healthy(), reference_length=about(0.0, 0.0)), []) is None


@pytest.mark.parametrize(
    ("rule", "name", "ruined", "calm"),
    [
        ("repetition", "repetition", 0.7, 0.3),
        ("length_exploited", "length", 60.0, 25.0),
        ("length_exploited", "length", 4.0, 15.0),
        ("length_exploited", "ended", 0.1, 0.6),
        ("surprising_text", "surprise", 4.0, 1.5),
    ],
)
def test_few_prompts_without_an_interval_go_by_the_mean_and_say_so(
    rule: str, name: str, ruined: float, calm: float
) -> None:
    seen = sign(rule, with_texts(healthy(), prompts=4, **{name: without_interval(ruined)}), [])
    assert (seen.level, seen.few) == ("error", "4 prompts")
    assert seen.words.endswith("(Of 4 prompts, too few for an interval: this goes by the mean alone.)")
    assert sign(rule, with_texts(healthy(), prompts=4, **{name: without_interval(calm)}), []) is None
    assert sign(rule, with_texts(healthy(), **{name: about(ruined)}), []).few is None
