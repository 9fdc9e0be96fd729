"""The one table of rules: limits that make sense, options under their names, a page that prints it, signals that exist."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align_audit.config import AlertConfig
from align_audit.options.rules import BY_NAME, LIMITS, RULES, Limit, rule_named
from align_audit.options.rules_markdown import BEGIN, tables, written_into
from align_audit.options.signals import LAYER_SIGNALS, LOG_SIGNALS, RECORD_SIGNALS, is_log_signal, is_signal
from align_audit.record.numbers import numbers
from tests.helpers.alert_cases import CONFIG, healthy
from tests.helpers.make_record import make_record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "alerts.md"


def test_the_page_prints_the_table() -> None:
    """``python -m align_audit.options.rules_markdown docs/alerts.md`` writes it."""
    text = PAGE.read_text(encoding="utf-8")
    assert written_into(text) == text
    assert all(f"| `{rule.name}` |" in text for rule in RULES)
    with pytest.raises(ValueError, match="expected a page with the marks"):
        written_into(text.replace(BEGIN, ""))
    assert tables().count("\n| `") == len(RULES)


def test_every_limit_is_an_option_with_its_default() -> None:
    assert LIMITS.keys() < AlertConfig.model_fields.keys()
    assert sum(len(rule.limits) for rule in RULES) == len(LIMITS)
    for name, limit in LIMITS.items():
        assert getattr(CONFIG, name) == limit.default
        assert limit.above < limit.default < limit.below
        assert limit.unit and limit.says


def test_an_error_lies_further_out_than_a_warning() -> None:
    pairs = [
        (warning, error)
        for rule in RULES
        for warning in rule.limits
        for error in rule.limits
        if (warning.level, error.level) == ("warning", "error") and warning.direction == error.direction
        if error.option.removesuffix("_error") == warning.option.removesuffix("_warning")
    ]
    assert len(pairs) >= 9
    for warning, error in pairs:
        further = error.default > warning.default if warning.direction == "above" else error.default < warning.default
        assert further, warning.option
        assert warning.unit == error.unit


def test_easing_moves_a_limit_to_the_healthy_side() -> None:
    for limit in LIMITS.values():
        eased = limit.eased(limit.default, 0.8)
        if limit.relative:
            assert eased < limit.default if limit.direction == "above" else eased > limit.default
        else:
            assert eased == limit.default


def test_a_rule_may_be_called_by_a_beginning_that_only_it_has() -> None:
    assert rule_named("kl") is BY_NAME["kl_out_of_bounds"]
    assert rule_named("entropy") is BY_NAME["entropy_out_of_bounds"]
    assert rule_named("repetition") is BY_NAME["repetition"]
    assert rule_named("reference") is None, "two rules begin with it"
    assert rule_named("k") is None


def test_what_rules_read_exists() -> None:
    words = {"reference_check.verdict", "reference_check.same_weights", "provenance.reference_hash"}
    record = healthy()
    paths = {number.series for number in numbers(record)} | words
    for rule in RULES:
        for signal in rule.reads:
            if rule.source == "log":
                assert is_log_signal(signal), signal
            elif "*" in signal:
                assert any(
                    path.startswith(signal.split("*")[0]) and path.endswith(signal.split("*")[1]) for path in paths
                )
            else:
                assert signal in paths, signal


def test_signals_are_the_single_numbers_of_a_record() -> None:
    record = healthy()
    alone = {number.path for number in numbers(record) if number.index is None}
    named = {path for path in alone if path.split(".")[0] in ("margins", "generations", "spinal", "localization")}
    sizes = {"generations.prompts", "generations.max_new_tokens", "spinal.rows", "spinal.rows_available"}
    of_draws = {"spinal.transport_rows", "spinal.delta_align_stderr"}
    assert named - sizes - of_draws == {
        signal
        for signal in RECORD_SIGNALS
        if signal.split(".")[0] in ("margins", "generations", "spinal", "localization")
    }
    assert set(RECORD_SIGNALS) <= alone
    by_layer = {number.series for number in numbers(record) if number.index_kind == "layer"}
    assert set(LAYER_SIGNALS) <= by_layer
    assert is_signal("patching.layer_gain.3")
    assert not is_signal("patching.layer_gain")
    assert not is_signal("patching.layer_gain.x")


@pytest.mark.parametrize("prefix", ["", "eval_", "eval_helpful_"])
def test_columns_of_the_log_are_signals_of_evaluations_too(prefix: str) -> None:
    assert all(is_signal(f"{prefix}{name}") for name in LOG_SIGNALS)
    assert not is_signal(f"{prefix}los")


def test_the_numbers_of_the_first_audit_are_within_the_limits() -> None:
    """Before training policy and reference are equal, and no limit is in the way of that."""
    record = make_record(0, progress=0.0)
    assert record.margins.kl.mean == 0.0
    assert all(math.isfinite(limit.default) for limit in LIMITS.values())


@pytest.mark.parametrize("hysteresis", [0.05, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=lambda limit: limit.option)
def test_no_eased_limit_reaches_what_is_healthy(limit: Limit, hysteresis: float) -> None:
    """A ratio of 1 is a policy as its reference: an alert that holds one beyond its limit would never clear."""
    for value in {limit.default, 1.2 if limit.direction == "above" and limit.is_ratio else limit.default}:
        eased = limit.eased(value, hysteresis)
        if limit.is_ratio and limit.relative:
            assert eased > 1 if limit.direction == "above" else eased < 1
        assert eased <= value if limit.direction == "above" else eased >= value
