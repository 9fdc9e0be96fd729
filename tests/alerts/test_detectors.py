"""Every alert rule fires on a record made for it, stays silent on healthy ones, and says what it saw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from align_audit.alerts.detectors import RULES, evaluate
from align_audit.config import AlertConfig
from align_audit.record.audit_record import Alert, AuditRecord, Control, Controls, Estimate
from tests.helpers.make_record import make_record, make_run

NAMES = (
    "non_finite",
    "reference_mismatch",
    "reference_changed",
    "chosen_logp_falling",
    "kl_out_of_bounds",
    "entropy_out_of_bounds",
    "token_accuracy_collapsed",
    "accuracy_falling",
    "additivity_collapsed",
    "coherence_collapsed",
    "control_failed",
)
CONFIG = AlertConfig()
NAN = math.nan

Case = tuple[AuditRecord, list[AuditRecord]]


def about(mean: float, half: float = 0.01) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def healthy(step: int = 100) -> AuditRecord:
    return make_record(step, progress=0.5)


def run(count: int = 3) -> list[AuditRecord]:
    """Audits of a healthy run so far; the first before training."""
    return [make_record(0, progress=0.0), *(healthy(step) for step in range(10, 10 * count + 1, 10))]


def with_margins(record: AuditRecord, **changes: Estimate) -> AuditRecord:
    return record.model_copy(update={"margins": record.margins.model_copy(update=changes)})


def with_part(record: AuditRecord, part: str, **changes: Any) -> AuditRecord:
    return record.model_copy(update={part: getattr(record, part).model_copy(update=changes)})


def with_control(record: AuditRecord, name: str, reason: str = "3 of 64 moved") -> AuditRecord:
    return with_part(record, "controls", **{name: Control(verdict="failed", reason=reason)})


def alerts(record: AuditRecord, before: list[AuditRecord] | None = None, config: AlertConfig = CONFIG) -> list[Alert]:
    return evaluate(record, run() if before is None else before, config)


def only(record: AuditRecord, before: list[AuditRecord] | None = None, config: AlertConfig = CONFIG) -> Alert:
    found = alerts(record, before, config)
    assert len(found) == 1, [alert.rule for alert in found]
    return found[0]


# -- the rules as a whole --------------------------------------------------------------------------------------------------


def test_names_are_stable_and_fit_where_they_are_shown() -> None:
    """Trackers key on these names: renaming one breaks what users built on it."""
    assert tuple(rule.__name__ for rule in RULES) == NAMES
    assert all(len(name) <= 63 and re.fullmatch(r"[a-z_]+", name) for name in NAMES)
    assert all(rule.__doc__ for rule in RULES)


def test_a_healthy_run_raises_nothing() -> None:
    for seed in range(5):
        seen: list[AuditRecord] = []
        for record in make_run("healthy", audits=8, seed=seed):
            assert evaluate(record, seen, CONFIG) == []
            seen.append(record.model_copy(update={"alerts": []}))


def test_a_destabilizing_run_raises_more_and_more() -> None:
    seen: list[AuditRecord] = []
    for record in make_run("destabilizing", audits=11):
        seen.append(record.model_copy(update={"alerts": evaluate(record, seen, CONFIG)}))
    counts = [len(record.alerts) for record in seen]
    assert counts[:5] == [0] * 5
    assert counts[-1] >= 6
    assert {"chosen_logp_falling", "kl_out_of_bounds", "token_accuracy_collapsed"} <= {a.rule for a in seen[-1].alerts}
    levels = [alert.level for alert in seen[-1].alerts]
    assert levels == sorted(levels, key=["error", "warning", "info"].index)
    assert len(set(levels)) == 3


FIRES: dict[str, tuple[Callable[[], Case], str]] = {
    "non_finite": (
        lambda: (with_margins(healthy(), policy=Estimate.unknown("2 of 64 values are not finite")), run()),
        "error",
    ),
    "reference_mismatch": (
        lambda: (
            with_part(healthy(), "reference_check", verdict="failed", reason="the margin shift is 3.2 nats already"),
            run(),
        ),
        "error",
    ),
    "reference_changed": (lambda: (with_part(healthy(), "provenance", reference_hash="f00d" * 4), run()), "error"),
    "chosen_logp_falling": (
        lambda: (with_margins(healthy(), chosen_logp_change_per_token=about(-0.8)), run(2)),
        "warning",
    ),
    "kl_out_of_bounds": (lambda: (with_margins(healthy(), kl=about(2.5)), run()), "error"),
    "entropy_out_of_bounds": (lambda: (with_margins(healthy(), entropy=about(0.2)), run()), "warning"),
    "token_accuracy_collapsed": (lambda: (with_margins(healthy(), token_accuracy=about(0.05)), run()), "error"),
    "accuracy_falling": (lambda: (with_margins(healthy(), accuracy=about(0.6)), run()), "error"),
    "additivity_collapsed": (lambda: (with_part(healthy(), "patching", additivity=about(0.2)), run()), "warning"),
    "coherence_collapsed": (lambda: (with_part(healthy(), "spinal", coherence=0.05), run()), "warning"),
    "control_failed": (lambda: (with_control(healthy(), "noise"), run()), "info"),
}


def test_every_rule_has_a_case() -> None:
    assert tuple(FIRES) == NAMES


@pytest.mark.parametrize("name", FIRES)
def test_the_rule_fires_alone_and_says_what_it_saw(name: str) -> None:
    make, level = FIRES[name]
    record, before = make()
    alert = only(record, before)
    assert (alert.rule, alert.level, alert.step) == (name, level, record.step)
    assert re.search(r"\d", alert.message), alert.message
    assert alert.message[0].isupper()
    assert alert.message[-1] == "."
    assert len(alert.suggestion) > 20
    assert alert.suggestion[-1] != "."
    assert alert.value is not None
    assert (
        AuditRecord.from_json(record.model_copy(update={"alerts": [alert]}).to_json()).alerts[0].message
        == alert.message
    )
    assert alerts(healthy(), before) == []


def test_alerts_can_be_switched_off() -> None:
    record, before = FIRES["kl_out_of_bounds"][0]()
    assert evaluate(record, before, AlertConfig(enabled=False)) == []


def test_the_worst_come_first() -> None:
    record = with_control(healthy(), "noise")
    record = with_part(record, "patching", additivity=about(0.2))
    record = with_margins(record, token_accuracy=about(0.05), entropy=about(0.2))
    assert [(alert.level, alert.rule) for alert in alerts(record)] == [
        ("error", "token_accuracy_collapsed"),
        ("warning", "entropy_out_of_bounds"),
        ("warning", "additivity_collapsed"),
        ("info", "control_failed"),
    ]


def blank(record: AuditRecord) -> AuditRecord:
    """The same record with NaN for every number that can be one."""
    unknown = Estimate.unknown("unknown")

    def emptied(part: Any) -> Any:
        changes: dict[str, Any] = {}
        for name, value in part:
            if isinstance(value, Estimate):
                changes[name] = unknown
            elif isinstance(value, float):
                changes[name] = NAN
            elif isinstance(value, list) and value and isinstance(value[0], Estimate):
                changes[name] = [unknown] * len(value)
            elif isinstance(value, list) and value and isinstance(value[0], float):
                changes[name] = [NAN] * len(value)
        return part.model_copy(update=changes)

    parts = {name: emptied(getattr(record, name)) for name in ("margins", "patching", "spinal", "localization")}
    parts["patching"] = parts["patching"].model_copy(update={"peak_layer": None})
    return record.model_copy(update=parts)


@pytest.mark.parametrize("audits", [0, 1, 4])
@pytest.mark.parametrize("before_too", [False, True])
def test_nan_raises_nothing_but_non_finite(audits: int, before_too: bool) -> None:
    before = run(audits)
    if before_too:
        before = [blank(record) for record in before]
    found = alerts(blank(healthy()), before)
    assert [(alert.rule, alert.level) for alert in found] == [("non_finite", "error")] * 2
    assert all(math.isnan(alert.value) for alert in found)
    assert alerts(healthy(), [blank(record) for record in run(audits)]) == []


def test_parts_that_were_switched_off_raise_nothing() -> None:
    before = [*run(), *(record.model_copy(update={"patching": None, "spinal": None}) for record in run())]
    record = make_record(100, patching=False, localization=False, low_rank=False, spinal=False)
    assert alerts(record, before) == []
    assert [a.rule for a in alerts(with_margins(record, kl=about(1.5)), before)] == ["kl_out_of_bounds"]


@pytest.mark.parametrize(
    ("name", "ruined", "calm"),
    [
        ("kl", 2.5, 0.1), ("chosen_logp_change_per_token", -1.5, 0.0), ("entropy", 0.05, None), ("token_accuracy", 0.05, None),
    ],
)  # fmt: skip
def test_too_few_pairs_for_an_interval_go_by_the_mean(name: str, ruined: float, calm: float | None) -> None:
    """A model that is ruined is not passed over for want of pairs; one that is not stays unnamed."""
    record = healthy()
    few = lambda mean: Estimate(mean=mean, low=math.nan, high=math.nan, reason="found 4")  # noqa: E731
    parts = {"kl": few(0.1)} | {name: few(ruined)}  # no number of so few pairs has an interval
    (alert,) = alerts(with_margins(record, **parts), run())
    assert alert.message.endswith("pairs, too few for an interval: this goes by the mean alone.)")
    mean = getattr(record.margins, name).mean if calm is None else calm
    assert alerts(with_margins(record, **{name: few(mean)}), run()) == []


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_wide_intervals_raise_nothing(rule: Callable[..., Any]) -> None:
    """Few probes: means beyond every limit, intervals that are not."""
    wide = {
        "chosen_logp_change_per_token": Estimate(mean=-2.0, low=-9.0, high=5.0),
        "kl": Estimate(mean=3.0, low=0.0, high=9.0),
        "entropy": Estimate(mean=0.1, low=0.0, high=5.0),
        "token_accuracy": Estimate(mean=0.05, low=0.0, high=0.9),
        "accuracy": Estimate(mean=0.3, low=0.0, high=1.0),
    }
    record = with_part(with_margins(healthy(), **wide), "patching", additivity=Estimate(mean=-1.0, low=-9.0, high=9.0))
    assert rule.__name__ not in [alert.rule for alert in alerts(record)]


# -- non_finite, references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_either_model_may_overflow(value: float) -> None:
    broken = Estimate(mean=value, low=NAN, high=NAN)
    policy = only(with_margins(healthy(), policy=broken))
    reference = only(with_margins(healthy(), reference=broken))
    assert "The policy's preference margin" in policy.message
    assert "The reference's preference margin" in reference.message
    assert str(policy.value) == str(value)
    assert [a.rule for a in alerts(with_margins(healthy(), policy=broken, reference=broken))] == ["non_finite"] * 2
    assert "5 of 64" in only(with_margins(healthy(), policy=Estimate.unknown("5 of 64 values"))).message


def test_the_message_on_a_mismatch_is_the_checks_own_reason() -> None:
    record = with_part(
        healthy(), "reference_check", verdict="failed", reason="its margins differ by 12.5 nats",
        precomputed_margin_difference=12.5,
    )  # fmt: skip
    alert = only(record)
    assert alert.value == 12.5
    assert "the trainer's ref_model" in alert.message
    assert "its margins differ by 12.5 nats." in alert.message
    for verdict in ("passed", "not_run"):
        assert alerts(with_part(record, "reference_check", verdict=verdict)) == []


def test_a_reference_that_moves_is_explained_by_a_synchronization_only() -> None:
    before = run()
    moved = with_part(healthy(), "provenance", reference_hash="beef")
    alert = only(moved, before)
    assert before[-1].provenance.reference_hash in alert.message
    assert "beef" in alert.message
    assert "step 30" in alert.message
    assert alerts(with_part(moved, "reference_check", last_sync_step=40), before) == []
    synchronized = [*before, with_part(moved, "reference_check", last_sync_step=40)]
    assert alerts(with_part(moved, "reference_check", last_sync_step=40), synchronized) == []
    later = with_part(with_part(healthy(), "provenance", reference_hash="cafe"), "reference_check", last_sync_step=40)
    assert only(later, synchronized).rule == "reference_changed"
    assert alerts(moved, []) == []


# -- absolute limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "level", "threshold"),
    [
        (-0.90, -0.61, "warning", -0.6),
        (-0.90, -0.59, None, None),
        (-2.00, -1.19, "warning", -0.6),
        (-2.00, -1.21, "error", -1.2),
        (0.50, 0.90, None, None),
    ],
)
def test_chosen_log_probability(low: float, high: float, level: str | None, threshold: float | None) -> None:
    change = Estimate(mean=(low + high) / 2, low=low, high=high)
    found = alerts(with_margins(healthy(), chosen_logp_change_per_token=change), run(2))
    assert [alert.level for alert in found] == ([level] if level else [])
    if level:
        assert (found[0].value, found[0].threshold) == (change.mean, threshold)
        assert f"lose {-change.mean:.2f} nats per token" in found[0].message


def test_chosen_log_probability_says_whether_the_margin_rises() -> None:
    fallen = with_margins(healthy(), chosen_logp_change_per_token=about(-0.8))
    rising = only(with_margins(fallen, shift=Estimate(mean=12.3, low=1.0, high=20.0)))
    assert "while the margin rises by 12.3 nats" in rising.message
    assert "text that is in neither" in rising.message
    falling = only(with_margins(fallen, shift=Estimate(mean=12.3, low=-1.0, high=20.0)))
    assert "and the margin does not rise" in falling.message
    assert "12.3" not in falling.message


@pytest.mark.parametrize(
    ("low", "level", "threshold"),
    [(0.99, None, None), (1.01, "warning", 1.0), (1.99, "warning", 1.0), (2.01, "error", 2.0)],
)
def test_kl(low: float, level: str | None, threshold: float | None) -> None:
    found = alerts(with_margins(healthy(), kl=Estimate(mean=low + 0.5, low=low, high=low + 1)))
    assert [(alert.level, alert.threshold) for alert in found] == ([(level, threshold)] if level else [])
    if level:
        assert f"{low + 0.5:.2f} nats per token, above {threshold:g}" in found[0].message


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.24, "has collapsed"), (0.27, None), (1.0, None), (1.9, None), (2.1, "has exploded")]
)
def test_entropy(ratio: float, words: str | None) -> None:
    record = with_margins(healthy(), entropy=about(2.0 * ratio), reference_entropy=about(2.0))
    found = alerts(record)
    assert len(found) == (words is not None)
    if words:
        assert words in found[0].message
        assert f"{2 * ratio:.2f} nats per token against the reference's 2.00" in found[0].message
        # Value, threshold and baseline are in one unit, so that they can be drawn together.
        assert found[0].value == 2.0 * ratio
        assert found[0].baseline == 2.0
        assert found[0].threshold == (0.5 if ratio < 1 else 4.0)


def test_entropy_of_a_reference_without_any_says_nothing() -> None:
    assert alerts(with_margins(healthy(), reference_entropy=about(0.0, 0.0))) == []


@pytest.mark.parametrize(("high", "fires"), [(0.199, True), (0.201, False)])
def test_token_accuracy(high: float, fires: bool) -> None:
    """The whole interval below half of the whole interval of the reference's."""
    record = with_margins(
        healthy(),
        token_accuracy=Estimate(mean=0.1, low=0.0, high=high),
        reference_token_accuracy=Estimate(mean=0.5, low=0.4, high=0.6),
    )
    found = alerts(record)
    assert len(found) == fires
    if fires:
        assert (found[0].value, found[0].baseline, found[0].threshold) == (0.1, 0.5, 0.25)
        assert "10.0%" in found[0].message
        assert "50.0%" in found[0].message


def test_limits_come_from_the_configuration() -> None:
    config = AlertConfig(
        chosen_drop_warning=0.1, chosen_drop_error=0.2, kl_warning=0.01, kl_error=0.02, entropy_ratio_low=0.9,
        token_accuracy_ratio_error=0.99, accuracy_drop_warning=0.01, accuracy_drop_error=0.02, additivity_warning=0.99,
        coherence_drop_warning=0.01,
    )  # fmt: skip
    record = with_margins(
        healthy(), chosen_logp_change_per_token=about(-0.25), kl=about(0.04), entropy=about(1.5, 0.001),
        reference_entropy=about(1.92, 0.001), token_accuracy=about(0.40), reference_token_accuracy=about(0.46),
        accuracy=about(0.85),
    )  # fmt: skip
    record = with_part(
        with_part(record, "patching", additivity=about(0.9)), "spinal", coherence=0.9 * record.spinal.coherence
    )
    before = [with_margins(one, accuracy=about(0.9)) for one in run(2)]
    assert alerts(record, before) == []
    assert {alert.rule: alert.level for alert in alerts(record, before, config)} == {
        "chosen_logp_falling": "error",
        "kl_out_of_bounds": "error",
        "entropy_out_of_bounds": "warning",
        "token_accuracy_collapsed": "error",
        "accuracy_falling": "error",
        "additivity_collapsed": "warning",
        "coherence_collapsed": "warning",
    }


# -- against the run itself ------------------------------------------------------------------------------------------------


def chosen(step: int, mean: float, half: float = 0.01) -> AuditRecord:
    return with_margins(healthy(step), chosen_logp_change_per_token=about(mean, half))


@pytest.mark.parametrize(
    ("baseline", "now", "fires"),
    [
        (-0.05, -0.37, True),  # below both three times the baseline and the baseline less 0.3
        (-0.05, -0.33, False),  # three times, but not 0.3 lower
        (-0.18, -0.52, False),  # 0.3 lower, but not three times
        (-0.18, -0.56, True),
        (0.10, -0.22, True),
        (0.50, 0.10, False),  # lower than it was, yet still likelier than under the reference
        (0.50, -0.02, True),
    ],
)
def test_chosen_log_probability_against_the_runs_own_baseline(baseline: float, now: float, fires: bool) -> None:
    before = [make_record(0, progress=0.0), *(chosen(step, baseline) for step in (10, 20, 30))]
    found = alerts(chosen(40, now), before)
    assert len(found) == fires
    if fires:
        assert (found[0].rule, found[0].level) == ("chosen_logp_falling", "warning")
        assert found[0].baseline == baseline
        assert found[0].value == now
        assert found[0].value < found[0].threshold <= 0
        assert f"{baseline:+.2f}" in found[0].message
    assert alerts(chosen(40, now), before[:-1]) == [], "two healthy audits are no baseline"


def test_the_baseline_is_the_median_of_the_first_healthy_audits() -> None:
    noisy = Alert(rule="kl_out_of_bounds", level="warning", step=10, value=1.0, message="", suggestion="")
    quiet = noisy.model_copy(update={"level": "info"})
    before = [
        chosen(0, -0.50),  # before training: not of the trained policy
        chosen(10, -0.50).model_copy(update={"alerts": [quiet, noisy]}),  # not healthy
        chosen(20, -0.03).model_copy(update={"alerts": [quiet]}),
        with_margins(healthy(25), chosen_logp_change_per_token=Estimate.unknown("not known")),
        chosen(30, -0.01),
    ]
    assert alerts(chosen(60, -0.40), before) == []
    before.append(chosen(40, -0.05))
    assert only(chosen(60, -0.40), before).baseline == -0.03
    before.append(chosen(50, -0.35))  # later audits do not move it
    assert only(chosen(60, -0.40), before).baseline == -0.03
    assert only(chosen(60, -0.40), before, AlertConfig(baseline_audits=4)).baseline == pytest.approx(-0.04)
    assert alerts(chosen(60, -0.40), before, AlertConfig(baseline_audits=5)) == []


def test_an_absolute_limit_goes_before_the_baseline() -> None:
    alert = only(chosen(40, -1.5), [chosen(step, -0.05) for step in (10, 20, 30)])
    assert (alert.level, alert.threshold, alert.baseline) == ("error", -1.2, None)


@pytest.mark.parametrize(
    ("now", "level", "threshold"),
    [(0.85, None, None), (0.78, "warning", 0.8), (0.66, "warning", 0.8), (0.64, "error", 0.65)],
)
def test_accuracy_against_its_best(now: float, level: str | None, threshold: float | None) -> None:
    before = [with_margins(healthy(step), accuracy=about(value)) for step, value in ((10, 0.7), (20, 0.9), (30, 0.8))]
    found = alerts(with_margins(healthy(), accuracy=about(now)), before)
    assert [alert.level for alert in found] == ([level] if level else [])
    if level:
        assert (found[0].value, found[0].baseline) == (now, 0.9)
        assert found[0].threshold == pytest.approx(threshold)
        assert f"{now:.0%}, down from 90% at step 20" in found[0].message
        assert "checkpoint at step 20" in found[0].suggestion


def test_accuracy_before_training_is_no_best() -> None:
    before = [with_margins(make_record(0, progress=0.0), accuracy=about(0.99))]
    assert alerts(with_margins(healthy(), accuracy=about(0.5)), before) == []


def test_accuracy_needs_intervals_that_are_apart() -> None:
    before = [with_margins(healthy(10), accuracy=Estimate(mean=0.9, low=0.7, high=1.0))]
    assert alerts(with_margins(healthy(), accuracy=about(0.71)), before) == []
    assert only(with_margins(healthy(), accuracy=about(0.68)), before).rule == "accuracy_falling"


@pytest.mark.parametrize(("baseline", "limit"), [(None, 0.4), (0.95, 0.4), (0.5, 0.3)])
def test_additivity(baseline: float | None, limit: float) -> None:
    before = [with_part(healthy(step), "patching", additivity=about(baseline or 0.5)) for step in (10, 20, 30)]
    before = before if baseline else before[:2]
    below = only(with_part(healthy(), "patching", additivity=about(limit - 0.02)), before)
    assert below.threshold == pytest.approx(limit)
    assert below.baseline == baseline
    assert f"Additivity is {limit - 0.02:.2f}" in below.message
    assert alerts(with_part(healthy(), "patching", additivity=about(limit + 0.02)), before) == []


@pytest.mark.parametrize("drop", [0.5, 0.3])
def test_coherence(drop: float) -> None:
    """Against the reference's until the run has a baseline of its own."""
    config = AlertConfig(coherence_drop_warning=drop)
    limit = (1 - drop) * 0.8

    def record(value: float, reference: float, step: int = 40) -> AuditRecord:
        return with_part(healthy(step), "spinal", coherence=value, reference_coherence=reference)

    early = only(record(limit - 0.01, 0.8), [], config)
    assert "the reference's 0.80" in early.message
    assert f"less than {1 - drop:.0%} of" in early.message
    assert (early.baseline, early.layers) == (0.8, healthy().spinal.terminal_layers)
    assert early.threshold == pytest.approx(limit)
    assert alerts(record(limit + 0.01, 0.8), [], config) == []

    before = [record(0.8, 0.2, step) for step in (10, 20, 30)]
    late = only(record(limit - 0.01, 0.2), before, config)
    assert "this run's own first 0.80" in late.message
    assert late.baseline == 0.8
    assert alerts(record(limit + 0.01, 0.99), before, config) == []
    assert alerts(record(limit - 0.01, NAN), [], config) == []


# -- controls --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(Controls.model_fields))
def test_each_control_is_told_with_what_it_guards(name: str) -> None:
    alert = only(with_control(healthy(), name, "4 of 12 layers"))
    assert alert.level == ("error" if name == "identity" else "info")
    assert (alert.value, alert.threshold) == (1.0, 0.0)
    assert f"{name.replace('_', ' ')}: 4 of 12 layers." in alert.message
    assert alert.layers == [healthy().patching.peak_layer]
    unrun = with_part(healthy(), "controls", **{name: Control(verdict="not_run", reason="no shift")})
    assert alerts(unrun) == []


def test_failed_controls_are_told_together() -> None:
    record = with_control(with_control(healthy(), "noise", "2 draws overlap"), "split_half", "40% agree")
    alert = only(record)
    assert (alert.level, alert.value) == ("info", 2.0)
    assert "the patching effects and recovery, the peak layer" in alert.message
    assert "noise: 2 draws overlap; split half: 40% agree" in alert.message
    assert only(with_part(record, "patching", peak_layer=None)).layers == []
    assert only(with_control(record, "identity")).level == "error"


def test_alerts_of_level_info_do_not_spoil_a_baseline_and_others_do() -> None:
    informed = [with_control(chosen(step, -0.05), "noise") for step in (10, 20, 30)]
    informed = [record.model_copy(update={"alerts": alerts(record, [])}) for record in informed]
    assert [record.alerts[0].level for record in informed] == ["info"] * 3
    assert only(chosen(40, -0.4), informed).baseline == -0.05
    spoiled = [with_margins(record, kl=about(1.5)) for record in informed]
    spoiled = [record.model_copy(update={"alerts": alerts(record, [])}) for record in spoiled]
    assert alerts(chosen(40, -0.4), spoiled) == []
