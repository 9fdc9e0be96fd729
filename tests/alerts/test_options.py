"""Rules switched off, tuned and added, in YAML and in Python; what is wrong is refused with its line and the nearest name."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest

from align_audit.alerts.detectors import judge, suspect
from align_audit.alerts.history import FURTHEST, History
from align_audit.auditing.check import check_audit
from align_audit.config import AlertConfig, AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.models.reference import resolve_reference
from align_audit.options.rule_settings import RESERVED, AddedRule, RuleOptions
from align_audit.options.rules import LIMITS, RULES, Limit
from align_audit.options.signals import LAYER_SIGNALS
from tests.helpers.alert_cases import about, alerts, health, healthy, judged, log_of, run, sign, with_margins, with_part
from tests.helpers.tiny import random_pairs, tiny_model


def from_yaml(path: Path, text: str) -> AuditConfig:
    (path / "audit.yaml").write_text(text)
    return AuditConfig.from_yaml(path / "audit.yaml")


def added(**rule: Any) -> AlertConfig:
    return AlertConfig(rules={"mine": rule})


def names(record: Any, config: AlertConfig, **known: Any) -> list[tuple[str, str]]:
    return [(alert.rule, alert.level) for alert in alerts(record, config=config, **known)]


def test_rules_in_yaml(tmp_path: Path) -> None:
    text = """
alerts:
  kl_warning: 0.5
  rules:
    entropy: off
    repetition: on
    additivity_high: {additivity_high: 2.0, level: warning, patience: 2}
    norms: {signal: grad_norm, above: 50, level: error, patience: 3}
"""
    config = from_yaml(tmp_path, text).alerts
    assert (config.kl_warning, config.additivity_high, config.kl_error) == (0.5, 2.0, AlertConfig().kl_error)
    assert not config.uses("entropy_out_of_bounds")
    assert config.uses("repetition")
    assert config.uses("kl_out_of_bounds")
    assert config.rules["additivity_high"] == RuleOptions(level="warning", patience=2)
    assert config.added == {"norms": AddedRule(signal="grad_norm", above=50, level="error", patience=3)}
    whole = AuditConfig(alerts=config)
    whole.to_yaml(tmp_path / "all.yaml")
    assert AuditConfig.from_yaml(tmp_path / "all.yaml") == whole
    assert AuditConfig.from_dict(whole.to_dict()) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl_warnin: 3", ["alerts.kl_warnin' (line 2)", "did you mean 'kl_warning'?"]),
        ("kl_warning: -1", ["alerts.kl_warning (line 2)", "greater than 0", "found -1"]),
        ("kl_warning: many", ["alerts.kl_warning (line 2)", "valid number", "found 'many'"]),
        ("entropy_ratio_low: 1.5", ["alerts.entropy_ratio_low (line 2)", "less than 1"]),
        ("entropy_ratio_high: 0.5", ["alerts.entropy_ratio_high (line 2)", "greater than 1"]),
        ("action: log\n  kl_warning: 1", ["alerts.kl_warning (line 3)", "of at most kl_error", "found 1 and 0.7"]),
        ("kl_error: 0.2", ["alerts.kl_error (line 2)", "kl_warning of at most kl_error", "found 0.35 and 0.2"]),
        ("entropy_ratio_low: 0.2", ["alerts.entropy_ratio_low (line 2)", "of at least entropy_ratio_low_error"]),
        ("rules:\n    entropi: off", ["alerts.rules.entropi (line 3)", "no rule 'entropi'", "did you mean 'entropy'?"]),
        ("rules:\n    kl: off\n    kl_out_of_bounds: on", ["(line 4)", "expected the rule kl_out_of_bounds once"]),
        ("rules:\n    kl:\n      patienc: 3", ["alerts.rules.kl.patienc (line 4)", "did you mean 'patience'?"]),
        ("rules:\n    kl:\n      patience: 0", ["alerts.rules.kl.patience (line 4)", "greater than or equal to 1"]),
        ("rules: {kl: {level: fatal}}", ["alerts.rules.kl.level (line 2)", "'warning' or 'error'"]),
        ("rules: {kl: 3}", ["alerts.rules.kl (line 2)", "expected off, on or a mapping", "found 3"]),
        ("rules: {kl: {signal: margins.kl, above: 1}}", ["'kl' is a rule of the table", "another name"]),
        ("rules: {kl: {kl_warning: -1}}", ["alerts.kl_warning", "greater than 0"]),
        ("kl_warning: 1\n  rules: {kl: {kl_warning: 1}}", ["expected kl_warning once"]),
        ("rules: [kl]", ["alerts.rules (line 2)", "valid dictionary"]),
        ("rules: {3: off}", ["expected names of rules, found 3"]),
        (
            "rules:\n    mine: {signal: margins.kll, above: 1}",
            ["alerts.rules.mine (line 3)", "no signal 'margins.kll'", "did you mean 'margins.kl'?"],
        ),
        ("rules: {mine: {signal: grad_nrm, above: 1}}", ["no signal 'grad_nrm'", "did you mean 'grad_norm'?"]),
        ("rules: {mine: {signal: margins.kl}}", ["alerts.rules.mine", "either above or below"]),
        ("rules: {mine: {signal: margins.kl, above: 1, below: 0}}", ["either above or below"]),
        ("rules: {mine: {signal: margins.kl, above: high}}", ["alerts.rules.mine.above (line 2)", "valid number"]),
        ("rules: {mine: {signal: margins.kl, above: .nan}}", ["alerts.rules.mine.above (line 2)", "finite number"]),
        ("rules: {mine: {signal: margins.kl, abov: 1}}", ["no option 'abov'", "did you mean 'above'?"]),
        ("rules: {mine: {check: print}}", ["alerts.rules.mine.check", "callable"]),
        ("rules: {mine: off}", ["no rule 'mine'"]),
        ("error_looks: 0", ["alerts.error_looks (line 2)"]),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        from_yaml(tmp_path, f"alerts:\n  {text}\n")
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("warning", "error"), [pair for rule in RULES for pair in rule.levels], ids=lambda limit: limit.option
)
def test_no_warning_lies_beyond_its_error(warning: Limit, error: Limit) -> None:
    """It would never be met before the error. Where the rule gives no error, or infinity switches the warning off, it may."""
    (rule,) = (rule for rule in RULES if error in rule.limits)
    beyond = error.default * (1.1 if warning.direction == "above" else 0.9)
    for moved in (
        {warning.option: beyond},
        {error.option: warning.default * (0.9 if warning.direction == "above" else 1.1)},
    ):
        with pytest.raises(ConfigurationError, match=rf"expected {warning.option} of at (most|least) {error.option}"):
            AuditConfig(alerts=moved)
    assert AlertConfig(**{warning.option: error.default}).uses(rule.name), "at the same place both are met"
    for said in ("off", {"level": "warning"}):
        AlertConfig(**{warning.option: beyond}, rules={rule.name: said})
    if math.isinf(warning.below):
        AlertConfig(**{warning.option: math.inf})


def test_every_limit_of_an_error_stands_behind_one_of_a_warning() -> None:
    behind = {error.option for rule in RULES for _, error in rule.levels}
    assert behind == {limit.option for rule in RULES for limit in rule.limits if limit.level == "error"}


def test_secrets_beside_a_wrong_rule_are_not_quoted() -> None:
    with pytest.raises(ConfigurationError) as refused:
        AuditConfig(alerts={"webhook": "https://hooks.example/s3cret", "rules": {"entropi": "off"}})
    assert "no rule 'entropi'" in str(refused.value)
    assert "s3cret" not in str(refused.value)


# -- rules of the user's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "limit", "fires"),
    [(0.21, 0.4, {"above": 0.2}, True), (0.19, 0.4, {"above": 0.2}, False), (0.1, 0.19, {"below": 0.2}, True),
     (0.1, 0.21, {"below": 0.2}, False)],
)  # fmt: skip
def test_a_number_with_an_interval_lies_beyond_its_limit_as_a_whole(
    low: float, high: float, limit: dict[str, float], fires: bool
) -> None:
    estimate = about(0.0).model_copy(update={"mean": (low + high) / 2, "low": low, "high": high})
    record = with_margins(healthy(), kl=estimate)
    found = alerts(record, config=added(signal="margins.kl", suggestion="Look", **limit))
    mine = [alert for alert in found if alert.rule == "mine"]
    assert len(mine) == fires
    if fires:
        assert (mine[0].level, mine[0].cause, mine[0].threshold) == ("warning", "mine", 0.2)
        assert "margins.kl" in mine[0].message
        assert mine[0].suggestion == "Look"


def test_a_number_of_one_layer() -> None:
    record = healthy()
    effect = record.patching.effect[3].low
    assert names(record, added(signal="patching.effect.3", above=effect - 0.01)) == [("mine", "warning")]
    assert names(record, added(signal="patching.effect.3", above=effect + 0.01)) == []
    assert names(record, added(signal="patching.effect.99", above=-1e9)) == []
    assert names(health(record), added(signal="patching.effect.3", above=-1e9)) == [], "it was not measured"


def test_what_is_not_known_raises_nothing() -> None:
    unknown = with_margins(healthy(), kl=about(float("nan")))
    for limit in ({"above": -1e9}, {"below": 1e9}):
        assert names(unknown, added(signal="margins.kl", **limit)) == []
        assert names(healthy(), added(signal="grad_norm", **limit)) == []
        assert (
            names(with_part(healthy(), "patching", peak_layer=None), added(signal="patching.peak_layer", **limit)) == []
        )


def test_a_column_of_the_log() -> None:
    config = added(signal="grad_norm", above=50.0)
    log = log_of(range(1, 101), grad_norm=51.0)
    assert names(healthy(), config, log=log) == [("mine", "warning")]
    assert [each.rule for each in suspect(log, config)] == ["mine"]
    assert suspect(log_of(range(1, 101), grad_norm=49.0), config) == []


def test_an_error_of_the_users_is_one_as_soon_as_its_patience_says_so() -> None:
    assert names(healthy(), added(signal="margins.kl", above=-1.0, level="error")) == [("mine", "error")]
    patient = added(signal="margins.kl", above=-1.0, level="error", patience=3)
    records = judged([healthy(step) for step in (10, 20, 30)], patient)
    assert [[alert.level for alert in record.alerts] for record in records] == [[], [], ["error"]]


def test_a_function_of_the_history() -> None:
    seen: list[History] = []

    def check(history: History) -> str | None:
        seen.append(history)
        return "KL is odd." if history.record.margins.kl.mean > 0.2 else None

    config = AlertConfig(rules={"mine": check})
    assert names(healthy(), config) == []
    (alert,) = alerts(with_margins(healthy(), kl=about(0.25)), config=config)
    assert (alert.rule, alert.level, alert.message) == ("mine", "warning", "KL is odd.")
    assert [record.step for record in seen[0].earlier] == [record.step for record in run()]
    assert AuditConfig(alerts=config).to_dict()["alerts"]["rules"]["mine"]["check"].endswith("check")


@pytest.mark.parametrize("answer", [ZeroDivisionError("1 / 0"), True, 3])
def test_a_function_that_breaks_costs_no_other_alert(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def check(history: History) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert names(with_margins(healthy(), kl=about(0.5)), AlertConfig(rules={"mine": check})) == [
        ("kl_out_of_bounds", "warning")
    ]
    assert "the alert rule mine" in caplog.text


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_an_added_rule_takes_no_name_of_a_cause(name: str) -> None:
    """It would silence the rules of that cause, or be silenced with them."""
    with pytest.raises(ConfigurationError, match=f"'{name}' is no name for a rule"):
        AuditConfig.from_dict({"alerts": {"rules": {name: {"signal": "margins.kl", "above": 0.1}}}})


@pytest.mark.parametrize("said", ["", "  \n", 3, True])
def test_a_rule_that_says_nothing_is_no_alert(said: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = AlertConfig(rules={"mine": lambda history: said})
    assert names(healthy(), config) == []
    assert "the alert rule mine: expected a message or None, found" in caplog.text


def test_every_rule_switched_off_is_as_alerts_switched_off() -> None:
    """Nothing is asked then either, and a status of HEALTHY would be made of nothing."""
    off: dict[str, Any] = {rule.name: "off" for rule in RULES}
    assert not AlertConfig(rules=off).enabled
    again = AlertConfig.model_validate(AlertConfig(rules=off).model_dump(mode="json"))
    assert not again.enabled, "as it was stored"
    assert AlertConfig(rules=off | {RULES[0].name: "on"}).enabled
    assert AlertConfig(rules=off | {"mine": {"signal": "grad_norm", "above": 50.0}}).enabled


def test_witnesses_too_few_to_agree_are_as_alerts_switched_off() -> None:
    """A witness opens nothing but with signs of as many families as have to agree."""
    off: dict[str, Any] = {rule.name: "off" for rule in RULES}
    witnesses = {rule.name: rule.family for rule in RULES if rule.weight == "witness"}
    assert len(set(witnesses.values())) == AlertConfig().agreeing_families == 3
    assert AlertConfig(rules=off | dict.fromkeys(witnesses, "on")).enabled
    assert not AlertConfig(rules=off | dict.fromkeys(witnesses, "on"), agreeing_families=4).enabled
    for family in set(witnesses.values()):
        fewer = {name: "on" for name, its in witnesses.items() if its != family}
        assert not AlertConfig(rules=off | fewer).enabled
        assert AlertConfig(rules=off | fewer, agreeing_families=2).enabled


@pytest.mark.parametrize("sequence", LAYER_SIGNALS)
def test_a_rule_of_a_layer_that_the_model_lacks_is_refused_before_training(sequence: str) -> None:
    """It would never fire, and nobody would know."""
    reference = tiny_model("llama")  # of 4 layers
    policy = copy.deepcopy(reference)
    last = 2 if sequence == "spinal.policy.transport" else 3

    def check(signal: str) -> None:
        config = AuditConfig(alerts=added(signal=signal, above=0.5))
        resolved = resolve_reference(policy, reference)
        check_audit(policy, resolved, [random_pairs(2)], config, autocast=contextlib.nullcontext)

    for layer in (last + 1, 99):
        with pytest.raises(
            ConfigurationError, match=f"mine: expected a signal of one of the model.s layers, 0 to {last};"
        ):
            check(f"{sequence}.{layer}")
    check(f"{sequence}.{last}")
    check("grad_norm")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alerts:\n  rules:\n    entropy: {entropy_ratio_high: 3}\n", r"alerts\.entropy_ratio_high \(line 3\)"),
        ("alerts:\n  rules: {}\n  kl_warning: 2\n", r"alerts\.kl_warning \(line 3\)"),
        (
            "alerts:\n  kl_warning: 0.5\n  kl_error: 1\n  kl_warning: 0.6\n",
            r"'kl_warning' stands a second time, after line 2; .*\(line 4",
        ),
        (
            "budget: 0.1\nalerts: {}\nbudget: 0.2\n",
            r"'budget' stands a second time, after line 1; expected it once \(line 3",
        ),
        ("alerts:\n  rules:\n    kl: off\n    kl: on\n", r"'kl' stands a second time, after line 3"),
        ("alerts: {kl_warning: 0.5, kl_warning: 0.1}\n", r"'kl_warning' stands a second time, after line 1"),
    ],
)
def test_what_is_wrong_is_said_with_the_line_it_stands_in(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        from_yaml(tmp_path, text)


def test_a_key_may_stand_in_two_mappings_and_an_anchor_be_used_twice(tmp_path: Path) -> None:
    rules = "{a: {signal: grad_norm, above: 1}, b: {signal: loss, above: 1}}"
    text = f"patching: &off {{enabled: false}}\nlow_rank: *off\nalerts:\n  rules: {rules}\n"
    assert not from_yaml(tmp_path, text).low_rank.enabled


@pytest.mark.parametrize("kl", [0.8, 0.9])
def test_a_rule_held_to_a_warning_goes_by_its_limit_of_a_warning(kl: float) -> None:
    """The refusal of a warning's limit beyond an error's says to do this."""
    config = AlertConfig(kl_warning=1.0, rules={"kl_out_of_bounds": RuleOptions(level="warning")})
    record = with_margins(healthy(40), kl=about(kl), chosen_logp_change_per_token=about(-0.2))
    assert sign("kl_out_of_bounds", record, config=config) is None
    beyond = with_margins(healthy(40), kl=about(1.2), chosen_logp_change_per_token=about(-0.2))
    seen = sign("kl_out_of_bounds", beyond, config=config)
    assert seen is not None and (seen.level, seen.limit) == ("warning", 1.0)


@pytest.mark.parametrize("option", [name for name, limit in LIMITS.items() if limit.direction == "below"])
def test_a_limit_that_everything_lies_below_switches_nothing_off(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option):
        AlertConfig(**{option: math.inf})


def test_a_baseline_is_of_no_more_audits_than_are_looked_back_for() -> None:
    assert AlertConfig(baseline_audits=FURTHEST).baseline_audits == FURTHEST
    with pytest.raises(ConfigurationError, match="baseline_audits"):
        AlertConfig(baseline_audits=FURTHEST + 1)


def test_a_wrong_reference_does_not_silence_what_reads_no_model() -> None:
    rules: dict[str, Any] = {
        "norm": {"signal": "grad_norm", "above": 1.0, "level": "error"},
        "slow": {"signal": "cost.seconds", "above": 0.0, "level": "error"},
    }
    wrong = with_part(healthy(20), "reference_check", verdict="failed", reason="its margins differ")
    log = log_of(range(1, 21), grad_norm=5.0)
    made = judge(wrong, judged([healthy(10)]), log, AlertConfig(rules=rules))
    assert {alert.rule for alert in made} == {"reference_mismatch", "norm", "slow"}
