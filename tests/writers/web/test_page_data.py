"""What a page says of a run, as plain values: status, panels and their limits, alerts; of any run at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_audit.config import AlertConfig
from align_audit.record.alert import Alert
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow
from align_audit.writers.brief import figures_in_words, what_to_do
from align_audit.writers.standing import standing_at
from align_audit.writers.web.health_panels import thinned_points, training_curves
from align_audit.writers.web.json_values import lines, number, text
from align_audit.writers.web.page_data import page_data
from tests.helpers.alert_cases import health, on_set
from tests.helpers.make_record import make_record
from tests.helpers.pages import (
    FAILED,
    HOSTILE,
    as_run,
    failed_run,
    first,
    harmless,
    health_run,
    healthy_run,
    hostile_run,
    large_run,
    panel,
    ruined_run,
    sets_run,
    strings,
    unknown_run,
)
from tests.helpers.screens import a_run, calm, later_on

STORED = sorted((Path(__file__).parents[2] / "record" / "data").glob("*.records.jsonl"))
RUNS: list[Callable[[], AuditRun]] = [
    healthy_run, ruined_run, hostile_run, unknown_run, health_run, failed_run, sets_run, lambda: as_run([]),
    lambda: as_run([make_record(0, progress=0.0)]), lambda: as_run([make_record(5, layers=1)]),
    *(lambda path=path: AuditRun.load(path) for path in STORED),  # type: ignore[misc]
]  # fmt: skip
NAMES = [
    "healthy", "ruined", "hostile", "unknown", "health", "failed", "sets", "none", "start", "one layer",
    *(path.name for path in STORED),
]  # fmt: skip


# --- any run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", RUNS, ids=NAMES)
def test_of_any_run_there_is_plain_json_without_control_characters(make: Callable[[], AuditRun]) -> None:
    data = page_data(make(), written="2026-01-01T00:00:00+00:00")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["sets"]
    for each in data["sets"]:
        assert set(each) >= {"name", "status", "panels", "alerts", "texts", "where", "evidence", "more"}
        assert each["status"]["sentences"]
    assert all(harmless(letter) for words in strings(data) for letter in words)


def test_a_run_without_audits_is_blind_and_says_so() -> None:
    data = page_data(as_run([]))
    assert data["run"]["status"] == {
        "word": "BLIND",
        "since": None,
        "reason": "No audit has been made yet.",
        "blind": "",
    }
    assert data["sets"][0]["panels"] == []
    assert data["sets"][0]["where"] is None


def test_audits_that_all_broke_are_told_with_what_to_do() -> None:
    data = page_data(failed_run())
    status = data["sets"][0]["status"]
    assert status["word"] == "BLIND"
    assert "RuntimeError: no memory" in status["sentences"][0]
    assert "failures.jsonl" in status["do"]["words"]
    assert data["run"]["failures"] == [["60", FAILED.time, "RuntimeError: no memory"]]


def test_a_failure_after_healthy_audits_makes_the_page_blind() -> None:
    status = first(as_run(a_run("well"), [FAILED]))["status"]
    assert (status["word"], status["since"]) == ("BLIND", 60)
    assert "Audits break since step 60" in status["sentences"][0]
    assert "1 audit broke" in status["facts"]


def test_what_is_not_known_is_null() -> None:
    data = first(unknown_run())
    for each in data["panels"]:
        assert each["mean"] == [None, None]
        assert each["now"] == "not known"
        assert all(math.isfinite(end) for end in each["reach"])
    assert data["where"]["transplant"][0]["mean"] == [None] * 12
    assert data["where"]["sites"][0]["sufficiency"]["mean"] == [None] * 12
    assert {"reason": "nobody knows", "paths": data["more"]["unknown"][0]["paths"]} in data["more"]["unknown"]


def test_a_health_run_has_panels_and_no_layers() -> None:
    data = first(health_run())
    assert [each["steps"] for each in data["panels"]] == [[0, 10, 20]] * 4
    assert (data["where"], data["evidence"], data["more"]["low_rank"], data["more"]["spinal"]) == (None, [], None, None)


# --- status -----------------------------------------------------------------------------------------------------------


def test_a_healthy_run_needs_nothing_done() -> None:
    data = first(healthy_run())
    status = data["status"]
    assert status["word"] == "HEALTHY"
    assert status["sentences"] == [
        "No alert is open at step 40.",
        "Chosen answers gained 0.01 nats per token, KL to the reference is 0.04 nats per token (limit 0.35), "
        "82 % of next tokens are right "
        "(reference 82 %).",
    ]
    assert status["do"] == {"words": "Nothing to do.", "checkpoint": None, "command": None}
    assert (data["alerts"], data["first_error"]) == ([], None)


def test_a_ruined_run_says_since_when_and_what_to_go_back_to() -> None:
    data = first(ruined_run())
    status = data["status"]
    assert (status["word"], status["since"], data["first_error"]) == ("ERROR", 20, 20)
    assert status["sentences"][1].startswith(
        "Chosen answers lost 5.40 nats per token (limit 0.6), KL to the reference is 9.40"
    )
    assert status["do"]["checkpoint"] == "checkpoint-10"
    assert status["do"]["command"] == "trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-10')"
    assert status["do"]["words"] == (
        "Last clean audit: step 10; go back to checkpoint-10. Learning rate 0.003 → 0.0006 or lower, or beta 0.1 → 0.2 or "
        "higher."
    ), "as every other screen says it"
    assert status["log"] == "The training log at step 20: reward margin +4.90."


def test_the_log_is_read_up_to_the_audit() -> None:
    late = [LogRow(10, {"loss": 0.5}), LogRow(400, {"loss": 0.1})]
    assert first(as_run(a_run("well"), log=late))["status"]["log"] == "The training log at step 10: loss 0.50."


def test_what_the_log_said_last_is_told_with_its_step() -> None:
    log = [LogRow(10, {"loss": math.nan, "rewards/accuracies": 0.9}), LogRow(20, {"rewards/margins": -math.inf})]
    status = first(as_run(a_run("well"), log=log))["status"]
    assert status["log"] == (
        "The training log at step 20: loss NaN (step 10), reward margin −∞, reward accuracy 90 % (step 10)."
    )


WARNED = Alert(
    rule="kl_out_of_bounds", cause="drift", level="warning", step=40, since=40, value=0.4, threshold=0.35, message="KL",
    suggestion="Slow down", remedy="Slow down", clean_step=20, checkpoint="checkpoint-20", command="go back",
)  # fmt: skip


def with_alerts(*alerts: Alert, last: int = 40) -> AuditRun:
    """A healthy run with these alerts at its audits of their steps."""
    records = [calm(step) for step in range(0, last + 1, 10)]
    return as_run(
        [
            record.model_copy(update={"alerts": [alert for alert in alerts if alert.step == record.step]})
            for record in records
        ]
    )


@pytest.mark.parametrize("level", ["warning", "error"])
def test_the_page_advises_what_every_screen_does_and_sends_nobody_back_for_a_warning(level: Any) -> None:
    run = with_alerts(WARNED.model_copy(update={"level": level}))
    data, standing = first(run), standing_at(run.records[-1], run.records)
    words = data["status"]["do"]["words"]
    assert words.lower() == f"{what_to_do(standing, command=False)}.".lower()
    assert ("should it become an error, go back" in words) == (level == "warning")
    command = None if level == "warning" else "go back"
    assert [data["status"]["do"]["command"], data["alerts"][0]["command"]] == [command, command]


def test_the_limit_is_that_by_which_an_alert_stays_open() -> None:
    """At an audit it is an error; at the next it only stays one, by the limit of a warning, eased."""
    error = WARNED.model_copy(update={"level": "error", "step": 30, "since": 30, "value": 0.8, "threshold": 0.7})
    held = error.model_copy(update={"event": "open", "step": 40, "value": 0.3, "threshold": 0.28})
    run = with_alerts(error, held)
    assert "KL to the reference is 0.04 nats per token (limit 0.28)" in first(run)["status"]["sentences"][1]
    standing = standing_at(run.records[-1], run.records)
    assert (standing.limit("kl"), standing.limit("chosen_drop")) == (0.28, 0.6)
    beside = held.model_copy(
        update={"rule": "entropy_out_of_bounds", "signals": ["kl_out_of_bounds"], "threshold": 2.0}
    )
    run = with_alerts(error, beside)
    eased = standing_at(run.records[-1], run.records).limit("kl")
    assert eased == pytest.approx(AlertConfig().hysteresis * 0.35), "of a sign beside another the record has no limit"
    assert figures_in_words(standing).count("(limit 0.28)") == 1


def test_probe_sets_stand_by_themselves_the_worst_first() -> None:
    data = page_data(sets_run())
    assert [(each["name"], each["status"]["word"]) for each in data["sets"]] == [
        ("helpful", "ERROR"),
        ("harmless", "HEALTHY"),
    ]
    assert data["run"]["status"]["word"] == "ERROR"
    assert data["sets"][1]["alerts"] == []


def test_a_probe_set_that_the_run_goes_on_without_is_last_and_says_so() -> None:
    """Ruined by one set, and resumed without it: training logs long after, which is no silence of that set."""
    left = [on_set(record, "helpful") for record in a_run() if record.step <= 20]
    records = [*left, *(on_set(record, "harmless") for record in later_on(a_run("well")))]
    data = page_data(as_run(records, log=[LogRow(500, {"loss": 0.5})]))
    used, dropped = data["sets"]
    assert (used["name"], dropped["name"]) == ("harmless", "helpful")
    assert dropped["status"]["word"] == "ERROR"
    assert dropped["status"]["sentences"][0] == "The run goes on without these pairs: this is of step 20."
    quiet = page_data(as_run([on_set(calm(5), "helpful"), *records[len(left) :]], log=[LogRow(145, {"loss": 0.5})]))
    assert [each["status"]["word"] for each in quiet["sets"]] == ["HEALTHY", "HEALTHY"]


def test_a_course_that_was_left_is_not_shown() -> None:
    """A run that was resumed from step 10 has records of both courses."""
    old, new = a_run("ruined"), a_run("well")
    again = [
        record.model_copy(
            update={
                "provenance": record.provenance.model_copy(
                    update={"created": f"2026-02-01T00:{record.step:02}:00+00:00", "policy_hash": f"new-{record.step}"}
                )
            }
        )
        for record in new
        if record.step > 10
    ]
    data = first(as_run(sorted([*old, *again], key=lambda record: (record.step, record.provenance.created))))
    assert data["panels"][1]["steps"] == [0, 5, 10, 20, 40]
    assert max(data["panels"][1]["mean"]) == 0.04
    assert (data["status"]["word"], data["alerts"], data["first_error"]) == ("HEALTHY", [], None)


# --- panels -----------------------------------------------------------------------------------------------------------


def test_limits_stand_where_the_rules_judge() -> None:
    limits = {
        each["key"]: [(limit["level"], limit["value"]) for limit in each["limits"]]
        for each in first(ruined_run())["panels"]
    }
    assert limits["chosen"] == [("warning", -0.25), ("error", -0.6)]
    assert limits["kl"] == [("warning", 0.35), ("error", 0.7)]
    # Of the reference's 82 %, and under the best accuracy, 90 %.
    assert limits["tokens"] == [("warning", pytest.approx(0.8 * 0.82)), ("error", pytest.approx(0.6 * 0.82))]
    assert limits["accuracy"] == [("warning", pytest.approx(0.8)), ("error", pytest.approx(0.65))]


def test_limits_are_those_of_the_configuration_and_gone_with_their_rule() -> None:
    def with_alerts(**alerts: Any) -> AuditRun:
        record = make_record(20)
        return as_run(
            [
                record.model_copy(
                    update={"provenance": record.provenance.model_copy(update={"config": {"alerts": alerts}})}
                )
            ]
        )

    assert panel(with_alerts(kl_warning=3.0), "kl")["limits"][0] == {"level": "warning", "value": 3.0, "says": "3.00"}
    assert panel(with_alerts(kl_warning=3.0), "kl")["reach"][1] > 3.0
    off = panel(with_alerts(rules={"kl_out_of_bounds": {"enabled": False}}), "kl")
    assert (off["limits"], off["note"]) == ([], "")
    for drop, needs in ((0.2, "where chosen answers lose 0.2"), (-100.0, "unless chosen answers gain 100")):
        assert panel(with_alerts(kl_chosen_drop=drop), "kl")["note"] == (
            f"Up to an error's limit it warns {needs} nats per token."
        )


@pytest.mark.parametrize("make", [healthy_run, ruined_run, health_run, unknown_run])
def test_axes_reach_past_every_limit_and_hold_all_that_is_known(make: Callable[[], AuditRun]) -> None:
    for each in first(make())["panels"]:
        low, high = each["reach"]
        values = [value for name in ("mean", "low", "high") for value in each[name] if value is not None]
        values += [limit["value"] for limit in each["limits"]]
        assert values == [] or (low < min(values) and max(values) < high)


def test_an_accuracy_of_equal_models_is_none() -> None:
    """No pair's margin has grown, which is not an accuracy of 0."""
    assert panel(as_run([make_record(0, progress=0.0), make_record(20)]), "accuracy")["mean"][0] is None


def test_a_panel_says_its_value_and_its_limits() -> None:
    each = panel(ruined_run(), "kl")
    assert each["says"] == "KL to the reference: 9.40 nats/token at step 40, warning limit 0.35, error limit 0.70"
    assert (each["now"], each["interval"]) == ("9.40", "9.39 to 9.41")
    assert panel(ruined_run(), "tokens")["reference"] == [pytest.approx(0.82)] * 4 + [pytest.approx(0.82)]


def test_of_two_audits_of_a_step_the_full_one_is_drawn() -> None:
    full = make_record(20)
    looked = health(full.model_copy(update={"margins": make_record(20, progress=1.0).margins}))
    assert panel(as_run([looked, full]), "kl")["mean"] == [number(full.margins.kl.mean)]
    assert panel(as_run([full, looked]), "kl")["mean"] == [number(full.margins.kl.mean)]


def test_the_trainers_curves_are_thinned_and_keep_their_spikes() -> None:
    log = [LogRow(step, {"loss": 9.0 if step == 777 else 0.5}) for step in range(5000)]
    (curve,) = training_curves(log)
    assert len(curve["steps"]) <= 300
    assert (777, 9.0) in zip(curve["steps"], curve["values"], strict=True)
    assert (curve["steps"][0], curve["steps"][-1]) == (0, 4999)
    broken = training_curves([LogRow(row.step, {"loss": math.nan} if row.step >= 4000 else row.logs) for row in log])[0]
    assert broken["now"] == "NaN"
    assert {broken["steps"][int(place)] for place in broken["not_finite"]} >= {4999}
    (single,) = training_curves(
        [LogRow(row.step, {"loss": -math.inf} if row.step == 2345 else row.logs) for row in log]
    )
    assert [(single["steps"][int(place)], words) for place, words in single["not_finite"].items()] == [(2345, "−∞")]
    nothing = [(step, math.nan) for step in range(1000)]
    assert len(thinned_points(nothing, 10)) <= 10


# --- alerts -----------------------------------------------------------------------------------------------------------


def test_a_cause_has_one_row_over_all_its_audits() -> None:
    (row,) = first(ruined_run())["alerts"]
    assert (row["level"], row["since"], row["cleared"], row["times"]) == ("error", 20, None, 1)
    assert row["cause"] == "the policy is leaving its language"
    assert row["command"] == "trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-10')"


def test_an_alert_that_is_over_says_when_and_advises_nothing() -> None:
    (row,) = first(as_run(a_run("resolved")))["alerts"]
    assert (row["since"], row["cleared"]) == (20, 59)
    assert (row["suggestion"], row["command"]) == ("", None)
    assert "lose 5.40 nats per token" in row["message"]


def test_an_alert_that_is_opened_again_is_what_it_is_now() -> None:
    error = WARNED.model_copy(update={"level": "error", "step": 10, "since": 10})
    over = error.model_copy(update={"event": "resolved", "step": 20})
    (row,) = first(with_alerts(error, over, WARNED))["alerts"]
    assert (row["level"], row["since"], row["cleared"], row["times"]) == ("warning", 40, None, 2)
    assert row["earlier"] == [{"level": "error", "since": 10, "cleared": 20}]


def test_rules_of_one_cause_in_older_records_are_one_row() -> None:
    older = WARNED.model_copy(update={"cause": "", "since": None})
    (row,) = first(with_alerts(older.model_copy(update={"step": 30, "rule": "chosen_logp_falling"}), older))["alerts"]
    assert (row["rule"], row["since"], row["cleared"]) == ("kl_out_of_bounds", 30, None)


def test_a_control_that_failed_is_no_alert_of_the_run() -> None:
    """Versions before this one alerted to it."""
    record = make_record(20)
    alert = make_record(100, kind="destabilizing", progress=1.0).alerts[0].model_copy(update={"rule": "control_failed"})
    data = first(as_run([record.model_copy(update={"alerts": [alert]})]))
    assert (data["alerts"], data["first_error"], data["status"]["word"]) == ([], None, "HEALTHY")


# --- size and values --------------------------------------------------------------------------------------------------


def test_the_largest_run_leaves_room_under_two_megabytes() -> None:
    """The front end takes 1.55 MB of them."""
    assert len(json.dumps(page_data(large_run()), separators=(",", ":"))) < 400_000


def test_values_are_short_and_text_is_one_line() -> None:
    assert (number(1 / 3), number(math.inf), number(None), number(-1234567.0)) == (0.3333, None, None, -1235000.0)
    assert "\n" not in text("a\nb") and "\x1b" not in text(HOSTILE)
    assert lines("a\nb\x1b\n") == "a\nb\\x1b\n"
    assert len(text("x" * 10**5)) == 2000
