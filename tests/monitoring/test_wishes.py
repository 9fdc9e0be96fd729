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
from tests.helpers.callback_runs import quick, run
from tests.helpers.dpo import build
from tests.monitoring.test_reference_modes import begin

SAVES = Outcome({}, [], [], ["planted"], save=True, stop=False)


@pytest.mark.parametrize("step", [0, 500])
@pytest.mark.parametrize(
    ("event", "at_once", "at_the_next_step", "saved"),
    [
        (Event.TRAIN_BEGIN, False, True, 1),
        (Event.STEP_BEGIN, True, False, 1),
        (Event.STEP_END, True, False, 0),
        (Event.EVALUATE, True, False, 0),
        (Event.EPOCH_END, True, False, 0),
        (Event.SAVE, False, False, None),
        (Event.TRAIN_END, False, False, None),
    ],
)
def test_a_wish_to_save_is_made_where_the_trainer_hears_it(
    step: int, event: Event, at_once: bool, at_the_next_step: bool, saved: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a run that goes on from a checkpoint; and what is said names the step that will be saved."""
    wishes = module.Wishes()
    control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        wishes.hand_over(SAVES, control, step, event)
    assert (control.should_save, wishes.save_next) == (at_once, at_the_next_step)
    said = [entry.getMessage() for entry in caplog.records]
    if saved is not None:
        assert said == [
            f"align_audit saves a checkpoint at step {step + saved}, for what it saw at step {step}: planted"
        ]
    elif event is Event.TRAIN_END:
        assert said == [f"align_audit would save a checkpoint at step {step}, and training has ended: planted"]
    else:
        assert said == []


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
    callback._wishes.save_next = True
    begin(trained, callback, attach=False)
    assert callback._run.monitor is not first
    assert first.log is not None and first.log._lock is None
    assert closed == [ranks]
    assert not callback._wishes.save_next
    assert callback._training
    callback._end()


def test_a_training_that_we_end_ourselves_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``strict``: an evaluation afterwards is of no step."""

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    callback = AlignmentAuditCallback(config=quick(strict=True, schedule={"on_evaluate": True}))
    trained = build(tmp_path / "out", "ref_model made", [callback], max_steps=1)
    monkeypatch.setattr(monitor, "run_audit", breaks)
    with pytest.raises(ZeroDivisionError):
        begin(trained, callback)
    assert callback._run is not None and callback._run.monitor.log is not None
    assert callback._run.monitor.log._lock is None
    trainer = trained.trainer
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert len(AuditRun.load(tmp_path / "out").failures) == 1
