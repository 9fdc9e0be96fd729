"""What a page says of a run, as plain values: status, panels and their limits, alerts, where, evidence; of any run at all."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align_audit.config import AlertConfig
from align_audit.record.alert import Alert
from align_audit.record.audit_record import Control
from align_audit.record.log import RunLog
from align_audit.record.pair_texts import TokenChange
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.brief import figures_in_words, what_to_do
from align_audit.writers.standing import standing_at
from align_audit.writers.web.health_panels import thinned_points, training_curves
from align_audit.writers.web.json_values import lines, number, text
from align_audit.writers.web.page_data import page_data
from tests.helpers.alert_cases import health, with_part
from tests.helpers.make_record import make_record
from tests.helpers.pages import (
    FAILED,
    HOSTILE,
    as_run,
    failed_run,
    health_run,
    healthy_run,
    hostile_run,
    large_run,
    ruined_run,
    sets_run,
    texts_run,
    unknown_run,
)
from tests.helpers.screens import a_run, calm

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


def first(run: AuditRun) -> dict[str, Any]:
    """What the page shows first."""
    data: dict[str, Any] = page_data(run)["sets"][0]
    return data


def panel(run: AuditRun, key: str) -> dict[str, Any]:
    return next(each for each in first(run)["panels"] if each["key"] == key)


def strings(value: Any) -> Iterator[str]:
    """Every text in a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from strings(key)
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def harmless(letter: str) -> bool:
    """Nothing that controls, ends a line or turns a direction."""
    return letter.isprintable() or letter in "\u200c\u200d" or unicodedata.category(letter) == "Zs"


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
    assert data["run"]["status"] == {"word": "BLIND", "since": None, "reason": "No audit has been made yet."}
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
        "Chosen answers gained 0.01 nats per token, KL to the reference is 0.04 (limit 0.35), 82 % of next tokens are right "
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
    assert "KL to the reference is 0.04 (limit 0.28)" in first(run)["status"]["sentences"][1]
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
    assert panel(with_alerts(rules={"kl_out_of_bounds": {"enabled": False}}), "kl")["limits"] == []


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


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_the_last_audit_that_kept_some(tmp_path: Path) -> None:
    texts = first(texts_run(tmp_path))["texts"]
    assert texts["step"] == 40
    assert [(pair["pair"], pair["shift"]) for pair in (*texts["lost"], *texts["gained"])] == [
        (7, -6.0),
        (1, 8.0),
        (2, 3.0),
    ]
    lost = texts["lost"][0]
    assert lost["prompt"] == "How are you?\n fine"
    assert lost["chosen"] == {
        "tokens": [
            {"text": "It", "change": 0.4}, {"text": " fine", "change": -3.0}, {"text": "↵", "change": None},
            {"text": ".", "change": -0.1},
        ],
        "length": None,
    }  # fmt: skip
    assert (len(lost["rejected"]["tokens"]), lost["rejected"]["length"]) == (2, 300)
    assert first(healthy_run())["texts"] is None


def test_texts_are_not_shown_where_the_last_audit_was_told_to_keep_none(tmp_path: Path) -> None:
    run = texts_run(tmp_path)
    last = run.records[-1]
    none = with_part(last, "provenance", config={**last.provenance.config, "examples": {"pairs": 0}}, created="2026-02")
    later = none.model_copy(update={"step": 50})
    assert first(replace(run, records=[*run.records, later]))["texts"] is None


def test_what_became_impossible_is_said_to_be_so(tmp_path: Path) -> None:
    run = texts_run(tmp_path)
    texts = run.pair_texts(run.records[-1])
    assert texts is not None
    changes = (-math.inf, math.inf, math.nan)
    tokens = [TokenChange(text="x", change=change) for change in changes]
    pair = texts.lost[0].model_copy(update={"chosen": tokens, "shift": -math.inf})
    log = RunLog(tmp_path)
    log.save_texts(run.records[-1], texts.model_copy(update={"lost": [pair]}))
    log.close()
    lost = first(AuditRun.load(tmp_path))["texts"]["lost"][0]
    assert (lost["shift"], lost["says"]) == (None, "−∞")
    assert [(token["change"], token.get("says")) for token in lost["chosen"]["tokens"]] == [
        (None, "−∞"), (None, "∞"), (None, None),
    ]  # fmt: skip


def test_words_of_every_script_are_as_they_are() -> None:
    for words in ("می\u200cخواهم", "क्\u200dष", "👩\u200d💻", "a\u00a0b\u3000c", "❤\ufe0f"):
        assert text(words) == lines(words) == words
    assert lines("a\tb") == "a\tb"
    for letter in "\u202e\u2066\u200f\u061c\x1b\x85\x00\u2028\ufeff\ud800":
        assert letter not in text(f"a{letter}b") + lines(f"a{letter}b")


def test_foreign_tokens_hold_no_control_characters(tmp_path: Path) -> None:
    words = list(strings(first(texts_run(tmp_path, HOSTILE))["texts"]))
    assert any("\\x1b[31m" in word for word in words)
    assert all(harmless(letter) or letter == "\n" for word in words for letter in word)


# --- where and evidence -----------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_records() -> None:
    run = healthy_run()
    where = first(run)["where"]
    patched = [record for record in run.records if record.patching is not None]
    assert where["steps"] == [record.step for record in patched]
    for place, record in enumerate(patched):
        assert record.patching is not None and record.finding is not None
        assert where["transplant"][place]["mean"] == [number(each.mean) for each in record.patching.block_transplant]
        assert where["gain"][place]["high"] == [number(each.high) for each in record.patching.layer_gain]
        assert where["sentences"][place].lower() == record.finding.words.lower()
        assert where["claims"][place] == record.finding.layers
    assert where["unknown"][0] != ""
    assert [site["name"] for site in where["sites"]] == [
        "Attention output", "MLP output, completion", "Heads", "Windows of 2 layers",
    ]  # fmt: skip


def test_evidence_is_of_each_full_audit_with_its_reasons() -> None:
    run = healthy_run()
    evidence = first(run)["evidence"]
    assert [each["step"] for each in evidence] == first(run)["where"]["steps"]
    chips = {chip["name"]: chip for chip in evidence[-1]["chips"]}
    assert len(chips) == 6
    assert chips["split half"]["reason"] == run.records[-1].controls.split_half.reason
    assert not any(chip["broken"] for chip in chips.values())


def test_only_a_broken_identity_control_is_marked_as_such() -> None:
    record = make_record(20)
    failed = Control(verdict="failed", reason="it moves by 0.1")
    everything = dict.fromkeys(type(record.controls).model_fields, failed)
    data = first(as_run([record.model_copy(update={"controls": record.controls.model_copy(update=everything)})]))
    assert [chip["name"] for chip in data["evidence"][0]["chips"] if chip["broken"]] == ["identity"]
    assert data["status"]["word"] == "BLIND"
    assert "trust nothing" in data["status"]["do"]["words"].lower()


# --- folded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"delta_align": -0.05}, "No SPINAL signature: Δalign −0.05, coherence 0.30 (reference 0.30)"),
        ({"delta_align": 0.01}, "No SPINAL signature: Δalign +0.01, coherence 0.30 (reference 0.30)"),
        ({"delta_align": 0.4, "coherence": 0.1}, "No SPINAL signature: Δalign +0.40, coherence 0.10 (reference 0.30)"),
        (
            {"delta_align": 0.4},
            "Δalign is positive, as in SPINAL's signature: Δalign +0.40, coherence 0.30 (reference 0.30)",
        ),
        ({"delta_align": math.nan}, "SPINAL: not known (the record gives no reason)"),
    ],
)
def test_a_title_states_the_finding(changes: dict[str, float], title: str) -> None:
    record = make_record(20)
    assert record.spinal is not None
    spinal = record.spinal.model_copy(update={"coherence": 0.3, "reference_coherence": 0.3} | changes)
    assert first(as_run([record.model_copy(update={"spinal": spinal})]))["more"]["spinal"]["title"] == title


def test_a_rank_is_not_claimed_where_random_subspaces_do_as_well() -> None:
    record = make_record(20)
    failed = record.controls.model_copy(update={"random_subspace": Control(verdict="failed", reason="they do as well")})
    title = first(as_run([record.model_copy(update={"controls": failed})]))["more"]["low_rank"]["title"]
    assert title == "No low-rank subspace claimed: random subspaces do as well"


def test_a_transfer_beside_the_log_is_shown(transfer_record: TransferRecord, tmp_path: Path) -> None:
    run = replace(as_run([make_record(20)]), directory=tmp_path / "align_audit")
    transfer_record.save(tmp_path / "transfer.json")
    shown = first(run)["more"]["transfer"]
    assert shown["title"] == "Transfer between probe sets at step 30"
    assert len(shown["cells"]) == 9
    cell = next(each for each in shown["cells"] if (each["fitted"], each["patched"]) == ("harmless", "helpful-v1.1"))
    stored = transfer_record.cells["shift"][1]["harmless"]["helpful-v1.1"]
    assert (cell["rank"], cell["fraction"]["mean"]) == (4, number(stored.effect_fraction[-1].mean))
    (tmp_path / "transfer.json").write_text("{}")
    broken = first(run)["more"]["transfer"]
    assert broken["title"].startswith("The transfer record cannot be read") and broken["cells"] == []


def test_provenance_cost_and_what_is_not_known() -> None:
    more = first(ruined_run())["more"]
    assert dict(more["provenance"])["model"] == "llama, 12 layers, 512 wide"
    assert more["cost"]["title"] == "5 audits took 78 s"
    assert all(each["reason"] and each["paths"] for each in more["unknown"])


# --- size and values --------------------------------------------------------------------------------------------------


def test_the_largest_run_leaves_room_under_two_megabytes() -> None:
    """The front end takes 1.55 MB of them."""
    assert len(json.dumps(page_data(large_run()), separators=(",", ":"))) < 400_000


def test_values_are_short_and_text_is_one_line() -> None:
    assert (number(1 / 3), number(math.inf), number(None), number(-1234567.0)) == (0.3333, None, None, -1235000.0)
    assert "\n" not in text("a\nb") and "\x1b" not in text(HOSTILE)
    assert lines("a\nb\x1b\n") == "a\nb\\x1b\n"
    assert len(text("x" * 10**5)) == 2000
