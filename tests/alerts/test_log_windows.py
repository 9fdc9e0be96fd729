"""Windows of the trainer's log: however often it logs and whatever else it logs between, what is seen stays seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.detectors import LOG_DETECTORS
from align_audit.config import AlertConfig
from align_audit.record.training_log import LogRow
from tests.helpers.alert_cases import NAN, log_sign

CALM: dict[str, float] = {
    "loss": 0.5, "grad_norm": 1.0, "entropy": 2.0, "mean_token_accuracy": 0.5, "logps/chosen": -100.0,
    "rewards/accuracies": 0.7, "rewards/margins": 0.3,
}  # fmt: skip
LATE: dict[str, dict[str, float]] = {
    "log_chosen_falling": {"logps/chosen": -140.0},
    "log_entropy": {"entropy": 0.5},
    "log_token_accuracy": {"mean_token_accuracy": 0.2},
    "log_accuracy": {"rewards/accuracies": 0.2, "rewards/margins": -1.0},
    "log_stuck": {"grad_norm": 0.0, "rewards/margins": 0.0},
    "log_saturated": {"loss": 1e-4, "rewards/accuracies": 1.0},
}
"""What goes wrong for good, by the rule that sees it."""
EVERY = (1, 5, 10, 16, 25, 50, 100)
SINCE = 2000


def prefixes(every: int, late: dict[str, float], last: int = 3000) -> Iterator[list[LogRow]]:
    """A log up to each of its late rows; evaluations of another column come at steps of their own."""
    training = {step: CALM | (late if step > SINCE else {}) for step in range(every, last + 1, every)}
    evaluations = {step: {"eval_runtime": 1.0} for step in range(37, last + 1, 37)}
    rows = sorted(
        (LogRow(step, logs) for rows in (training, evaluations) for step, logs in rows.items()), key=lambda row: row.step
    )  # fmt: skip
    starts = range(next(place for place, row in enumerate(rows) if row.step > SINCE), len(rows), max(1, 20 // every))
    return (rows[: end + 1] for end in starts)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("rule", LATE)
def test_what_went_wrong_for_good_is_seen_from_some_row_on(rule: str, every: int) -> None:
    seen = [log_sign(rule, rows) is not None for rows in prefixes(every, LATE[rule])]
    assert seen[-1]
    assert all(seen[seen.index(True) :]), "it must not flicker"


@pytest.mark.parametrize("every", EVERY)
def test_two_spikes_are_seen_however_rarely_gradients_are_logged(every: int) -> None:
    calm = [LogRow(step, CALM) for step in range(every, 60 * every + 1, every)]
    spikes = [LogRow((60 + place) * every, CALM | {"grad_norm": 50.0}) for place in (1, 2)]
    seen = log_sign("log_gradient_spike", [*calm, *spikes])
    assert seen is not None
    assert f"to {62 * every}, up to 50; its median before is 1." in seen.message
    assert log_sign("log_gradient_spike", [*calm, spikes[0]]) is None
    evaluated = LogRow(62 * every, {"eval_loss": 0.5})
    assert log_sign("log_gradient_spike", [*calm, *spikes, evaluated]) == seen


def test_a_window_is_the_column_s_own() -> None:
    rows = [LogRow(step, {"loss": float(step)}) for step in range(10, 101, 10)]
    assert TrainerLog(rows).window("loss", 16) == [90.0, 100.0]
    assert TrainerLog([*rows, LogRow(107, {"eval_loss": 1.0})]).window("loss", 16) == [90.0, 100.0]
    assert TrainerLog(rows).window_rows("loss", 16, least=3) == [(80, 80.0), (90, 90.0), (100, 100.0)]
    gone = [*rows, *(LogRow(step, {"eval_loss": 1.0}) for step in range(105, 125, 5))]
    assert TrainerLog(gone).window("loss", 16) is None, "the column is not logged any more"
    assert TrainerLog(rows).window("entropy", 16) is None
    assert TrainerLog(rows[:1]).window("loss", 16) is None, "it is not so old yet"


COLUMNS = sorted({column for logs in (CALM, *LATE.values()) for column in logs})


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("case", [{}, *LATE.values()], ids=["calm", *LATE])
def test_no_rule_says_a_number_that_is_none(column: str, case: dict[str, float]) -> None:
    """In whichever place of a window it stands: that numbers overflow is for one rule to say."""
    for number, place in itertools.product((NAN, math.inf, -math.inf), (-1, -2, -9, 3)):
        rows = [LogRow(step, CALM | (case if step > 100 else {})) for step in range(1, 201)]
        rows[place] = LogRow(rows[place].step, rows[place].logs | {column: number})
        for rule in LOG_DETECTORS.keys() - {"log_not_finite", "log_gradient_spike"}:
            seen = log_sign(rule, rows, AlertConfig())
            if seen is not None:
                assert math.isfinite(seen.value)
                assert "nan" not in seen.message and "inf" not in seen.message, seen.message
