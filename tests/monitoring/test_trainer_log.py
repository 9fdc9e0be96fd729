"""The trainer's log on one process of several: what it heard alone, and where it tells the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_audit.config import AlertConfig
from align_audit.monitoring.failures import Failures
from align_audit.monitoring.schedule import Due, Event
from align_audit.monitoring.trainer_log import LogMeetings, TrainerLog
from align_audit.ranks import Ranks
from align_audit.record import training_log
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.writer import Writers

CONFIG = AlertConfig(
    rules={"planted": {"signal": "loss", "above": 1.0}, "steep": {"signal": "grad_norm", "above": 1.0}}
)


@dataclass(frozen=True)
class Meeting(Ranks):
    """Two processes, of which this one writes down when it would wait for the other."""

    met: list[Any] = field(default_factory=list)

    def share(self, value: Any) -> Any:
        self.met.append(value)
        return value


def heard(folder: Path, *, strict: bool = False) -> TrainerLog:
    return TrainerLog(TrainingLog(folder), CONFIG, Failures(RunLog(folder), Writers(), size=2), strict=strict)


def test_what_was_heard_is_told_once_where_all_are(tmp_path: Path) -> None:
    log, ranks = heard(tmp_path), Meeting(0, 2)
    log.hear(1, {"loss": 0.5}, 10)
    assert log.agree(ranks) is None
    log.hear(2, {"loss": 5.0}, 10)
    log.hear(3, {"loss": 5.0, "grad_norm": 9.0}, 10)
    assert ranks.met == [None], "hearing is no meeting"
    first = log.agree(ranks)
    assert first is not None
    assert (first.kind, first.optional, first.later) == ("health", False, True)
    assert "loss is 5, above 1" in first.reason
    assert log.agree(ranks) is None
    assert [row.step for row in log.judged] == [1, 2, 3]


def test_what_wavers_about_a_limit_asks_for_looks_that_may_be_left_out(tmp_path: Path) -> None:
    """Else a loss that lies on a limit has the policy looked at every few steps, whatever the budget."""
    log, ranks = heard(tmp_path), Meeting(0, 2)
    asked = []
    for step, (loss, norm) in enumerate([(5.0, 0.5), (0.5, 0.5), (5.0, 0.5), (0.5, 0.5), (5.0, 9.0), (0.5, 0.5)], 1):
        log.hear(step, {"loss": loss, "grad_norm": norm}, 10)
        asked.append(log.agree(ranks))
    assert [None if due is None else due.optional for due in asked] == [False, None, True, None, False, None]
    log.hear(7, {"loss": 5.0, "grad_norm": 0.5}, 10)
    log.hear(8, {"loss": 0.5, "grad_norm": 0.5}, 10)
    later = log.agree(ranks)
    assert later is not None and later.optional, "it is told though it is over by then"


def test_what_was_logged_after_the_audit_of_its_step_waits_for_the_next_step() -> None:
    """Its weights are not audited again, and nothing else would look at what it says."""
    meetings = LogMeetings()
    again, first = (
        Due("health", f"the training log: {said}", optional=said == "again", later=True) for said in ("again", "first")
    )
    assert meetings.asked(first, audited=False) == first
    assert meetings.asked(None, audited=False) is None, "asked for once"
    assert meetings.asked(again, audited=True) is None
    assert meetings.asked(first, audited=True) is None
    assert meetings.asked(None, audited=True) is None
    assert meetings.asked(None, audited=False) == first, "what must be made is not left out with what may be"
    assert meetings.asked(None, audited=False) is None


def test_a_process_that_keeps_no_log_hears_nothing_and_agrees(tmp_path: Path) -> None:
    log = TrainerLog(None, CONFIG, Failures(None, Writers(), rank=1, size=2))
    log.hear(2, {"loss": 5.0}, 10)
    assert log.agree(Meeting(1, 2)) is None
    assert log.judged == []


def test_an_error_waits_for_the_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    log = heard(tmp_path, strict=True)
    monkeypatch.setattr(training_log, "append_whole", full)
    log.hear(2, {"loss": 5.0}, 10)
    with pytest.raises(OSError, match="no space left"):
        log.agree(Meeting(0, 2))
    assert log.agree(Meeting(0, 2)) is None, "raised once"


@pytest.mark.parametrize("due", ["should_log", "should_evaluate", None])
@pytest.mark.parametrize("size", [1, 2])
def test_processes_meet_before_a_step_where_the_trainers_log_was_due_and_alone_one_always_does(
    due: str | None, size: int
) -> None:
    meetings, ranks = LogMeetings(), Ranks(0, size)
    control: Any = SimpleNamespace(should_log=due == "should_log", should_evaluate=due == "should_evaluate")
    meetings.foresee(control)
    assert not meetings.at(Event.STEP_END, ranks), "the log comes after it"
    assert all(meetings.at(event, ranks) for event in (Event.EVALUATE, Event.SAVE, Event.EPOCH_END, Event.TRAIN_END))
    assert meetings.at(Event.STEP_BEGIN, ranks) == (due is not None or size == 1)
    meetings.foresee(SimpleNamespace(should_log=False, should_evaluate=False))  # type: ignore[arg-type]
    assert meetings.at(Event.STEP_BEGIN, ranks) == (size == 1)
