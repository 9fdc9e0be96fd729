"""What a run that goes on is judged by, and what it may go back to: nothing of the course that it left."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from align_audit.alerts import detectors
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import resolve_reference
from align_audit.monitoring.gone_on import GoneOn
from align_audit.monitoring.outcome import Moment
from align_audit.monitoring.schedule import Training
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.stored_records import Head
from tests.helpers.alert_cases import healthy, with_part
from tests.helpers.callback_runs import quick
from tests.helpers.monitor_bench import AT_ONCE


def made(step: int, ago: float = 0.0, weights: str = "", trained: bool = True) -> AuditRecord:
    """An audit of a step, so many seconds ago; ``trained``: of a training, not of a saved checkpoint."""
    created = datetime.fromtimestamp(time.time() - ago, UTC).isoformat(timespec="seconds")
    record = with_part(healthy(step), "provenance", created=created, policy_hash=weights or f"weights of {step}")
    return record.model_copy(update={"occasion": Occasion(reason="a look") if trained else None})


def saved(folder: Path, step: int, ago: float, state: bool = True) -> None:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    written = checkpoint
    if state:
        written = checkpoint / "trainer_state.json"
        written.touch()
    at = time.time() - ago
    os.utime(written, (at, at))


# -- audits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(0, 60, 10))
def test_audits_of_later_steps_are_of_the_course_that_was_left(step: int) -> None:
    stored = [made(at, 100) for at in range(0, 60, 10)]
    gone_on = GoneOn(step, [record.key for record in stored])
    new = made(step + 5)
    kept = [record.step for record in gone_on.course([*stored, new])]
    assert kept == [*range(0, step + 1, 10), step + 5]


def test_what_training_comes_by_again_is_of_its_course() -> None:
    stored = [made(at, 100) for at in (10, 20, 30)]
    gone_on = GoneOn(10, [record.key for record in stored])
    gone_on.meet(20, "weights of 20")
    gone_on.meet(30, "other weights")
    assert [record.step for record in gone_on.course(stored)] == [10, 20]


def test_without_a_resume_nothing_was_left() -> None:
    stored = [made(at, 100) for at in (10, 20)]
    assert GoneOn().course(stored) == stored


def test_an_alert_of_the_course_that_was_left_is_not_open_in_the_new_one(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after an alert at step 3; resumed from step 1, it is audited first at step 4."""
    judged_by: list[list[int]] = []
    real = detectors.course_of

    def watched(record: Any, earlier: Any) -> Any:
        course = real(record, earlier)
        judged_by.append([each.step for each in course])
        return course

    first = bench(quick(alerts=AT_ONCE))
    for step in (1, 2, 3):
        first.audit(step)
    assert [alert.event for alert in first.run.records[-1].alerts] == ["open"]
    second = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9}))
    second.monitor.resume(2)
    monkeypatch.setattr(detectors, "course_of", watched)
    second.audit(1, step=4)
    second.audit(2, step=5)
    assert judged_by == [[1], [1, 4]]


# -- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [True, False], ids=["with its state", "a folder alone"])
def test_checkpoints_of_later_steps_are_of_the_course_that_was_left(state: bool, tmp_path: Path) -> None:
    for step, ago in ((10, 300.0), (20, 200.0), (30, 100.0), (25, -100.0)):
        saved(tmp_path, step, ago, state)
    assert GoneOn(10).checkpoints(tmp_path, []) == {10: "checkpoint-10", 25: "checkpoint-25"}
    assert GoneOn(20).checkpoints(tmp_path, []) == {step: f"checkpoint-{step}" for step in (10, 20, 25)}
    assert sorted(GoneOn().checkpoints(tmp_path, [])) == [10, 20, 25, 30]


def test_those_of_a_course_that_an_earlier_process_left_are_told_by_the_audits_made_since(tmp_path: Path) -> None:
    """Trained to 30, resumed from 10 and trained to 40, with other checkpoints; now it goes on from 40."""
    for step, ago in ((10, 500.0), (20, 400.0), (30, 300.0), (40, 100.0)):
        saved(tmp_path, step, ago)
    heads = [Head.of(made(step, ago)) for step, ago in ((10, 500), (15, 200), (25, 150), (40, 100))]
    assert sorted(GoneOn(40).checkpoints(tmp_path, heads)) == [10, 40]
    ordinary = [Head.of(made(step, ago)) for step, ago in ((10, 500), (15, 450), (25, 350), (40, 100))]
    assert sorted(GoneOn(40).checkpoints(tmp_path, ordinary)) == [10, 20, 30, 40]


def test_audits_of_saved_checkpoints_are_made_after_all_of_them(tmp_path: Path) -> None:
    for step, ago in ((10, 500.0), (20, 400.0)):
        saved(tmp_path, step, ago)
    heads = [Head.of(made(10, 50, trained=False)), Head.of(made(20, 40, trained=False))]
    assert sorted(GoneOn(20).checkpoints(tmp_path, heads)) == [10, 20]


def test_clocks_that_are_a_little_apart_cost_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 20, 3.0)
    assert GoneOn(10).checkpoints(tmp_path, [Head.of(made(15, 0))]) == {20: "checkpoint-20"}


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert GoneOn(0).checkpoints(tmp_path / "gone", []) == {}


def test_an_alert_names_no_checkpoint_of_the_course_that_was_left(bench: Any) -> None:
    """Resumed from step 1, clean at step 4, and not at step 6: ``checkpoint-3`` is there, of the course before."""
    first = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9}))
    first.audit(1)
    saved(first.output, 1, 300.0)
    saved(first.output, 3, 200.0)

    def late(history: Any) -> str | None:
        return "It is late." if history.step > 5 else None

    second = bench(quick(alerts={"kl_warning": 1e9, "kl_error": 1e9, "rules": {"late": late}}))
    second.monitor.resume(2)
    for step, policy in ((4, second.policies[2]), (6, second.policies[3])):
        models = OpenModels(policy, resolve_reference(policy, second.reference))
        outcome = second.monitor.audit(models, Moment(step, training=Training(step, 9)))
    alert = next(alert for alert in outcome.alerts if alert.rule == "late")
    assert (alert.clean_step, alert.checkpoint) == (4, "checkpoint-1")
