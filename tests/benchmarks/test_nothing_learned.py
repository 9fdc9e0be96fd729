"""``nothing_learned`` on real runs that no rule was made on: those of the replication, judged again by their looks."""

from __future__ import annotations

from replication.stored import StoredRun, load

from align_audit.alerts.detectors import judge
from align_audit.record.audit_record import AuditRecord


def first_told(run: StoredRun) -> int | None:
    """The step at which the rule opens an alert, or joins one."""
    done: list[AuditRecord] = []
    for look in run.looks:
        bare = look.model_copy(update={"alerts": []})
        found = judge(bare, done, max_steps=run.setup.steps)
        if any("nothing_learned" in (alert.rule, *alert.signals) for alert in found):
            return look.step
        done.append(bare.model_copy(update={"alerts": found}))
    return None


def test_of_runs_that_show_no_shift_at_their_end_nearly_all_are_told_of_and_of_the_others_none() -> None:
    """Whatever they were meant to be: a base of stories learns nothing of dialogues in 40 steps, on labels that are right."""
    runs = [(kind, run) for of_setup in load() for kind in ("healthy", "null") for run in of_setup[kind]]
    assert len(runs) >= 30
    told = {True: [], False: []}  # type: dict[bool, list[int | None]]
    for kind, run in runs:
        step, learned = first_told(run), run.looks[-1].margins.shift.low > 0.0
        assert kind == "null" or learned or run.setup.data == "hh-harmless"
        # Of the runs that came later some showed a shift for a while.
        late = 0.8 if run.setup.name in ("stories260k-hh-harmless-lora", "stories260k-stories-pairs-full") else 0.65
        assert step is None or run.setup.steps / 2 <= step <= run.setup.steps * late
        told[learned].append(step)
    assert len(told[True]) >= 13
    assert not any(told[True])
    assert len(told[False]) >= 17
    assert told[False].count(None) <= 1
