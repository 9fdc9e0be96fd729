"""A run that goes on where it was stopped or killed, and one that begins again in the same folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import align_audit.monitoring.monitor
from align_audit import AuditRecord, AuditRun
from align_audit.alerts import detectors
from align_audit.record.course import present_course
from align_audit.record.training_log import TrainingLog
from tests.helpers.callback_runs import (
    At,
    quick,
    run,
    shift_weight,
    steps,
)

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps with a checkpoint; then a new trainer and callback resume up to step 4. Later tests go on from there."""
    output = tmp_path_factory.mktemp("resumed") / "out"
    every = quick(schedule={"every_n_steps": 1})
    run(output, every, max_steps=2, lr_scheduler_type="constant")
    first = (output / "align_audit" / "records.jsonl").read_bytes()
    run(output, every, max_steps=4, resume=True, lr_scheduler_type="constant")
    return SimpleNamespace(output=output, first=first, config=every)


def test_a_resumed_run_continues_its_log(resumed: Any) -> None:
    log = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    assert log.startswith(resumed.first), "what was logged stays"
    records = AuditRun.load(resumed.output).records
    assert [record.step for record in records] == [0, 1, 2, 3, 4]
    assert len({record.provenance.policy_hash for record in records}) == 5
    assert len({record.provenance.reference_hash for record in records}) == 1
    assert records[0].reference_check.verdict == "passed"
    assert records[3].reference_check.verdict == "not_run", "step 3 is no start"


def test_steps_trained_again_to_the_same_weights_are_not_audited_again(
    resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: the log is ahead of the last checkpoint."""
    before = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", None)  # strict: would raise
    checkpoint = str(resumed.output / "checkpoint-2")
    run(resumed.output, resumed.config, max_steps=4, resume=checkpoint, lr_scheduler_type="constant")
    assert (resumed.output / "align_audit" / "records.jsonl").read_bytes() == before


def killed(**_: Any) -> None:
    raise InterruptedError("killed")


def angles(record: AuditRecord) -> dict[str, list[float] | None]:
    """Principal angles at layer 1 to the audit before, by basis."""
    return {basis: by_layer[1].principal_angles for basis, by_layer in record.low_rank.items()}


@pytest.mark.parametrize(("every", "budget"), [(2, None), (6, 1e-6)], ids=["whatever it costs", "without room"])
def test_a_killed_run_goes_on_with_the_numbers_of_one_that_was_not(
    every: int, budget: float | None, tmp_path: Path
) -> None:
    """Its log is ahead of its checkpoint: the audit of step 4 is passed by, and that of step 6 goes on from it; also where
    the budget would leave the checkpoint of step 4 out."""
    config = quick(
        schedule={"every_n_steps": every, "health": False},
        low_rank={"layers": [1], "ranks": [1, 2], "random_draws": 0},
    )
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2}
    straight, stopped = tmp_path / "straight" / "out", tmp_path / "stopped" / "out"
    run(straight, config, **options)
    with pytest.raises(InterruptedError):
        run(stopped, config, others=[At("on_step_end", 5, killed)], **options)
    assert steps(stopped) == [0, 2, 4]
    run(stopped, config.model_copy(update={"budget": budget}), resume=str(stopped / "checkpoint-2"), **options)
    assert steps(stopped) == steps(straight) == [0, 2, 4, 6]
    records = {output: AuditRun.load(output).records for output in (straight, stopped)}
    assert all(angle is not None for angle in angles(records[straight][-1]).values())
    assert list(angles(records[straight][-1])) == ["activation", "shift"]
    for one, other in zip(records[straight], records[stopped], strict=True):
        assert one.key == other.key
        assert angles(one) == angles(other)


def test_an_audit_is_not_judged_by_later_steps(resumed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from step 2 on another course, step 3 is compared with 0 to 2, not with the old 3 and 4."""
    seen: dict[int, list[int]] = {}
    real = detectors.course_of

    def watched(record: Any, earlier: Any) -> Any:
        course = real(record, earlier)
        seen.setdefault(record.step, [each.step for each in course])
        return course

    monkeypatch.setattr(detectors, "course_of", watched)
    checkpoint = str(resumed.output / "checkpoint-2")
    run(resumed.output, resumed.config, max_steps=3, resume=checkpoint, lr_scheduler_type="constant", beta=1.0)
    assert seen == {3: [0, 1, 2]}
    assert steps(resumed.output) == [0, 1, 2, 3, 3, 4], "other weights at step 3 are another record"
    course = present_course(AuditRun.load(resumed.output).records)
    assert [record.step for record in course] == [0, 1, 2, 3]


@pytest.mark.parametrize("begins", [0, 2])
@pytest.mark.parametrize("logging_steps", [2, 4, 500])
def test_a_look_is_not_judged_by_what_an_abandoned_course_logged(
    begins: int, logging_steps: int, tmp_path: Path
) -> None:
    """It comes before this course has logged so far: a run that is begun again with a lower learning rate must not be told, nor
    stopped, for what the one before came to."""
    rule = {"planted": {"signal": "grad_norm", "above": 1e6, "level": "error"}}
    config = quick(schedule={"on_save": False, "first_health": 4}, alerts={"action": "stop", "rules": rule})
    options: dict[str, Any] = {"save_steps": 2, "logging_steps": logging_steps, "lr_scheduler_type": "constant"}
    if begins:
        run(tmp_path / "out", config, max_steps=2, **options)
    left = TrainingLog(tmp_path / "out")
    for step in (3, 4, 5, 6):
        left.append(step, {"grad_norm": 1e9})
    left.sync()
    trained = run(tmp_path / "out", config, max_steps=6, resume=bool(begins), **options)
    assert trained.trainer.state.global_step == 6
    assert 4 in steps(tmp_path / "out")
    assert [alert.rule for alert in AuditRun.load(tmp_path / "out").alerts if alert.rule == "planted"] == []


def test_starting_from_scratch_sets_the_earlier_log_aside(resumed: Any) -> None:
    earlier = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    with pytest.warns(UserWarning, match=r"starts again from step 0.*previous-1"):
        run(resumed.output, resumed.config, max_steps=1, save_strategy="no")
    log = resumed.output / "align_audit"
    assert (log / "previous-1" / "records.jsonl").read_bytes() == earlier
    assert (log / "previous-1" / "step-4" / "arrays.safetensors").exists()
    assert steps(resumed.output) == [0, 1]
    assert not (log / "step-4").exists()


def test_an_audit_of_the_same_start_is_kept_and_of_another_is_set_aside(tmp_path: Path) -> None:
    """A run that ended before its second audit, and began again."""
    first = {"schedule": {"on_save": False, "on_last_step": False}}
    log = tmp_path / "out" / "align_audit"
    run(tmp_path / "out", quick(**first), max_steps=1, save_strategy="no")
    earlier = (log / "records.jsonl").read_bytes()
    run(tmp_path / "out", quick(**first), max_steps=1, save_strategy="no")
    assert (log / "records.jsonl").read_bytes() == earlier
    assert not (log / "previous-1").exists()
    with pytest.warns(UserWarning, match="previous-1"):
        run(tmp_path / "out", quick(**first, max_pairs=3), max_steps=1, save_strategy="no")
    assert (log / "previous-1" / "records.jsonl").read_bytes() == earlier
    (record,) = AuditRun.load(tmp_path / "out").records
    assert record.provenance.pairs == 3
    moved = [At("on_train_begin", 0, shift_weight)]
    with pytest.warns(UserWarning, match="previous-2"):  # the same, from other weights
        run(tmp_path / "out", quick(**first, max_pairs=3), others=moved, max_steps=1, save_strategy="no")
    assert len(AuditRun.load(tmp_path / "out").records) == 1
