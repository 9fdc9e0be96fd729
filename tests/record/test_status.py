"""How a run stands: ERROR, BLIND, WATCH, HEALTHY, from records, failures and the trainer's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Control, Occasion
from align_audit.record.log import Failure, RunLog
from align_audit.record.run import AuditRun
from align_audit.record.status import Status, status_of
from align_audit.record.training_log import LogRow
from tests.helpers.alert_cases import health, healthy, on_set, with_part
from tests.helpers.make_record import make_record


def alert(level: str, step: int, since: int | None, event: str = "open", rule: str = "kl_out_of_bounds") -> Alert:
    return Alert(
        rule=rule,
        cause="drift",
        level=level,
        event=event,
        step=step,
        since=since,
        value=1.0,
        message="KL is 1.",
        suggestion="-",
    )  # type: ignore[arg-type]


def at(step: int, *alerts: Alert) -> AuditRecord:
    return healthy(step).model_copy(update={"alerts": list(alerts)})


def broken(step: int) -> Failure:
    return Failure(step=step, time="2026-01-01T00:00:00+00:00", error="Traceback\n  ...\nValueError: bad batch.\n")


def unjudged(record: AuditRecord) -> AuditRecord:
    return with_part(record, "provenance", config={**record.provenance.config, "alerts": {"enabled": False}})


def test_where_alerts_are_switched_off_nothing_says_that_all_is_well() -> None:
    """Nor is it over what was open before, as a run that goes on without them would have it."""
    warned, after = at(10, alert("warning", 10, 10, "opened")), [unjudged(at(20)), unjudged(at(30))]
    status = status_of([at(0), warned, *after], [], [])
    assert (status.word, status.since) == ("BLIND", 20)
    assert "alerts.enabled" in status.reason
    assert status_of([unjudged(at(0)), at(10)], [], []).word == "HEALTHY", "the last audit was judged"


def test_healthy_is_since_an_audit_that_was_judged() -> None:
    records = [at(10), unjudged(at(20)), at(30), at(40)]
    status = status_of(records, [], [])
    assert (status.word, status.since) == ("HEALTHY", 30)


@pytest.mark.parametrize(
    ("records", "word", "since"),
    [
        ([at(0), at(10), at(20)], "HEALTHY", 0),
        ([at(0), at(10, alert("warning", 10, 10, "opened"))], "WATCH", 10),
        ([at(0), at(10, alert("warning", 10, 10)), at(20, alert("error", 20, 10, "worse"))], "ERROR", 10),
        ([at(0, alert("error", 0, 0)), at(10, alert("error", 10, 0, "resolved")), at(20)], "HEALTHY", 10),
        ([at(10, alert("info", 10, 10))], "HEALTHY", 10),
        ([at(10, alert("error", 10, None, "opened"))], "ERROR", 10),
        ([at(10, alert("error", 10, 10, "opened", "control_failed"))], "HEALTHY", 10),
    ],
)
def test_status_is_what_the_last_records_say_is_open(records: list[AuditRecord], word: str, since: int) -> None:
    status = status_of(records, [], [])
    assert (status.word, status.since) == (word, since)
    assert str(status) == f"{word} since step {since}"
    if word in ("WATCH", "ERROR"):
        assert status.reason == "KL is 1."


def test_no_audit_is_blind() -> None:
    assert (status_of([], [], []).word, status_of([], [], []).since) == ("BLIND", None)
    assert "step 5: ValueError: bad batch" in status_of([], [broken(5)], []).reason


def test_audits_that_break_are_blind_until_one_comes_through() -> None:
    status = status_of([at(10)], [broken(20), broken(30)], [])
    assert (status.word, status.since) == ("BLIND", 20)
    assert status_of([at(10), at(40)], [broken(20), broken(30)], []).word == "HEALTHY"


def test_what_broke_of_a_set_that_is_left_out_is_over() -> None:
    """Training goes on without a probe set on which audits break; nothing would ever make that good."""

    def on(name: str, *steps: int) -> list[AuditRecord]:
        return [on_set(at(step), name) for step in steps]

    def status(*records: AuditRecord, broke_at: int = 20, name: str | None = "b") -> str:
        failure = broken(broke_at).model_copy(update={"probe_name": name})
        return status_of(sorted(records, key=lambda record: record.step), [failure], []).word

    before, after = [*on("a", 0, 10), *on("b", 0, 10)], on("a", 20, 30, 40)
    assert status(*before, *after) == "BLIND", "it was in use at step 20"
    assert status(*before, *after, *on("a", 50)) == "HEALTHY"
    assert status(*before, *after, *on("a", 50), broke_at=50) == "BLIND"
    assert status(*before, *after, *on("a", 50), name=None) == "HEALTHY", "of all sets, and those in use came through"
    failed = with_part(on("b", 10)[0], "controls", identity=Control(verdict="failed", reason="3 of 64 moved"))
    assert status_of([*on("a", 10), failed, *on("a", 20, 30)], [], []).word == "BLIND"
    assert status_of([*on("a", 10), failed, *on("a", 20, 30, 40)], [], []).word == "HEALTHY"


def test_an_open_error_is_not_hidden_by_blindness() -> None:
    ruined = at(10, alert("error", 10, 10, "opened"))
    status = status_of([ruined], [broken(20)], [])
    assert status.word == "ERROR"
    assert status.blind.startswith("Audits break since step 20"), "nor does it hide that nothing is seen of it any more"
    assert status_of([ruined], [], []).blind == ""
    resolved = at(30, alert("error", 30, 10, "open"))
    assert status_of([ruined, resolved], [broken(20)], []).blind == "", "an audit has come through since"
    assert status_of([at(10, alert("warning", 10, 10, "opened"))], [broken(20)], []).word == "BLIND"


def test_a_failed_identity_control_is_blind_and_others_are_notes() -> None:
    failed = Control(verdict="failed", reason="3 of 64 moved")
    identity = with_part(at(10), "controls", identity=failed)
    status = status_of([identity], [], [])
    assert (status.word, status.since) == ("BLIND", 10)
    assert "3 of 64 moved" in status.reason
    assert status_of([identity, health(at(20))], [], []).word == "BLIND", "a health audit does not run it"
    assert status_of([identity, at(20)], [], []).word == "HEALTHY"
    assert status_of([with_part(at(10), "controls", noise=failed)], [], []).word == "HEALTHY"


def test_silence_is_blind() -> None:
    due = at(40).model_copy(update={"occasion": Occasion(reason="at step 40", next_step=50)})
    assert status_of([due], [], [LogRow(70, {})]).word == "HEALTHY"
    status = status_of([due], [], [LogRow(71, {})])
    assert (status.word, status.since) == ("BLIND", 40)
    assert "one was due every 10" in status.reason
    usual = [at(10), at(20), at(30)]
    assert status_of(usual, [], [LogRow(60, {})]).word == "HEALTHY"
    assert status_of(usual, [], [LogRow(61, {})]).word == "BLIND"
    assert status_of(usual[:2], [], [LogRow(900, {})]).word == "HEALTHY", "two audits are no interval"


SILENT = at(40).model_copy(update={"occasion": Occasion(reason="at step 40", next_step=50)})
UNTRUE = with_part(at(10), "controls", identity=Control(verdict="failed", reason="3 of 64 moved"))


@pytest.mark.parametrize(
    ("status", "advised"),
    [
        (status_of([], [broken(5)], []), "failures.jsonl"),
        (status_of([at(10)], [broken(20)], []), "failures.jsonl"),
        (status_of([UNTRUE], [], []), "by layer"),
        (status_of([SILENT], [], [LogRow(71, {})]), "the callback"),
        (status_of([at(10)], [], [], "2 lines at the end cannot be read."), "a newer version"),
        (status_of([unjudged(at(10))], [], []), "alerts.enabled"),
    ],
)
def test_each_blindness_has_its_own_advice(status: Status, advised: str) -> None:
    """A file of tracebacks is there only where something broke."""
    assert status.word == "BLIND"
    assert advised in status.advice
    assert ("failures.jsonl" in status.advice) == ("broke" in status.reason or "break" in status.reason)


def test_where_an_alert_is_open_it_says_what_to_do() -> None:
    assert status_of([at(10, alert("error", 10, 10, "opened"))], [], []).advice == ""
    assert status_of([at(0)], [], []).advice == ""
    assert status_of([], [], []).advice == "", "nothing is known yet"


def test_status_is_of_all_probe_sets_or_of_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.append(on_set(at(10), "a"))
    log.append(on_set(at(10, alert("error", 10, 10, "opened")), "b"))
    run = AuditRun.load(tmp_path)
    assert run.status.word == "ERROR"
    assert run.select("a").status.word == "HEALTHY"
    assert run.select("b").status.word == "ERROR"


def of_course(step: int, minute: int, word: str = "calm", **provenance: Any) -> AuditRecord:
    """An audit made in that minute, with an error open or nothing."""
    record = make_record(step, layers=2, kind="healthy", alerts=[])
    made = record.provenance.model_copy(update={"created": f"2026-01-01T00:{minute:02}:00+00:00", **provenance})
    alerts = [] if word == "calm" else [alert_at(step)]
    return record.model_copy(update={"provenance": made, "alerts": alerts})


def alert_at(step: int) -> Alert:
    return Alert(
        rule="kl_out_of_bounds",
        cause="drift",
        level="error",
        step=step,
        since=step,
        value=2.0,
        message="KL",
        suggestion="",
    )


def failed_at(step: int, minute: int, name: str | None = None) -> Failure:
    time = f"2026-01-01T00:{minute:02}:30+00:00"
    return Failure(step=step, time=time, error="Traceback\nOSError: gone", probe_name=name)


def test_what_was_left_when_a_run_was_resumed_says_nothing_of_it() -> None:
    """Neither an error of later steps of the course before, nor a failure there."""
    left = [of_course(0, 0), of_course(20, 1), of_course(40, 2, "error"), of_course(60, 3, "error")]
    resumed = [*left, of_course(25, 10), of_course(30, 11)]
    assert status_of(left, [], []).word == "ERROR"
    assert status_of(sorted(resumed, key=lambda each: each.step), [failed_at(70, 4)], []).word == "HEALTHY"
    assert status_of(resumed, [failed_at(35, 12)], []).word == "BLIND"


def test_a_set_that_breaks_is_not_hidden_by_one_that_does_not() -> None:
    good = [of_course(step, minute, probe_name="good") for minute, step in enumerate((0, 10, 20))]
    bad = of_course(0, 0, probe_name="bad")
    failures = [failed_at(10, 1, "bad"), failed_at(20, 2, "bad")]
    status = status_of([bad, *good], failures, [])
    assert (status.word, status.since) == ("BLIND", 10)
    again = of_course(30, 3, probe_name="bad")
    assert status_of([bad, *good, again], failures, []).word == "HEALTHY"
    # What broke before any set was come to is made good only where every set was audited since.
    assert status_of([bad, *good], [failed_at(10, 1)], []).word == "BLIND"


@pytest.mark.parametrize("order", [("harmless", "helpful"), ("helpful", "harmless")])
@pytest.mark.parametrize("followed_by", [(), (health,)], ids=["at the last step", "and a look after it"])
def test_an_identity_control_that_failed_on_one_set_is_not_hidden_by_another(
    order: tuple[str, str], followed_by: tuple[Any, ...]
) -> None:
    failed = with_part(at(20), "controls", identity=Control(verdict="failed", reason="it moved"))
    records = [on_set(failed if name == "harmless" else at(20), name) for name in order]
    records += [on_set(look(at(30)), name) for look in followed_by for name in order]
    assert status_of(records, [], []).word == "BLIND"
    mended = [*records, *(on_set(at(40), name) for name in order)]
    assert status_of(mended, [], []).word == "HEALTHY"


def test_silence_after_the_last_look_that_was_planned_is_none() -> None:
    """The budget allows none before the end."""
    records = [of_course(step, minute) for minute, step in enumerate((0, 5, 10, 20))]
    log = [LogRow(step, {"loss": 0.5}) for step in range(21, 500)]
    last = records[-1].model_copy(update={"occasion": Occasion(reason="a look was planned", next_step=None)})
    assert status_of(records, [], log).word == "BLIND", "records of versions that planned nothing"
    assert status_of([*records[:-1], last], [], log).word == "HEALTHY"
