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


def test_runs_on_shuffled_labels_are_told_of_and_healthy_ones_are_not() -> None:
    told = {
        kind: [(runs[kind][0].setup, run.seed, first_told(run)) for runs in load() for run in runs[kind]]
        for kind in ("healthy", "null")
    }
    assert len(told["healthy"]) >= 8 <= len(told["null"])
    assert [each for each in told["healthy"] if each[2] is not None] == []
    # One null run has learned a tenth of a nat by chance.
    assert sum(step is None for _, _, step in told["null"]) <= 1
    for setup, _, step in told["null"]:
        assert step is None or setup.steps / 2 <= step <= setup.steps * 0.65
