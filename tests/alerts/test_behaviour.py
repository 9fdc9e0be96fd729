"""The policy leaving its language: both sides of each limit, NaN, few pairs, the first audit, the run's own baseline."""

from __future__ import annotations

import math

import pytest

from align_audit.alerts.history import Sign
from align_audit.config import AlertConfig
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import (
    FIRST_LIMITS,
    NAN,
    about,
    alerts,
    healthy,
    judged,
    run,
    sign,
    signs,
    with_margins,
    with_texts,
    without_interval,
)
from tests.helpers.make_record import make_record

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
    seen = sign(
        "chosen_logp_falling", with_margins(healthy(), chosen_logp_change_per_token=change), run(2), FIRST_LIMITS
    )
    assert (seen and seen.level) == level
    if seen:
        assert (seen.value, seen.limit) == (change.mean, threshold)
        assert f"lose {-change.mean:.2f} nats per token" in seen.message


def test_chosen_log_probability_says_whether_the_margin_rises() -> None:
    fallen = with_margins(healthy(), chosen_logp_change_per_token=about(-0.8))
    rising = sign("chosen_logp_falling", with_margins(fallen, shift=Estimate(mean=12.3, low=1.0, high=20.0)))
    assert "while the margin rises by 12.3 nats" in rising.message
    assert "text that is in neither" in rising.message
    falling = sign("chosen_logp_falling", with_margins(fallen, shift=Estimate(mean=12.3, low=-1.0, high=20.0)))
    assert "and the margin does not rise" in falling.message
    assert "12.3" not in falling.message
    falling = sign("chosen_logp_falling", with_margins(fallen, shift=about(-1.0)))
    assert falling.message.endswith("and the margin does not rise.")
    unknown = sign("chosen_logp_falling", with_margins(fallen, shift=Estimate.unknown("a margin is not finite")))
    assert unknown.message.endswith("and whether the margin rises is not known.")


@pytest.mark.parametrize(
    ("low", "level", "threshold"),
    [(0.99, None, None), (1.01, "warning", 1.0), (1.99, "warning", 1.0), (2.01, "error", 2.0)],
)
def test_kl(low: float, level: str | None, threshold: float | None) -> None:
    record = with_margins(healthy(), kl=Estimate(mean=low + 0.5, low=low, high=low + 1))
    seen = sign("kl_out_of_bounds", record, [], FIRST_LIMITS)
    assert ((seen.level, seen.limit) if seen else (None, None)) == (level, threshold)
    if seen:
        assert f"{low + 0.5:.2f} nats per token, above {threshold:g}" in seen.message


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.24, "has collapsed"), (0.27, None), (1.0, None), (1.9, None), (2.1, "has exploded")]
)
def test_entropy(ratio: float, words: str | None) -> None:
    record = with_margins(healthy(), entropy=about(2.0 * ratio), reference_entropy=about(2.0))
    seen = sign("entropy_out_of_bounds", record, config=FIRST_LIMITS)
    assert (seen is not None) == (words is not None)
    if words:
        assert words in seen.message
        assert f"{2 * ratio:.2f} nats per token against the reference's 2.00" in seen.message
        # Value, threshold and baseline are in one unit, so that they can be drawn together.
        assert seen.value == 2.0 * ratio
        assert seen.baseline == 2.0
        assert seen.limit == (0.5 if ratio < 1 else 4.0)
        assert seen.level == "warning"


@pytest.mark.parametrize("ratio", [0.29, 2.1])
def test_entropy_far_out_is_beyond_the_limit_of_an_error(ratio: float) -> None:
    record = with_margins(healthy(), entropy=about(2.0 * ratio), reference_entropy=about(2.0))
    assert sign("entropy_out_of_bounds", record).level == "error"


def test_entropy_of_a_reference_without_any_says_nothing() -> None:
    assert sign("entropy_out_of_bounds", with_margins(healthy(), reference_entropy=about(0.0, 0.0))) is None


@pytest.mark.parametrize(("high", "level"), [(0.199, "error"), (0.201, "warning"), (0.219, "warning"), (0.221, None)])
def test_token_accuracy(high: float, level: str | None) -> None:
    """The whole interval below half of the whole interval of the reference's."""
    record = with_margins(
        healthy(),
        token_accuracy=Estimate(mean=0.1, low=0.0, high=high),
        reference_token_accuracy=Estimate(mean=0.5, low=0.4, high=0.6),
    )
    seen = sign("token_accuracy_collapsed", record, config=FIRST_LIMITS)
    assert (seen and seen.level) == level
    if level == "error":
        assert (seen.value, seen.baseline, seen.limit) == (0.1, 0.5, 0.25)
        assert "10.0%" in seen.message
        assert "50.0%" in seen.message


def test_token_accuracy_of_a_reference_without_any_says_nothing() -> None:
    record = with_margins(healthy(), token_accuracy=about(0.0, 0.0), reference_token_accuracy=about(0.0, 0.0))
    assert sign("token_accuracy_collapsed", record) is None


# -- what is learned moves KL as well ----------------------------------------------------------------------------------------


def moved(kl: float, chosen: float, step: int = 40, **margins: Estimate) -> AuditRecord:
    return with_margins(healthy(step), kl=about(kl), chosen_logp_change_per_token=about(chosen), **margins)


@pytest.mark.parametrize(
    ("kl", "chosen", "level"),
    [
        (0.5, 0.2, None),  # chosen completions have gained: what an SFT term does
        (0.5, -0.02, None),
        (0.5, -0.04, "warning"),
        (0.9, 0.2, "warning"),  # the second limit asks for nothing beside it
    ],
)
def test_kl_up_to_its_second_limit_opens_nothing_where_the_chosen_completions_are_kept(
    kl: float, chosen: float, level: str | None
) -> None:
    found = alerts(moved(kl, chosen), run())
    assert [(alert.rule, alert.level) for alert in found] == ([] if level is None else [("kl_out_of_bounds", level)])


def test_kl_beside_kept_completions_is_a_witness_still() -> None:
    """Repetition beyond its second limit and KL are two families, and an error; by itself it is a warning."""
    repeats = {"repetition": about(0.7)}
    (alone,) = alerts(with_texts(moved(0.1, 0.1), **repeats), run())
    (both,) = alerts(with_texts(moved(0.5, 0.1), **repeats), run())
    assert (alone.level, both.level, both.signals) == ("warning", "error", ["kl_out_of_bounds"])


def test_an_open_alert_of_kl_is_held_by_kl_though_the_completions_come_back() -> None:
    before = judged([*run(), moved(0.5, -0.1, 40)])
    assert [alert.event for alert in alerts(moved(0.5, 0.1, 50), before)] == ["open"]
    assert [alert.event for alert in judged([*before, moved(0.1, 0.1, 50), moved(0.1, 0.1, 60)])[-1].alerts] == [
        "resolved"
    ]


def test_the_fall_that_kl_asks_for_is_an_option() -> None:
    at_any = AlertConfig(rules={"kl": {"kl_chosen_drop": -100}})
    assert [alert.rule for alert in alerts(moved(0.5, 0.2), run(), config=at_any)] == ["kl_out_of_bounds"]
    assert alerts(moved(0.5, -0.1), run(), config=AlertConfig(kl_chosen_drop=0.2)) == []


@pytest.mark.parametrize(
    ("name", "rule", "ruined", "calm"),
    [
        ("kl", "kl_out_of_bounds", 2.5, 0.1),
        ("chosen_logp_change_per_token", "chosen_logp_falling", -1.5, 0.0),
        ("entropy", "entropy_out_of_bounds", 0.05, None),
        ("token_accuracy", "token_accuracy_collapsed", 0.05, None),
    ],
)
def test_too_few_pairs_for_an_interval_go_by_the_mean(name: str, rule: str, ruined: float, calm: float | None) -> None:
    """A model that is ruined is not passed over for want of pairs; one that is not stays unnamed."""
    record = healthy()
    seen = sign(rule, with_margins(record, **{name: without_interval(ruined)}))
    assert seen.few == f"{record.provenance.pairs} pairs"
    assert seen.words.endswith(" pairs, too few for an interval: this goes by the mean alone.)")
    mean = getattr(record.margins, name).mean if calm is None else calm
    assert sign(rule, with_margins(record, **{name: without_interval(mean)})) is None


def test_wide_intervals_raise_nothing() -> None:
    """Few probes: means beyond every limit, intervals that are not."""
    record = with_margins(
        healthy(),
        chosen_logp_change_per_token=Estimate(mean=-2.0, low=-9.0, high=5.0),
        kl=Estimate(mean=3.0, low=0.0, high=9.0),
        entropy=Estimate(mean=0.1, low=0.0, high=5.0),
        token_accuracy=Estimate(mean=0.05, low=0.0, high=0.9),
        accuracy=Estimate(mean=0.3, low=0.0, high=1.0),
        shift=Estimate(mean=-3.0, low=-9.0, high=9.0),
    )
    assert set(signs(record, run(1))) == set()


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
    seen = sign("chosen_logp_falling", chosen(40, now), before, FIRST_LIMITS)
    assert (seen is not None) == fires
    if fires:
        assert seen.level == "warning"
        assert seen.baseline == baseline
        assert seen.value == now
        assert seen.value < seen.limit <= 0
        assert f"{baseline:+.2f}" in seen.message
    assert sign("chosen_logp_falling", chosen(40, now), before[:-1], FIRST_LIMITS) is None, "two audits are no baseline"


def test_the_baseline_is_the_median_of_the_first_healthy_audits() -> None:
    noisy = Alert(rule="kl_out_of_bounds", level="warning", step=10, value=1.0, message="", suggestion="")
    quiet = noisy.model_copy(update={"level": "info"})
    gone = noisy.model_copy(update={"event": "resolved"})
    before = [
        chosen(0, -0.50),  # before training: not of the trained policy
        chosen(10, -0.50).model_copy(update={"alerts": [quiet, noisy]}),  # not healthy
        chosen(20, -0.03).model_copy(update={"alerts": [quiet, gone]}),
        with_margins(healthy(25), chosen_logp_change_per_token=Estimate.unknown("not known")),
        chosen(30, -0.01),
    ]

    def seen(config: AlertConfig = FIRST_LIMITS) -> float | None:
        found = sign("chosen_logp_falling", chosen(60, -0.40), before, config)
        return None if found is None else found.baseline

    assert seen() is None
    before.append(chosen(40, -0.05))
    assert seen() == -0.03
    before.append(chosen(50, -0.35))  # later audits do not move it
    assert seen() == -0.03
    values = FIRST_LIMITS.model_dump()
    assert seen(AlertConfig(**(values | {"baseline_audits": 4}))) == pytest.approx(-0.04)
    assert seen(AlertConfig(**(values | {"baseline_audits": 5}))) is None


def test_an_absolute_limit_goes_before_the_baseline() -> None:
    seen = sign("chosen_logp_falling", chosen(40, -1.5), [chosen(step, -0.05) for step in (10, 20, 30)], FIRST_LIMITS)
    assert (seen.level, seen.limit, seen.baseline) == ("error", -1.2, None)


def at_kl(step: int, kl: float) -> AuditRecord:
    return with_margins(healthy(step), kl=about(kl, 0.001))


def test_a_jump_is_seen_against_the_pace_of_the_run() -> None:
    """Looks lie further and further apart: the pace is what is compared, not the change."""
    steady = [at_kl(step, 0.001 * step) for step in (10, 20, 40, 80)]
    assert sign("sudden_change", at_kl(160, 0.16), steady) is None
    jumped = sign("sudden_change", at_kl(90, 0.3), steady)
    assert (jumped.level, jumped.value, jumped.baseline) == ("warning", 0.3, 0.08)
    assert jumped.limit == pytest.approx(0.08 + 0.5 * 0.35)
    assert "Since step 80" in jumped.message
    assert sign("sudden_change", at_kl(90, 0.3), steady[1:]) is None, "three looks have two changes: no baseline"


def test_a_jump_still_stands_at_the_look_after_it_and_a_peak_does_not() -> None:
    steady = [at_kl(step, 0.001 * step) for step in (10, 20, 40, 80)]
    after = [*steady, at_kl(90, 0.3)]
    assert sign("sudden_change", at_kl(100, 0.31), after) is not None
    assert sign("sudden_change", at_kl(100, 0.1), after) is None


def test_a_jump_to_the_better_is_none() -> None:
    steady = [chosen(step, -0.001 * step) for step in (10, 20, 40, 80)]
    assert sign("sudden_change", chosen(90, 0.5), steady) is None
    assert sign("sudden_change", chosen(90, -0.24), steady).value == -0.24


def test_nothing_is_sudden_where_numbers_are_not_known() -> None:
    steady = [at_kl(step, 0.001 * step) for step in (10, 20, 40, 80)]
    assert sign("sudden_change", at_kl(90, math.nan), steady) is None
    assert sign("sudden_change", at_kl(90, 0.3), [at_kl(step, NAN) for step in (10, 20, 40, 80)]) is None
    for place in range(3):
        partly = [at_kl(step, NAN if at == place else 0.001 * step) for at, step in enumerate((10, 20, 40, 80))]
        assert "nan" not in sign("sudden_change", at_kl(90, 0.3), partly).message


def test_a_jump_of_kl_beside_kept_completions_is_a_witness() -> None:
    """It says no more than KL itself does; one of the chosen log-probability says what it said."""
    steady = [at_kl(step, 0.001 * step) for step in (10, 20, 40, 80)]

    def jumped(kl: float, fall: float, before: list[AuditRecord] = steady) -> Sign:
        record = with_margins(at_kl(90, kl), chosen_logp_change_per_token=about(-fall, 0.001))
        return sign("sudden_change", record, before)

    assert (jumped(0.3, 0.029).weight, jumped(0.3, 0.031).weight) == ("witness", "alone")
    assert (jumped(0.69, -0.5).weight, jumped(0.71, -0.5).weight) == ("witness", "alone"), "up to its second limit"
    fallen = [with_margins(record, chosen_logp_change_per_token=about(0.5, 0.001)) for record in steady]
    both = jumped(0.3, 0.0, fallen)
    assert (both.weight, both.baseline) == ("alone", 0.5), "the chosen log-probability jumped too"
    record = with_margins(at_kl(90, 0.3), chosen_logp_change_per_token=about(0.0, 0.001))
    assert sign("sudden_change", record, steady, eased=frozenset({"jump_deviations"})).weight == "alone", (
        "while it is open"
    )
    falls = [
        with_margins(at_kl(step, 0.3), chosen_logp_change_per_token=about(-fall, 0.001))
        for step, fall in ((90, 0.029), (100, 0.031))
    ]
    assert [record.alerts for record in judged([*steady, *falls])] == [[]] * 6, "a witness is no look in a row"
    falls[0] = with_margins(falls[0], chosen_logp_change_per_token=about(-0.031, 0.001))
    assert [alert.rule for alert in judged([*steady, *falls])[-1].alerts] == ["sudden_change"]
    kept = with_margins(at_kl(90, 0.3), chosen_logp_change_per_token=about(0.0, 0.001))
    stays = [kept, kept.model_copy(update={"step": 100})]
    assert [record.alerts for record in judged([*steady, *stays])] == [[]] * 6
