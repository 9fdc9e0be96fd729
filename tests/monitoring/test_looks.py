"""Looks in real trainings: when the schedule makes them, what the trainer's log sets off, and what a budget leaves out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import align_audit.monitoring.monitor
from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from align_audit.monitoring.forecast import Costs, PlannedSteps, forecast
from align_audit.monitoring.schedule import Due, Event
from align_audit.record.audit_record import AuditKind
from tests.helpers.callback_runs import CREATED, At, quick, run
from tests.helpers.dpo import train

OFF: dict[str, Any] = {"before_training": False, "on_save": False, "on_last_step": False, "first_health": 100}
"""Nothing is due by itself in a few steps."""
NO_ROOM = 1e-6
"""A budget that no full audit fits."""
NEVER_FULL: dict[str, Any] = {"last_step_seconds": 0.0}
"""Beside that budget: not the last step either."""


def looked(output: Path) -> list[tuple[int, str]]:
    """Step and kind of each audit, in the order of the log."""
    return [(record.step, record.kind) for record in AuditRun.load(output).records]


def foreseen(config: AuditConfig, planned: PlannedSteps) -> list[tuple[int, str]]:
    """The same, as it is forecast before training."""
    return list(forecast(config, planned, Costs(step=1.0, health=0.1, full=1.0)).audits)


def reasons(output: Path) -> list[str]:
    said = [record.occasion for record in AuditRun.load(output).records]
    return [occasion.reason for occasion in said if occasion is not None]


def added(signal: str, **limits: Any) -> dict[str, Any]:
    return {"rules": {"planted": {"signal": signal, **limits}}}


def test_three_lines_look_early_and_audit_the_last_step_in_full(tmp_path: Path) -> None:
    """Although the budget has room for nothing, so that the checkpoint before is left out: that takes less than a minute.
    Once, at the save of that step."""
    config = quick(budget=NO_ROOM, alerts={"enabled": False})
    run(tmp_path / "out", config, max_steps=6, save_steps=3)
    assert looked(tmp_path / "out") == [(0, "health"), (5, "health"), (6, "full")]
    assert foreseen(config, PlannedSteps(6, save_steps=3)) == looked(tmp_path / "out")


def test_three_lines_look_early_and_at_the_end(tmp_path: Path) -> None:
    """With a budget that leaves room for nothing else."""
    config = quick(budget=NO_ROOM, schedule=NEVER_FULL, alerts={"enabled": False})
    run(tmp_path / "out", config, max_steps=12, save_steps=500, logging_steps=5)
    assert looked(tmp_path / "out") == [(0, "health"), (5, "health"), (10, "health"), (12, "health")]
    assert foreseen(config, PlannedSteps(12, save_steps=500)) == looked(tmp_path / "out")
    said = reasons(tmp_path / "out")
    assert said[1:3] == ["a look at step 5 was planned", "a look at step 10 was planned"]
    assert said[0].startswith("before training; a full audit")
    assert said[3].startswith("a checkpoint was saved; a full audit takes about "), "the trainer saves its last step"
    assert "does not fit the budget" in said[3]
    records = AuditRun.load(tmp_path / "out").records
    plans = [record.occasion.next_step for record in records if record.occasion is not None]
    assert plans == [5, 10, None, None], "20 lies beyond the end"
    shares = [record.occasion.share_spent for record in records if record.occasion is not None]
    assert shares[0] is None
    assert all(share is not None and 0 < share < 1 for share in shares[1:])


def test_checkpoints_without_room_are_left_out_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not those whose step is looked at anyway; and training gives the same bits, and the same checkpoints."""
    config = quick(budget=NO_ROOM, schedule=NEVER_FULL, alerts={"enabled": False})
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 1}
    with caplog.at_level(logging.WARNING, logger="align_audit"):
        audited = run(tmp_path / "out", config, **options)
    plain = train(tmp_path / "plain", CREATED, **options)
    assert audited.losses == plain.losses
    assert audited.weights.keys() == plain.weights.keys()
    assert all(torch.equal(value, audited.weights[name]) for name, value in plain.weights.items())
    assert looked(tmp_path / "out") == [(0, "health"), (5, "health"), (6, "health")]
    assert foreseen(config, PlannedSteps(**options)) == looked(tmp_path / "out")
    for output in ("out", "plain"):
        assert {path.name for path in (tmp_path / output).glob("checkpoint-*")} == {
            f"checkpoint-{n}" for n in range(1, 7)
        }
    (said,) = [each for each in map(logging.LogRecord.getMessage, caplog.records) if "leaves out" in each]
    assert said.startswith("align_audit leaves out the audit of the checkpoint of step 1: a look takes about ")
    assert " s and does not fit the budget of 0.0% of the run yet" in said
    assert "raise AuditConfig(budget=...) or save less often" in said
    assert f"`align-audit run {tmp_path / 'out'} --probes" in said


def test_a_checkpoint_that_the_training_log_sets_a_look_off_at_is_not_left_out(tmp_path: Path) -> None:
    config = quick(budget=NO_ROOM, schedule={**NEVER_FULL, "escalate": False}, alerts=added("loss", above=-1.0))
    run(tmp_path / "out", config, max_steps=3, save_steps=1)
    assert (1, "health") in looked(tmp_path / "out")
    assert reasons(tmp_path / "out")[1].startswith("a checkpoint was saved; a full audit")


def test_without_a_budget_full_audits_are_made_where_they_are_asked_for(tmp_path: Path) -> None:
    """And looks in between; a step that is saved is audited once, in full."""
    run(tmp_path / "out", quick(budget=None, alerts={"enabled": False}), max_steps=6, save_steps=5)
    assert looked(tmp_path / "out") == [(0, "full"), (5, "full"), (6, "full")]
    run(tmp_path / "two", quick(budget=None, alerts={"enabled": False}), max_steps=7, save_steps=6)
    assert looked(tmp_path / "two") == [(0, "full"), (5, "health"), (6, "full"), (7, "full")]
    for output, planned in (("out", PlannedSteps(6, save_steps=5)), ("two", PlannedSteps(7, save_steps=6))):
        assert foreseen(quick(budget=None), planned) == looked(tmp_path / output)


@pytest.mark.parametrize("on_last_step", [True, False])
@pytest.mark.parametrize(("every", "events"), [(3, "eval"), (50, "eval"), (3, "save")])
def test_evaluations_and_checkpoints_are_foreseen_as_the_trainer_makes_them(
    tmp_path: Path, every: int, events: str, on_last_step: bool
) -> None:
    """Also at the end, which is none of their steps."""
    schedule = {
        "health": False,
        "on_save": events == "save",
        "on_evaluate": events == "eval",
        "on_last_step": on_last_step,
    }
    config = quick(
        budget=None if events == "save" else NO_ROOM, schedule={**NEVER_FULL, **schedule}, alerts={"enabled": False}
    )
    options: dict[str, Any] = {"save_strategy": "no", f"{events}_strategy": "steps", f"{events}_steps": every}
    run(tmp_path / "out", config, **{"max_steps": 4, **options})
    planned = PlannedSteps(4, **{f"{events}_steps": every})
    assert foreseen(config, planned) == looked(tmp_path / "out")
    assert looked(tmp_path / "out")[-1] == (4, "full")


def test_a_look_that_warns_is_followed_by_a_full_audit_once(tmp_path: Path) -> None:
    """Whatever the budget; and not again at every look as long as the alert stays open."""
    config = quick(budget=NO_ROOM, schedule={**NEVER_FULL, "first_health": 1}, alerts=added("margins.kl", above=1e-9))
    run(tmp_path / "out", config, max_steps=3, save_steps=500)
    first, *later = looked(tmp_path / "out")
    assert first == (0, "health")
    assert later == [(1, "health"), (1, "full"), (2, "health"), (3, "health")]
    assert reasons(tmp_path / "out")[2] == "a health audit warns: planted"
    alerts = AuditRun.load(tmp_path / "out").alerts
    assert [(alert.rule, alert.event, alert.step) for alert in alerts] == [("planted", "opened", 1)]
    last = AuditRun.load(tmp_path / "out").records[-1].alerts
    assert [(alert.rule, alert.event, alert.since, alert.looks) for alert in last] == [("planted", "open", 1, 3)]


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_full_audit_that_takes_long_is_made_for_an_error_and_not_for_a_warning_without_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, level: str
) -> None:
    """Which is said, once, with what to do."""
    config = quick(
        budget=NO_ROOM, schedule={**NEVER_FULL, "first_health": 1, "escalate_seconds": 0.0},
        alerts={"rules": {"planted": {"signal": "margins.kl", "above": 1e-9, "level": level}}},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "align_audit"):
        run(tmp_path / "out", config, max_steps=3, save_strategy="no")
    full = [step for step, kind in looked(tmp_path / "out") if kind == "full"]
    said = [each for each in map(logging.LogRecord.getMessage, caplog.records) if "would say where" in each]
    if level == "error":
        assert (full, said) == ([1], [])
        return
    assert full == []
    (words,) = said
    assert words.startswith("align_audit: a look warns at step 1, and the full audit that would say where takes about ")
    assert "raise AuditConfig(budget=...) or schedule.escalate_seconds" in words


def test_it_can_be_kept_from_that(tmp_path: Path) -> None:
    schedule = {**NEVER_FULL, "first_health": 1, "escalate": False}
    run(tmp_path / "out", quick(budget=NO_ROOM, schedule=schedule, alerts=added("margins.kl", above=1e-9)), max_steps=2)
    assert {kind for _, kind in looked(tmp_path / "out")} == {"health"}


def test_what_the_trainer_logs_is_kept_and_sets_off_a_look(tmp_path: Path) -> None:
    """Every row of it; and what is suspicious in it is looked at before the next step, once."""
    config = quick(schedule=OFF, alerts=added("loss", above=-1.0))
    trained = run(tmp_path / "out", config, max_steps=4, save_strategy="no")
    stored = AuditRun.load(tmp_path / "out")
    logged = trained.trainer.state.log_history
    assert [row.step for row in stored.training_log] == [row["step"] for row in logged]
    for row, entry in zip(stored.training_log, logged, strict=True):
        assert dict(row.logs) == {name: value for name, value in entry.items() if name != "step"}
    assert looked(tmp_path / "out")[0] == (1, "health")
    assert reasons(tmp_path / "out")[0].startswith("the training log: loss is ")
    assert len(reasons(tmp_path / "out")) <= 2, "one look, and the full audit that it asks for where it warns"
    assert stored.records[0].margins.kl.mean > 0, "of the weights after the step that was logged"


@pytest.mark.parametrize(
    ("schedule", "options", "made"),
    [
        # The look of its step came before what it logs.
        ({"first_health": 3}, {}, [(3, "health"), (4, "health")]),
        ({"every_n_steps": 3}, {}, [(3, "full"), (4, "health")]),
        ({"first_health": 3}, {"eval_strategy": "steps", "eval_steps": 3}, [(3, "health"), (4, "health")]),
        # What audits it comes after its log.
        ({"on_save": True}, {"save_strategy": "steps", "save_steps": 3}, [(3, "health")]),
        ({"on_save": True, "first_health": 3}, {"save_strategy": "steps", "save_steps": 3}, [(3, "health")]),
        ({"on_evaluate": True}, {"eval_strategy": "steps", "eval_steps": 3}, [(3, "full")]),
        ({}, {}, [(3, "health")]),
    ],
)
@pytest.mark.parametrize("signal", ["loss", "eval_loss"])
def test_what_a_log_sets_off_is_looked_at_also_where_its_step_was_audited_before_it(
    tmp_path: Path, schedule: dict[str, Any], options: dict[str, Any], made: list[tuple[int, str]], signal: str
) -> None:
    """At the next step then: the alert is not left to the doubling after this one."""
    if signal == "eval_loss" and "eval_strategy" not in options:
        options = {**options, "eval_strategy": "steps", "eval_steps": 3}
    config = quick(
        budget=NO_ROOM, schedule={**OFF, **NEVER_FULL, "escalate": False, **schedule}, alerts=added(signal, above=-1.0)
    )
    run(tmp_path / "out", config, **{"max_steps": 5, "logging_steps": 3, "save_strategy": "no", **options})
    assert [audit for audit in looked(tmp_path / "out") if audit[0] < 5] == made
    alerts = [alert for alert in AuditRun.load(tmp_path / "out").alerts if alert.rule == "planted"]
    assert [(alert.event, alert.step) for alert in alerts] == [("opened", made[-1][0])]
    assert len(made) == 1 or reasons(tmp_path / "out")[1].startswith("the training log: ")


STEPS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
EPOCH: dict[str, Any] = {"eval_strategy": "epoch"}


@pytest.mark.parametrize(
    ("saves", "options"),
    [
        *[(saves, {"logging_steps": 4}) for saves in ("no", "steps", "epoch")],
        *[(saves, STEPS) for saves in ("no", "steps", "epoch")],
        *[(saves, {**STEPS, "eval_steps": 3}) for saves in ("no", "steps", "epoch")],  # and at the end
        *[(saves, EPOCH) for saves in ("no", "epoch")],
        *[(saves, {**EPOCH, "logging_strategy": "epoch"}) for saves in ("no", "epoch")],
    ],
)
def test_the_last_audit_is_judged_by_all_that_is_logged_of_its_step(
    tmp_path: Path, options: dict[str, Any], saves: str
) -> None:
    """However it saves; no later audit is there to be judged by it."""
    signal = "eval_loss" if "eval_strategy" in options else "loss"
    config = quick(
        budget=NO_ROOM,
        schedule={**NEVER_FULL, "escalate": False, "first_health": 100},
        alerts=added(signal, above=-1.0),
    )
    run(
        tmp_path / "out",
        config,
        **{"max_steps": 4, "logging_steps": 500, "save_strategy": saves, "save_steps": 500, **options},
    )
    assert looked(tmp_path / "out")[-1] == (4, "health")
    alerts = [alert for alert in AuditRun.load(tmp_path / "out").records[-1].alerts if alert.rule == "planted"]
    assert len(alerts) == 1


@pytest.mark.parametrize("kind", ["health", "full"])
@pytest.mark.parametrize("optional", [True, False])
def test_a_look_that_the_log_sets_off_is_not_lost_beside_one_that_waits(kind: AuditKind, optional: bool) -> None:
    """Nor left out with it."""
    callback: Any = AlignmentAuditCallback(config=quick())
    heard = Due("health", "the training log: loss is NaN", later=True)
    log = SimpleNamespace(agree=lambda _: heard)
    callback._run = SimpleNamespace(pace=SimpleNamespace(audited_at=-1), monitor=SimpleNamespace(trainer_log=log))
    callback._pending = Due(kind, "waits for a save", optional=optional, later=True)
    callback._agree_on_logs(Event.EVALUATE, 4)
    assert (callback._pending.kind, callback._pending.optional, callback._pending.later) == (kind, False, True)


def test_nothing_suspicious_sets_off_nothing(tmp_path: Path) -> None:
    run(tmp_path / "out", quick(schedule=OFF, alerts=added("loss", above=1e9)), max_steps=3, save_strategy="no")
    assert looked(tmp_path / "out") == []
    assert len(AuditRun.load(tmp_path / "out").training_log) == 4


def test_a_look_that_breaks_is_not_tried_again_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def breaks(models: Any, request: Any, *rest: Any) -> Any:
        asked.append(request.step)
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", breaks)
    config = quick(strict=False, budget=NO_ROOM, schedule={"on_save": False})
    run(tmp_path / "out", config, max_steps=12, save_strategy="no")
    assert asked == [0, 5, 10, 12]
    assert len(AuditRun.load(tmp_path / "out").failures) == 4


@pytest.mark.parametrize("looks_break", [False, True])
def test_where_a_full_audit_breaks_there_is_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_break: bool
) -> None:
    """A part that only full audits have breaks at each of them: the steps they were planned for do not go unseen."""
    made = align_audit.monitoring.monitor.run_audit
    asked: list[tuple[int, str]] = []

    def breaks(models: Any, request: Any, *rest: Any) -> Any:
        asked.append((request.step, request.kind))
        if looks_break or request.kind == "full":
            raise ZeroDivisionError("planted")
        return made(models, request, *rest)

    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", breaks)
    config = quick(strict=False, budget=None, schedule={"health": False})
    run(tmp_path / "out", config, max_steps=4, save_strategy="steps", save_steps=2)
    # Before the first step, at a save, and at the last one.
    assert asked == [(step, kind) for step in (0, 2, 4) for kind in ("full", "health")]
    loaded = AuditRun.load(tmp_path / "out")
    assert [failure.step for failure in loaded.failures] == [0, 2, 4], "one each, though both break alike"
    assert [record.step for record in loaded.records] == ([] if looks_break else [0, 2, 4])
    assert loaded.status.word == ("BLIND" if looks_break else "HEALTHY")
    for record in loaded.records:
        assert record.kind == "health" and record.occasion is not None
        assert record.occasion.reason.endswith("; the full audit broke")


def killed(**_: Any) -> None:
    raise InterruptedError


def test_a_resumed_run_looks_where_the_other_would_have(tmp_path: Path) -> None:
    """And where it begins again; it does not look again at what was audited."""
    config = quick(budget=NO_ROOM, schedule={**NEVER_FULL, "first_health": 2}, alerts={"enabled": False})
    options: dict[str, Any] = {"max_steps": 9, "save_steps": 3}
    straight, stopped = tmp_path / "straight" / "out", tmp_path / "stopped" / "out"
    run(straight, config, **options)
    with pytest.raises(InterruptedError):
        run(stopped, config, others=[At("on_step_end", 5, killed)], **options)
    run(stopped, config, resume=str(stopped / "checkpoint-3"), **options)
    assert looked(straight) == [(step, "health") for step in (0, 2, 4, 8, 9)]
    one, other = (AuditRun.load(output) for output in (straight, stopped))
    assert [record.step for record in other.records] == [0, 2, 3, 4, 8, 9]
    assert [row.step for row in one.training_log] == [row.step for row in other.training_log]
    for record, again in zip(one.records, [each for each in other.records if each.step != 3], strict=True):
        assert math.isclose(record.margins.kl.mean, again.margins.kl.mean, rel_tol=1e-12)


def test_the_configuration_of_a_budget_is_refused_outside_of_it() -> None:
    from align_audit.errors import ConfigurationError

    for budget in (0.0, 1.0, -0.1, 5):
        with pytest.raises(ConfigurationError, match="budget"):
            AuditConfig(budget=budget)
