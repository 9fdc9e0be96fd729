"""The trainer's log beside the records: append-only, whole lines, readable whatever a kill left."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow, TrainingLog, course_of, read_training_log, up_to


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    assert log.rows == []
    log.append(10, {"loss": 0.5, "rewards/margins": np.float32(0.25), "epoch": 1})
    log.append(20, {"eval_loss": 0.4, "eval_runtime": 3})
    expected = [
        LogRow(10, {"loss": 0.5, "rewards/margins": 0.25, "epoch": 1.0}),
        LogRow(20, {"eval_loss": 0.4, "eval_runtime": 3.0}),
    ]
    assert log.rows == expected
    assert TrainingLog(tmp_path).rows == expected
    lines = (tmp_path / "align_audit" / "training.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 10, "logs": {"loss": 0.5, "rewards/margins": 0.25, "epoch": 1.0}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_survive(tmp_path: Path, value: float) -> None:
    TrainingLog(tmp_path).append(1, {"loss": value})
    text = (tmp_path / "align_audit" / "training.jsonl").read_text()
    assert isinstance(json.loads(text, parse_constant=pytest.fail)["logs"]["loss"], str)
    (row,) = TrainingLog(tmp_path).rows
    assert str(row.logs["loss"]) == str(value)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1 + 2j, object(), 10**400])
def test_what_is_no_number_is_left_out(tmp_path: Path, value: Any) -> None:
    log = TrainingLog(tmp_path)
    assert log.append(1, {"loss": value}) is None
    assert log.append(2, {"loss": value, "grad_norm": 1.0}) == LogRow(2, {"grad_norm": 1.0})
    assert TrainingLog(tmp_path).rows == [LogRow(2, {"grad_norm": 1.0})]


def test_a_torn_last_line_is_moved_aside_by_the_next_run(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    log.append(1, {"loss": 0.5})
    log.append(2, {"loss": 0.4})
    whole = log.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):
        log.path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="in the middle of a line"):
            assert read_training_log(log.path) == [LogRow(1, {"loss": 0.5})]
    with pytest.warns(UserWarning, match="moved to training.jsonl.torn-1"):
        again = TrainingLog(tmp_path)
    again.append(2, {"loss": 0.3})
    assert read_training_log(log.path) == [LogRow(1, {"loss": 0.5}), LogRow(2, {"loss": 0.3})]


def test_lines_that_cannot_be_read_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_text(
        '{"step": 1, "logs": {"loss": 1}}\n{"step": "x", "logs": {}}\n[1]\n{"step": 2, "logs": {"loss": "NaN"}}\n'
    )
    with pytest.warns(UserWarning, match="skipped") as said:
        rows = read_training_log(path)
    assert [row.step for row in rows] == [1, 2]
    assert sorted(str(item.message)[:6] for item in said) == ["line 2", "line 3"]
    assert read_training_log(tmp_path / "absent.jsonl") == []


def test_a_resumed_run_has_the_rows_of_its_new_course() -> None:
    written = [LogRow(step, {"loss": float(place)}) for place, step in enumerate((10, 20, 20, 30, 40, 25, 30))]
    # An evaluation at the same step is a row of its own.
    written[2] = LogRow(20, {"eval_loss": 0.5})
    assert course_of(written) == [*written[:3], *written[5:]]
    rows = course_of(written)
    assert [row.step for row in up_to(rows, 25)] == [10, 20, 20, 25]
    assert up_to(rows, 30) is rows
    assert list(up_to(rows, 5)) == []


def test_a_step_that_is_made_again_is_logged_once() -> None:
    """A run that was killed after the step that it resumes from plus one, and logs that step again."""
    trained, evaluated = LogRow(4, {"loss": 0.5, "epoch": 1.0}), LogRow(4, {"eval_loss": 0.6, "epoch": 1.0})
    again = LogRow(4, {"loss": 0.4, "epoch": 1.0})
    assert course_of([LogRow(3, {"loss": 0.6}), trained, evaluated]) == [LogRow(3, {"loss": 0.6}), trained, evaluated]
    assert course_of([trained, again]) == [again]
    assert course_of([trained, evaluated, again]) == [evaluated, again]


SEEN: dict[str, dict[str, float]] = {
    "nothing": {},
    "tokens": {"epoch": 1.0, "num_input_tokens_seen": 4096.0},
}
"""What the trainer adds to rows of every kind."""
MEMORY = {"gpu_memory": 12.0}
"""What a user's callback adds to those of training and evaluations."""


@pytest.mark.parametrize("added", SEEN)
def test_rows_of_other_kinds_at_a_step_stand_beside_each_other(added: str) -> None:
    """As transformers logs them with ``include_num_input_tokens_seen``: the speed stands in rows of training, too."""
    speed = {"train_runtime": 9.0, "train_tokens_per_second": 300.0} if SEEN[added] else {}
    trained = LogRow(4, {"loss": math.nan, "grad_norm": math.nan} | speed | MEMORY | SEEN[added])
    helpful, harmless = (
        LogRow(4, {f"eval_{name}_loss": 0.6} | SEEN[added] | MEMORY) for name in ("helpful", "harmless")
    )
    summary = LogRow(4, {"train_runtime": 9.0, "train_loss": 0.5, "total_flos": 1e9} | SEEN[added])
    rows = [LogRow(3, {"loss": 0.7} | SEEN[added]), trained, helpful, harmless, summary]
    assert course_of(rows) == rows
    again = [replace(row, logs={name: value / 2 for name, value in row.logs.items()}) for row in rows[1:]]
    for place in range(1, len(again) + 1):
        course = course_of([*rows, *again[:place]])
        assert course == [rows[0], *rows[place + 1 :], *again[:place]], (
            "each replaces the row of its kind, and no other"
        )


def test_a_disk_that_refuses_loses_no_row_for_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(tmp_path)

    def refuse(path: Path, data: bytes, wait: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("align_audit.record.training_log.append_whole", refuse)
    with pytest.raises(OSError, match="No space left"):
        log.append(1, {"loss": 0.5})
    assert log.rows == [LogRow(1, {"loss": 0.5})]
    assert log.path.exists() is False


def test_a_run_that_is_read_back_has_it(tmp_path: Path) -> None:
    from align_audit.record.log import RunLog
    from tests.helpers.make_record import make_record

    log = RunLog(tmp_path)
    log.append(make_record(10, layers=2))
    assert list(AuditRun.load(tmp_path).training_log) == []
    TrainingLog(tmp_path).append(10, {"loss": 0.5})
    assert list(AuditRun.load(tmp_path).training_log) == [LogRow(10, {"loss": 0.5})]
    assert list(AuditRun.load(tmp_path / "align_audit" / "records.jsonl").training_log) == [LogRow(10, {"loss": 0.5})]


def test_rows_wait_for_no_disk_and_an_audit_waits_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, waited = TrainingLog(tmp_path), []
    monkeypatch.setattr(os, "fsync", waited.append)
    for step in range(50):
        log.append(step, {"loss": 0.5})
    assert waited == []
    assert len(read_training_log(log.path)) == 50, "another process sees them at once"
    log.sync()
    log.sync()
    assert len(waited) == 1, "once for all of them"
    log.append(50, {"loss": 0.5})
    log.path.unlink()
    with pytest.raises(OSError, match=r"training\.jsonl"):
        log.sync()


def test_rewards_that_are_no_log_ratios_are_kept_and_judged_by_no_rule(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, implicit_rewards=False)
    rows = [{"loss": 0.5, "rewards/margins": -1.0}, {"loss": 0.4, "eval_rewards/accuracies": 0.1}]
    for step, row in enumerate(rows, 1):
        log.append(step, row)
    log.append(2, {"loss": 0.3, "rewards/margins": -2.0})
    expected = [LogRow(1, {"loss": 0.5}), LogRow(2, {"loss": 0.3})]
    assert log.judged == expected, "a step that is made again replaces what it left"
    assert log.rows[0].logs["rewards/margins"] == -1.0
    assert TrainingLog(tmp_path, implicit_rewards=False).judged == expected
    assert TrainingLog(tmp_path).judged == log.rows


@pytest.mark.parametrize("implicit_rewards", [True, False])
@pytest.mark.parametrize(("step", "left"), [(-1, []), (0, [0]), (2, [0, 2]), (3, [0, 2]), (9, [0, 2, 4])])
def test_training_that_goes_on_leaves_the_rows_of_later_steps(
    step: int, left: list[int], implicit_rewards: bool, tmp_path: Path
) -> None:
    """Before it has logged anything itself, for whoever reads the file as well, which keeps them."""
    log = TrainingLog(tmp_path, implicit_rewards=implicit_rewards)
    for each in (0, 2, 4):
        log.append(each, {"loss": 0.6, "rewards/margins": 1.0})
    log.go_on(step)
    assert [row.step for row in log.rows] == [row.step for row in log.judged] == left
    assert [row.step for row in read_training_log(log.path)] == left
    assert log.path.read_text().count("loss") == 3
    log.append(3, {"loss": 0.5})
    there = [row.step for row in TrainingLog(tmp_path).rows]
    assert there == [each for each in left if each < 3] + [3]
