"""What an audit asks of the trainer, at each event and step; and events in which something breaks."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_utils import rotate_checkpoints

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.monitoring import monitor
from align_audit.monitoring import wishes as module
from align_audit.monitoring.outcome import Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Event
from align_audit.ranks import Ranks
from align_audit.record.log import RunLog
from tests.helpers.callback_runs import At, quick, run, stop
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


@pytest.mark.parametrize("best", [None, 1, 2, 3])
@pytest.mark.parametrize("healthy", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 4])
def test_what_a_checkpoint_would_cost_is_what_the_trainer_deletes(
    limit: int | None, healthy: int, best: int | None, tmp_path: Path
) -> None:
    def put(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (step, step))
        return folder

    folders = [put(step) for step in (1, 2, 3)]
    wishes, kept = module.Wishes(folder=str(tmp_path), limit=limit), None if best is None else str(folders[best - 1])
    control: Any = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    alerts: list[Any] = [SimpleNamespace(checkpoint=None), SimpleNamespace(checkpoint=f"checkpoint-{healthy}")]
    wishes.meet(Event.STEP_BEGIN, control, kept)
    wishes.hand_over(dataclasses.replace(SAVES, alerts=alerts), control, 4, Event.STEP_END)
    put(4)
    rotate_checkpoints(str(tmp_path), limit, kept, use_mtime=True)
    assert control.should_save is folders[healthy - 1].is_dir()


def worse(history: Any) -> str | None:
    return "planted" if history.record.step >= 3 else None


@pytest.mark.parametrize("action", ["save", "stop"])
def test_the_checkpoint_to_go_back_to_is_not_deleted_for_one_of_a_ruined_model(
    action: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = {"every_n_steps": 1, "before_training": False, "health": False, "on_last_step": False, "on_save": False}
    rules = {"planted": {"check": worse, "level": "error"}}
    callback = AlignmentAuditCallback(config=quick(schedule=schedule, alerts={"action": action, "rules": rules}))
    trained = build(tmp_path / "out", "ref_model passed", [callback], max_steps=3, save_steps=2, save_total_limit=1)
    callback.attach(trained.trainer)
    trained.trainer.train()
    # The trainer's own save of its last step comes with the end, whatever an alert says.
    assert (
        "align_audit saves no checkpoint at step 3, for what it saw there (planted): it would cost checkpoint-2, the one "
        in (caplog.text)
    )


@pytest.mark.parametrize(("accumulated", "ended"), [(1, 2), (2, 1)])
def test_a_stop_before_a_step_says_where_training_ends(
    accumulated: int, ended: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A step of one batch is trained first; one of several is left after the first of them."""
    schedule = {
        "before_training": False,
        "on_last_step": False,
        "on_save": False,
        "escalate": False,
        "first_health": 100,
    }
    odd = {"planted": {"signal": "grad_norm", "above": 1e-9, "level": "error"}}
    callback = AlignmentAuditCallback(config=quick(schedule=schedule, alerts={"action": "stop", "rules": odd}))
    batches = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2}
    trained = build(tmp_path / "out", "ref_model passed", [callback], max_steps=4, save_steps=100, **batches)
    callback.attach(trained.trainer)
    trained.trainer.train()
    assert trained.trainer.state.global_step == ended
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{ended}"]
    assert f"align_audit stops training at step {ended}: planted" in caplog.text
    assert f"align_audit saves a checkpoint at step {ended}, for what it saw at step 1: planted" in caplog.text


def test_a_last_step_whose_weights_are_gone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped by a callback after ours, with the best checkpoint loaded: at no event of ours was it the last step."""
    callback = AlignmentAuditCallback(config=quick(schedule={"health": False, "on_save": False}))
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "epoch"}
    options: dict[str, Any] = {"max_steps": 12, "load_best_model_at_end": True, **best}
    early: Any = At("on_evaluate", 8, stop)
    trained = build(tmp_path / "out", "ref_model passed", [callback, early], **options)
    callback.attach(trained.trainer)
    trained.trainer.train()
    assert trained.trainer.state.global_step == 8
    assert "align_audit made no audit of the last step, 8: training was stopped by a callback" in caplog.text


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
