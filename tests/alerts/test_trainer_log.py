"""Rules of the trainer's own log: both sides of the limits, windows, NaN, logs that are short, sparse or odd."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.detectors import LOG_DETECTORS, suspect
from align_audit.alerts.history import View
from align_audit.config import AlertConfig
from align_audit.record.training_log import LogRow
from tests.helpers.alert_cases import (
    CONFIG,
    NAN,
    about,
    alerts,
    healthy,
    judged,
    log_of,
    log_sign,
    run,
    with_margins,
)

LN_2 = math.log(2)
CALM: dict[str, float] = {
    "loss": 0.5, "grad_norm": 1.0, "entropy": 2.0, "mean_token_accuracy": 0.5, "logps/chosen": -100.0,
    "rewards/accuracies": 0.7, "rewards/margins": 0.3, "learning_rate": 1e-5,
}  # fmt: skip


def calm(last: int, every: int = 1, **changes: float) -> list[LogRow]:
    """A healthy log up to a step; ``changes`` hold in its last 16 steps."""
    late = CALM | {name.replace("__", "/"): value for name, value in changes.items()}
    return [LogRow(step, late if step > last - 16 else CALM) for step in range(every, last + 1, every)]


@pytest.mark.parametrize("rule", LOG_DETECTORS)
@pytest.mark.parametrize("every", [1, 10])
def test_a_calm_log_raises_nothing(rule: str, every: int) -> None:
    for last in (every, 10, 40, 200):
        assert log_sign(rule, calm(last, every)) is None
    assert log_sign(rule, []) is None
    assert log_sign(rule, log_of(range(1, 100), learning_rate=1e-5)) is None


@pytest.mark.parametrize(
    ("logs", "fires"),
    [
        ({"loss": NAN}, True),
        ({"loss": math.inf}, True),
        ({"loss": 0.0, "grad_norm": 0.0}, True),
        ({"loss": 0.0, "grad_norm": NAN}, True),
        ({"loss": 0.0, "grad_norm": 1e-9}, False),
        ({"loss": 0.0}, False),
        ({"loss": 0.0, "grad_norm": 0.0, "rewards/margins": 0.0}, True),
        ({"loss": 0.0, "grad_norm": 0.0, "rewards/margins": NAN}, True),
        ({"loss": 0.0, "grad_norm": 0.0, "rewards/margins": 1.2}, False),  # hinge: every pair is beyond its margin
        ({"loss": 0.0, "grad_norm": NAN, "rewards/margins": 1.2}, True),
        ({"loss": 1e-9, "grad_norm": 0.0}, False),
        ({"loss": 0.5, "grad_norm": NAN}, False),
    ],
)
def test_numbers_that_overflow(logs: dict[str, float], fires: bool) -> None:
    rows = [*(LogRow(step, CALM) for step in range(1, 4)), LogRow(4, logs)]
    seen = log_sign("log_not_finite", rows)
    assert (seen is not None) == fires
    if seen:
        assert seen.level == "error"


def test_single_gradients_that_overflow_are_left_out_by_fp16() -> None:
    rows = [LogRow(step, {"loss": 0.5, "grad_norm": math.inf}) for step in (1, 2)]
    assert log_sign("log_not_finite", rows) is None
    assert log_sign("log_not_finite", [*rows, LogRow(3, {"loss": 0.5, "grad_norm": NAN})]) is not None


@pytest.mark.parametrize(
    ("rule", "column", "inside", "outside"),
    [
        ("log_chosen_falling", "logps/chosen", -129.0, -131.0),
        ("log_entropy", "entropy", 1.01, 0.99),
        ("log_entropy", "entropy", 2.99, 3.01),
        ("log_token_accuracy", "mean_token_accuracy", 0.36, 0.34),
    ],
)
def test_columns_against_their_start(rule: str, column: str, inside: float, outside: float) -> None:
    name = column.replace("/", "__")
    assert log_sign(rule, calm(100, **{name: inside})) is None
    seen = log_sign(rule, calm(100, **{name: outside}))
    assert seen.value == pytest.approx(outside)
    assert seen.baseline == pytest.approx(CALM[column])
    assert min(seen.baseline, seen.value) < seen.limit < max(seen.baseline, seen.value)
    assert log_sign(rule, calm(100, **{name: NAN})) is None
    assert log_sign(rule, calm(31, **{name: outside})) is None, "start and end are not apart yet"


def test_an_evaluation_goes_before_the_training_pairs() -> None:
    rows = calm(40)
    rows[20:20] = [LogRow(20, {"eval_logps/chosen": -100.0})]
    rows.append(LogRow(40, {"eval_logps/chosen": -131.0}))
    assert log_sign("log_chosen_falling", rows).value == -131.0
    rows[-1] = LogRow(40, {"eval_logps/chosen": -129.0})
    assert log_sign("log_chosen_falling", rows) is None


@pytest.mark.parametrize(
    ("spikes", "norm", "fires"), [(2, 10.1, True), (1, 10.1, False), (2, 9.9, False), (2, NAN, False)]
)
def test_gradient_spikes(spikes: int, norm: float, fires: bool) -> None:
    rows = calm(100)
    for place in range(spikes):
        rows[-1 - 3 * place] = LogRow(rows[-1 - 3 * place].step, CALM | {"grad_norm": norm})
    seen = log_sign("log_gradient_spike", rows)
    assert (seen is not None) == fires
    if seen:
        assert (seen.value, seen.baseline, seen.limit) == (norm, 1.0, 10.0)


@pytest.mark.parametrize(
    ("accuracy", "margin", "fires"), [(0.49, -0.1, True), (0.51, -0.1, False), (0.49, 0.1, False), (NAN, -0.1, False)]
)
def test_ranked_worse_than_by_chance(accuracy: float, margin: float, fires: bool) -> None:
    assert (
        log_sign("log_accuracy", calm(100, rewards__accuracies=accuracy, rewards__margins=margin)) is not None
    ) == fires
    assert log_sign("log_accuracy", calm(15, rewards__accuracies=accuracy, rewards__margins=margin)) is None, (
        "too early"
    )


# A healthy run on a language model of 270M parameters, slow at first: step by step, of eight pairs each.
SLOW_START = {
    "rewards/accuracies": [
        0.0, 0.25, 0.75, 0.5, 0.625, 0.5, 0.5, 0.625, 0.375, 0.25, 0.625, 0.5, 0.625, 0.5, 0.75, 0.375, 0.75, 0.75, 0.625, 0.75,
        0.75, 0.625, 0.75, 0.5, 0.5, 0.625,
    ],
    "rewards/margins": [
        0.0, -0.018, 0.049, 0.028, 0.012, 0.049, -0.052, 0.024, -0.111, -0.049, -0.069, 0.017, 0.047, -0.009, 0.079, -0.052,
        0.092, 0.111, 0.103, 0.168, 0.063, 0.09, 0.264, -0.022, 0.028, 0.222,
    ],
}  # fmt: skip


def slow_start(steps: int, **without: None) -> list[LogRow]:
    columns = {name: values for name, values in SLOW_START.items() if name not in without}
    return [LogRow(step, {name: values[step - 1] for name, values in columns.items()}) for step in range(1, steps + 1)]


@pytest.mark.parametrize("without", [{}, {"rewards/margins": None}], ids=["margins", "accuracy alone"])
@pytest.mark.parametrize("max_steps", [26, 500, None])
def test_a_run_that_has_learned_nothing_yet_ranks_as_by_chance(max_steps: int | None, without: dict[str, None]) -> None:
    log = slow_start(26, **without)
    means = [fmean(row.logs["rewards/accuracies"] for row in log[end - 16 : end]) for end in range(16, 27)]
    assert min(means) < 0.5, "below the limit, by chance"
    for end in range(1, 27):
        assert log_sign("log_accuracy", log[:end], max_steps=max_steps) is None, end


def waver(last: int, every: int = 1, margin: float = -0.01, spread: float = 0.1) -> list[LogRow]:
    """Pairs ranked a bit worse than by chance, by margins that lie around a mean."""
    return [
        LogRow(step, {"rewards/accuracies": 0.45, "rewards/margins": margin - spread * (-1) ** (step // every)})
        for step in range(every, last + 1, every)
    ]


@pytest.mark.parametrize(
    ("log", "max_steps", "fires"),
    [
        (waver(40), 400, False),
        (waver(40, margin=-0.2), 400, True),
        (waver(40, spread=0.0), 400, True),
        (waver(114), 400, False),
        (waver(115), 400, True),
        (waver(64), None, False),
        (waver(65), None, True),
        (waver(20, every=10, margin=-0.2), 400, False),
        (waver(40, every=10, margin=-0.2), 400, False),
        (waver(40, every=10, margin=-1.0), 400, True),
    ],
    ids=[
        "by chance", "reliably", "all alike", "begins before a quarter of the run", "lies behind it", "behind 50 steps not yet",
        "behind 50 steps", "two rows", "three rows that waver", "three rows",
    ],
)  # fmt: skip
def test_worse_than_by_chance_has_to_be_reliable_until_something_should_be_learned(
    log: list[LogRow], max_steps: int | None, fires: bool
) -> None:
    assert (log_sign("log_accuracy", log, max_steps=max_steps) is not None) == fires


def test_an_open_alert_of_accuracy_holds_by_the_means() -> None:
    curve = TrainerLog(waver(40))
    view = View(step=40, config=CONFIG, log=curve, max_steps=400, eased=frozenset({"log_accuracy_low"}))
    assert LOG_DETECTORS["log_accuracy"](view) is not None
    assert LOG_DETECTORS["log_accuracy"](replace(view, log=TrainerLog(waver(40, margin=0.01)))) is None


@pytest.mark.parametrize(
    ("logs", "fires"),
    [
        ({"loss": LN_2, "rewards/margins": 0.0}, True),
        ({"loss": LN_2 + 5e-4, "rewards/margins": 5e-4}, True),
        ({"loss": LN_2 + 2e-3, "rewards/margins": 0.0}, False),
        ({"loss": LN_2, "rewards/margins": 2e-3}, False),
        ({"loss": LN_2}, False),
        ({"loss": NAN, "rewards/margins": 0.0}, False),
        ({"loss": 1.0, "rewards/margins": 0.0, "grad_norm": 0.0}, True),
        ({"loss": 1e-9, "rewards/margins": 9.0, "grad_norm": 0.0}, False),
    ],
)
def test_a_loss_that_is_stuck(logs: dict[str, float], fires: bool) -> None:
    rows = [LogRow(step, logs) for step in range(1, 61)]
    assert (log_sign("log_stuck", rows) is not None) == fires


def test_a_loss_at_ln_2_is_no_sign_before_the_run_has_begun() -> None:
    rows = log_of(range(1, 31), loss=LN_2, rewards__margins=0.0)
    assert log_sign("log_stuck", rows) is None
    assert log_sign("log_stuck", rows, max_steps=100) is not None
    assert log_sign("log_stuck", rows, max_steps=1000) is None


@pytest.mark.parametrize(
    ("loss", "accuracy", "fires"), [(0.009, 1.0, True), (0.011, 1.0, False), (0.009, 0.9, False), (NAN, 1.0, False)]
)
def test_a_loss_that_is_used_up(loss: float, accuracy: float, fires: bool) -> None:
    assert (log_sign("log_saturated", calm(100, loss=loss, rewards__accuracies=accuracy)) is not None) == fires


def test_a_loss_of_0_without_gradients_is_not_called_used_up() -> None:
    nothing = {"loss": 0.0, "grad_norm": 0.0, "rewards__accuracies": 1.0}
    assert log_sign("log_saturated", calm(100, **nothing, rewards__margins=0.0)) is None
    assert log_sign("log_saturated", calm(100, **nothing, rewards__margins=1.2)) is not None


# -- what becomes of them --------------------------------------------------------------------------------------------------


def test_the_log_alone_is_a_suspicion() -> None:
    suspicions = suspect(calm(100, entropy=0.5, logps__chosen=-140.0), CONFIG)
    assert [(each.rule, each.step) for each in suspicions] == [("log_chosen_falling", 100), ("log_entropy", 100)]
    assert "started at 2.00" in suspicions[1].message
    assert suspect(calm(100), CONFIG) == suspect([], CONFIG) == []
    assert suspect(calm(100, entropy=0.5), AlertConfig(enabled=False)) == []
    assert suspect(calm(100, entropy=0.5), AlertConfig(rules={"log_entropy": "off"})) == []


def test_asking_at_every_step_does_not_read_the_whole_log() -> None:
    class Counted(list[Any]):
        read = 0

        def __getitem__(self, place: Any) -> Any:
            part = super().__getitem__(place)
            Counted.read += len(part) if isinstance(place, slice) else 1
            return part

        def __iter__(self) -> Any:
            for row in super().__iter__():
                Counted.read += 1
                yield row

    def cost(last: int) -> int:
        rows = Counted(calm(last))
        Counted.read = 0
        suspect(rows, CONFIG)
        return Counted.read

    assert 0 < cost(10_000) == cost(20_000) < 30_000


def test_an_audit_confirms_or_clears_what_the_log_suggests() -> None:
    log = calm(100, entropy=0.5)
    assert alerts(healthy(100), log=log) == [], "seen at one look, and the audit sees nothing"
    (alert,) = alerts(with_margins(healthy(100), entropy=about(0.9)), log=log)
    assert (alert.rule, alert.signals, alert.level) == ("entropy_out_of_bounds", ["log_entropy"], "warning")
    (alert,) = alerts(with_margins(healthy(100), entropy=about(0.4)), log=log)
    assert alert.level == "error", "beyond its second limit, and the log agrees"


def test_what_the_log_says_at_two_looks_is_a_warning() -> None:
    log = calm(120, entropy=0.5) + [LogRow(step, CALM | {"entropy": 0.5}) for step in range(121, 131)]
    records = judged([*run(), healthy(120), healthy(130)], log=log)
    assert [[alert.rule for alert in record.alerts] for record in records[-2:]] == [[], ["log_entropy"]]


def test_overflow_in_the_log_is_an_error_at_once_and_silences_nothing() -> None:
    log = [LogRow(step, {"loss": NAN}) for step in range(1, 101)]
    found = alerts(with_margins(healthy(100), kl=about(2.5)), log=log)
    assert [(alert.cause, alert.level) for alert in found] == [("numbers", "error"), ("drift", "warning")]


def test_rows_after_an_audit_do_not_count() -> None:
    log = [*calm(100), LogRow(101, {"loss": NAN})]
    assert alerts(healthy(100), log=log) == []
    assert [alert.cause for alert in alerts(healthy(101), log=log)] == ["numbers"]


def test_never_started_is_an_error_where_log_and_audit_agree() -> None:
    log = log_of(range(1, 101), loss=LN_2, rewards__margins=0.0, grad_norm=0.0)
    still = with_margins(healthy(100), kl=about(0.0, 0.0), shift=about(0.0, 0.1))
    (alert,) = alerts(
        still.model_copy(update={"reference_check": still.reference_check.model_copy(update={"same_weights": True})}),
        log=log,
    )
    assert (alert.cause, alert.level, alert.signals) == ("learning", "error", ["log_stuck"])
    (alert,) = alerts(still, log=log)
    assert alert.level == "warning"
