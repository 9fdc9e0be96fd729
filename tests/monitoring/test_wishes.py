"""What an audit asks of the trainer, at each event and step; and events in which something breaks."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.monitoring import monitor
from align_audit.monitoring import wishes as module
from align_audit.monitoring.outcome import Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Event
from align_audit.ranks import Ranks
from align_audit.record.log import RunLog
from tests.helpers.callback_runs import quick, run
from tests.helpers.dpo import build
from tests.monitoring.test_reference_modes import begin

SAVES = Outcome({}, [], [], ["planted"], save=True, stop=False)


@pytest.mark.parametrize("step", [0, 500])
@pytest.mark.parametrize(
    ("events", "wished", "saved"),
    [
        ([Event.TRAIN_BEGIN], True, 1),
        ([Event.TRAIN_BEGIN, Event.EVALUATE], True, 1),
        ([Event.STEP_BEGIN], True, 1),
        ([Event.STEP_BEGIN, Event.STEP_END], True, 0),
        ([Event.STEP_BEGIN, Event.STEP_END, Event.EVALUATE], True, 0),
        ([Event.STEP_BEGIN, Event.STEP_END, Event.EPOCH_END], True, 0),
        ([Event.STEP_BEGIN, Event.STEP_END, Event.SAVE], False, None),
        ([Event.STEP_BEGIN, Event.STEP_END, Event.EPOCH_END, Event.TRAIN_END], False, None),
    ],
)
def test_a_wish_to_save_is_made_where_the_trainer_hears_it(
    step: int, events: list[Event], wished: bool, saved: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a run that goes on from a checkpoint; and what is said names the step that will be saved."""
    wishes, event = module.Wishes(), events[-1]
    control: Any = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    for each in events:
        wishes.meet(each, control)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        wishes.hand_over(SAVES, control, step, event)
    assert control.should_save is wishes.unsaved is wished
    said = [entry.getMessage() for entry in caplog.records]
    if saved is not None:
        assert said == [
            f"align_audit saves a checkpoint at step {step + saved}, for what it saw at step {step}: planted"
        ]
    elif event is Event.TRAIN_END:
        assert said == [f"align_audit would save a checkpoint at step {step}, and training has ended: planted"]
    else:
        assert said == []


def test_the_trainer_is_told_again_until_it_has_saved(caplog: pytest.LogCaptureFixture) -> None:
    control: Any = SimpleNamespace(should_save=False, should_evaluate=True, should_training_stop=False)
    wishes = module.Wishes(saves_best=True)
    wishes.meet(Event.STEP_BEGIN, control)
    wishes.hand_over(SAVES, control, 3, Event.STEP_END)
    for event, told in (
        (Event.EVALUATE, False),
        (Event.STEP_BEGIN, False),
        (Event.STEP_END, True),
        (Event.EPOCH_END, True),
        (Event.SAVE, False),
        (Event.STEP_END, False),
    ):
        control.should_save = False
        wishes.meet(event, control)
        assert control.should_save is told
    wishes.meet(Event.TRAIN_END, control)
    assert "without one" not in caplog.text
    wishes.hand_over(SAVES, control, 4, Event.EPOCH_END)
    wishes.meet(Event.TRAIN_END, control)
    assert "align_audit asked for a checkpoint, and training has ended without one" in caplog.text


EVERY: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
RULES: dict[str, Any] = {"planted": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}


@pytest.mark.parametrize("action", ["save", "stop"])
@pytest.mark.parametrize(
    ("schedule", "options", "saved", "stopped"),
    [
        # A look, or a full audit, of a step that is evaluated and is not the best.
        ({"first_health": 2}, {"eval_strategy": "steps", "eval_steps": 2}, 3, 2),
        ({"every_n_steps": 2}, {"eval_strategy": "steps", "eval_steps": 2}, 3, 2),
        ({"on_evaluate": True}, {"eval_strategy": "steps", "eval_steps": 2}, 3, 2),
        # The first step that is not evaluated is the end of an epoch.
        ({"first_health": 2}, EVERY, 4, 2),
        ({"first_health": 2}, {"eval_strategy": "epoch"}, 2, 2),
        # Others save whatever an evaluation says, but not before the first step.
        ({"first_health": 2}, {**EVERY, "save_strategy": "no"}, 2, 2),
        ({"on_evaluate": True}, {**EVERY, "save_strategy": "no", "eval_on_start": True}, 1, 1),
    ],
)
def test_what_an_alert_asks_to_save_is_saved_however_the_trainer_saves(
    tmp_path: Path, action: str, schedule: dict[str, Any], options: dict[str, Any], saved: int, stopped: int
) -> None:
    """With ``save_strategy="best"`` each evaluation decides anew what is saved."""
    never = {"before_training": False, "on_save": False, "on_last_step": False, "escalate": False, "first_health": 100}
    # Before the first step nothing but the trainer's log can be odd.
    rules = {"planted": {**RULES["planted"], "signal": "eval_loss"}} if "eval_on_start" in options else RULES
    config = quick(schedule={**never, **schedule}, alerts={"action": action, "rules": rules})
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss"}
    callback = AlignmentAuditCallback(config=config)
    trained = build(tmp_path / "out", "ref_model passed", [callback], **{"max_steps": 6, **best, **options})
    trained.trainer._determine_best_metric = lambda metrics, trial: False
    callback.attach(trained.trainer)
    trained.trainer.train()
    there = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert there[:1] == [stopped if action == "stop" else saved]
    assert trained.trainer.state.global_step == (stopped if action == "stop" else 6)


def test_a_checkpoint_that_nobody_could_save_any_more_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The evaluation at the end of an epoch decides, and no event follows that it is stopped at."""
    schedule = {"before_training": False, "health": False, "on_last_step": False, "on_evaluate": True}
    callback = AlignmentAuditCallback(config=quick(schedule=schedule, alerts={"action": "stop", "rules": RULES}))
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "epoch"}
    trained = build(tmp_path / "out", "ref_model passed", [callback], **{"max_steps": 6, **best})
    trained.trainer._determine_best_metric = lambda metrics, trial: False
    callback.attach(trained.trainer)
    trained.trainer.train()
    assert trained.trainer.state.global_step == 4
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "align_audit asked for a checkpoint, and training has ended without one" in caplog.text


@pytest.mark.parametrize("broken", ["choose", "begin", "plan"])
def test_what_breaks_beside_an_audit_breaks_no_training(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the event that begins training on."""

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Pace, broken, breaks)
    trained = run(tmp_path / "out", quick(strict=False), max_steps=1, save_strategy="no")
    assert trained.trainer.state.global_step == 1
    failures = AuditRun.load(tmp_path / "out").failures
    assert {failure.step for failure in failures} >= {0}
    assert all("ZeroDivisionError: planted" in failure.error for failure in failures)


# -- a training that broke ---------------------------------------------------------------------------------------------


def test_a_training_that_broke_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No event says that it broke: the next one that begins lets go of its log, its writers and its word with others."""
    callback = AlignmentAuditCallback(config=quick())
    trained = build(tmp_path / "out", "ref_model made", [callback], max_steps=1)
    begin(trained, callback)
    assert callback._run is not None
    first, closed = callback._run.monitor, []
    ranks = first._ranks
    monkeypatch.setattr(Ranks, "close", lambda self: closed.append(self))
    callback._wishes.unsaved = True
    begin(trained, callback, attach=False)
    assert callback._run.monitor is not first
    assert first.log is not None and first.log._lock is None
    assert closed == [ranks]
    assert not callback._wishes.unsaved
    assert callback._training
    callback._end()


def test_a_training_that_we_end_ourselves_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``strict``: an evaluation afterwards is of no step."""

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    callback = AlignmentAuditCallback(config=quick(strict=True, schedule={"on_evaluate": True}))
    trained = build(tmp_path / "out", "ref_model made", [callback], max_steps=1)
    closed: list[RunLog] = []
    monkeypatch.setattr(monitor, "run_audit", breaks)
    monkeypatch.setattr(RunLog, "close", lambda self: closed.append(self))
    with pytest.raises(ZeroDivisionError):
        begin(trained, callback)
    assert callback._run is None and len(closed) == 1
    trainer = trained.trainer
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert len(AuditRun.load(tmp_path / "out").failures) == 1
