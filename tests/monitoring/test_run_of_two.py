"""One process of a run: what it takes from the first one, what it plans itself, and what breaks on it alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align_audit import AuditConfig, AuditRun
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import resolve_reference
from align_audit.monitoring import monitor as module
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import Moment, Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.schedule import Training
from align_audit.ranks import Ranks
from align_audit.record import training_log
from align_audit.record.audit_record import Occasion
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.writer import Writers
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

TRAINING = Training(step=1, max_steps=1000)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    reference = tiny_model("llama", dtype=torch.float32)
    return perturbed(reference), reference


def audited(monitor: Monitor, models: tuple[nn.Module, nn.Module]) -> Outcome:
    policy, reference = models
    return monitor.audit(OpenModels(policy, resolve_reference(policy, reference)), Moment(1, training=TRAINING))


@dataclass(frozen=True)
class Told(Ranks):
    """A process that is told by the first one which sets are due."""

    due: Any = ()

    def share(self, value: Any) -> Any:
        return list(self.due) if isinstance(value, list) else value


@pytest.mark.parametrize("due", [[], ["a"], ["b", "a"]])
def test_what_is_due_is_the_first_processs_word(
    due: list[str], models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process remembers what it has audited; all of them have to audit together."""
    asked: list[str | None] = []

    def watched(models: Any, request: Any, *_: Any) -> Any:
        asked.append(request.probe_name)
        raise ZeroDivisionError

    monkeypatch.setattr(module, "run_audit", watched)
    sets = {"a": random_pairs(4), "b": random_pairs(4, seed=1)}
    audited(Monitor(sets, quick(), RunLog(tmp_path), ranks=Told(due=due)), models)
    assert list(dict.fromkeys(asked)) == due, "where its full audit broke, a set is looked at"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A writer that takes much longer than the audit."""

    name = "slow"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self, *_: Any) -> None:
        self.clock.now += 500.0

    def alert(self, *_: Any) -> None:
        """Nothing."""


def test_the_next_look_is_planned_when_all_that_this_one_took_is_known(models: Any, tmp_path: Path) -> None:
    clock = Clock()
    pace = Pace(AuditConfig(), 0, clock=clock)
    pace.begin(Training(0, 1000))
    clock.now += 1.0
    writers: Any = Writers([Slow(clock)])
    monitor = Monitor({None: random_pairs(4)}, quick(), RunLog(tmp_path), writers=writers, pace=pace)
    planned: list[tuple[float, float]] = []
    real = pace.plan

    def plan(training: Training) -> int | None:
        spent = pace.spent(training)
        planned.append((spent.training, spent.audits))
        return real(training)

    pace.plan = plan  # type: ignore[method-assign]
    outcome = audited(monitor, models)
    assert planned[-1] == (1.0, 500.0), "writing was no training"
    assert outcome.next_look == pace.next_look


@pytest.mark.parametrize("came_through", ["none", "one set", "all"])
def test_an_audit_that_broke_stands_in_no_looks_place(
    came_through: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An audit of step 500 spares the look at step 640; not where it broke, also when it is asked for once more."""
    real = module.run_audit

    def watched(opened: Any, request: Any, *more: Any) -> Any:
        if came_through == "none" or (came_through == "one set" and request.probe_name == "a"):
            raise ZeroDivisionError("planted")
        return real(opened, request, *more)

    monkeypatch.setattr(module, "run_audit", watched)
    at = Training(500, 10_000)
    config = quick(budget=1e-6)
    planned = []
    for _ in range(2):  # in the process that made it, and in one that is resumed there
        pace = Pace(config, 0)
        pace.begin(Training(0, 10_000))
        log = RunLog(tmp_path)
        monitor = Monitor({"a": random_pairs(4), "b": random_pairs(4, seed=1)}, config, log, pace=pace)
        for _ in range(2):
            policy, reference = models
            pace.audited_at = 500
            opened = OpenModels(policy, resolve_reference(policy, reference))
            planned.append(monitor.audit(opened, Moment(500, training=at)).next_look)
        monitor.close()
    assert planned == [640 if came_through == "none" else 1280] * 4


def test_a_plan_that_breaks_is_a_failure_like_any(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(AuditConfig(), 0)
    monitor = Monitor({None: random_pairs(4)}, quick(), RunLog(tmp_path), pace=pace)

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pace, "occasion", lambda *_: Occasion(reason="planted"))
    monkeypatch.setattr(pace, "plan", breaks)
    outcome = audited(monitor, models)
    assert [failure.kind for failure in outcome.failures] == ["ZeroDivisionError: planted"]
    assert list(outcome.records) == [None]
    assert outcome.next_look is None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_breaks_on_one_process_alone_is_said_by_it(
    rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log where it keeps that; else with the traceback, since no other process knows."""
    log = RunLog(tmp_path) if rank == 0 else None
    monitor = Monitor({None: random_pairs(4)}, quick(), log, ranks=Ranks(rank, 2))
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        monitor.failures.fail(7, ValueError("planted"))
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert ("on rank 1" in said) == (rank == 1)
    assert "ValueError: planted" in said
    if rank == 0:
        assert [(failure.step, "planted" in failure.error) for failure in AuditRun.load(tmp_path).failures] == [
            (7, True)
        ]
        assert "was recorded" in said
    else:
        assert "could not be recorded (this process keeps no log)" in said
        assert "its traceback:\nValueError: planted" in said


@pytest.mark.parametrize("strict", [False, True])
def test_a_log_that_cannot_be_kept_is_looked_at_all_the_same(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    config = quick(alerts={"rules": {"planted": {"signal": "loss", "above": 1.0}}})
    monitor = Monitor(
        {None: random_pairs(4)}, config, RunLog(tmp_path), training_log=TrainingLog(tmp_path), strict=strict
    )
    monkeypatch.setattr(training_log, "append_whole", full)
    if strict:
        with pytest.raises(OSError, match="no space left"):
            monitor.trainer_log.add(3, {"loss": 5.0}, 10)
        return
    assert [suspicion.rule for suspicion in monitor.trainer_log.add(3, {"loss": 5.0}, 10)] == ["planted"]
    assert monitor.trainer_log.add(4, {"loss": 5.0}, 10) == [], "said once"
    assert [failure.step for failure in AuditRun.load(tmp_path).failures] == [3, 4]
