"""A schedule played through: what is made when, and what it takes. That runs are as foreseen, ``test_looks`` holds."""

from __future__ import annotations

import itertools
import re
from itertools import pairwise
from pathlib import Path

import pytest

from align_audit.config import AuditConfig
from align_audit.monitoring.forecast import Costs, PlannedSteps, forecast

CHEAP = Costs(step=1.0, health=0.5, full=10.0)


def test_all_audits_together_keep_the_budget() -> None:
    run = forecast(AuditConfig(), PlannedSteps(2000, save_steps=500), CHEAP, layers=6)
    assert run.share <= 0.05
    assert [step for step, kind in run.audits if kind == "full"] == [500, 1000, 1500, 2000], "looks leave room for them"
    assert run.audit_seconds == run.count("health") * CHEAP.health + run.count("full") * CHEAP.full
    assert run.training_seconds == 2000


def test_a_first_look_comes_early_and_looks_never_stop() -> None:
    run = forecast(AuditConfig(), PlannedSteps(2000, save_steps=500), CHEAP, layers=6)
    steps = [step for step, _ in run.audits]
    assert run.first_look == 5
    assert steps == sorted(steps)
    assert steps[-1] == 2000
    assert max(later - earlier for earlier, later in pairwise(steps)) < 1000


def test_a_first_full_audit_is_made_where_its_counted_work_fits_the_budget() -> None:
    planned, costs = PlannedSteps(1000, save_steps=100), Costs(step=1.0, health=1.0, full=15.0)

    def full_audits(per_look: float | None) -> list[int]:
        run = forecast(AuditConfig(), planned, costs, layers=6, per_look=per_look)
        return [step for step, kind in run.audits if kind == "full"]

    assert full_audits(15.0)[0] < full_audits(24.0)[0]
    assert full_audits(None) == full_audits(4 + 3 * 6)


DOUBLINGS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)


def test_frequent_checkpoints_keep_the_budget() -> None:
    """An hour with a checkpoint every ten seconds; before, each of them was looked at, for a third of the run."""
    run = forecast(AuditConfig(), PlannedSteps(3600, save_steps=10), Costs(step=1.0, health=5.0, full=20.0), layers=6)
    whatever = (2 + len(DOUBLINGS)) * 5.0  # the start, the doublings, the last step
    assert run.audit_seconds <= 3600 * 0.05 / 0.95 + whatever
    assert run.share < 0.055
    made = {step for step, _ in run.audits}
    assert {0, 3600, *(step for step in DOUBLINGS if step <= 80)} <= made
    for first, second in itertools.pairwise([80, *(step for step in DOUBLINGS if step > 80)]):
        assert any(first < step <= second for step in made), "a doubling, or a checkpoint shortly before it"
    assert set(run.left_out) == set(range(10, 3600, 10)) - made
    assert len(run.left_out) > 300


def test_a_look_that_is_planned_is_made_at_a_checkpoint_shortly_before_it() -> None:
    """Looks that the budget has no room for are as many as without checkpoints; the two checkpoints are among them."""
    costs = Costs(step=1.0, health=20.0, full=300.0)
    saved = forecast(AuditConfig(), PlannedSteps(1000, save_steps=500), costs)
    assert [step for step, _ in saved.audits] == [0, 5, 10, 20, 40, 80, 160, 320, 500, 1000]
    assert saved.left_out == ()
    never = forecast(AuditConfig(), PlannedSteps(1000), costs)
    assert [step for step, _ in never.audits] == [0, 5, 10, 20, 40, 80, 160, 320, 640, 1000]


def test_the_guides_table_is_what_the_schedule_does() -> None:
    """Its numbers are written by hand, from the command below it."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d,]+) \| (\d+) s \| (\d+) \| (\d+) \| (\d+) \| (\d+) of (\d+) \| ([\d.]+) % \|$", text, re.M
    )
    assert len(rows) == 8
    for steps, look, save, *said in rows:
        planned = PlannedSteps(int(steps.replace(",", "")), int(save))
        costs = Costs(step=1, health=int(look), full=15 * int(look))
        run = forecast(AuditConfig(), planned, costs, per_look=15)
        counts = [run.count("health"), run.count("full"), len(run.left_out), planned.max_steps // int(save)]
        assert [*map(str, counts), f"{100 * run.share:.1f}"] == said


def test_checkpoints_leave_full_audits_their_part() -> None:
    run = forecast(
        AuditConfig(), PlannedSteps(20_000, save_steps=20), Costs(step=1.0, health=5.0, full=100.0), per_look=20.0
    )
    assert 0.04 < run.share <= 0.05
    full = [step for step, kind in run.audits if kind == "full"]
    assert len(full) > 3
    assert full[-1] == 20_000


def test_checkpoints_that_are_rare_come_before_looks_between_them() -> None:
    run = forecast(
        AuditConfig(), PlannedSteps(20_000, save_steps=500), Costs(step=1.0, health=5.0, full=100.0), per_look=20.0
    )
    assert run.share <= 0.05
    assert len(run.left_out) <= 4, "only while the doublings are paid for"
    assert max(run.left_out) <= 2500


@pytest.mark.parametrize("budget", [None, 0.5])
def test_where_there_is_room_no_checkpoint_is_left_out(budget: float | None) -> None:
    run = forecast(AuditConfig(budget=budget), PlannedSteps(200, save_steps=10), Costs(step=1.0, health=0.5, full=2.0))
    assert run.left_out == ()
    assert set(range(10, 201, 10)) <= {step for step, _ in run.audits}


def test_a_run_shorter_than_the_first_look_is_seen_at_its_end() -> None:
    assert forecast(AuditConfig(), PlannedSteps(4), CHEAP).first_look == 4


def test_with_nothing_scheduled_nothing_is_foreseen() -> None:
    never = {"before_training": False, "health": False, "on_save": False, "on_last_step": False}
    run = forecast(AuditConfig.from_dict({"schedule": never}), PlannedSteps(50, save_steps=10), CHEAP)
    assert (run.audits, run.first_look, run.share) == ((), None, 0.0)


def test_evaluations_and_fixed_steps_are_audited_whatever_they_cost() -> None:
    config = AuditConfig.from_dict(
        {
            "schedule": {
                "before_training": False,
                "health": False,
                "on_last_step": False,
                "on_evaluate": True,
                "every_n_steps": 4,
            }
        }
    )
    run = forecast(config, PlannedSteps(8, eval_steps=6), Costs(step=0.01, health=1.0, full=100.0))
    assert run.audits == ((4, "full"), (6, "full"), (8, "full"))


@pytest.mark.parametrize(("steps", "seconds"), [(0, 1.0), (5, 0.0)])
def test_steps_that_take_no_time_are_refused(steps: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="expected steps that take time"):
        forecast(AuditConfig(), PlannedSteps(steps), Costs(step=seconds, health=1.0, full=1.0))
