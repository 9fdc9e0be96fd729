"""When a run was harmed, by what its model says; when an alert said so; and whether a number of SPINAL did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align_audit.record.audit_record import AuditRecord
from replication.stored import StoredRun

HARMED = 0.75
"""Share of the reference's next-token accuracy on chosen answers: below it, with its interval, a model is harmed."""

SIGNALS: dict[str, Callable[[AuditRecord], float]] = {
    "delta_align": lambda record: record.spinal.delta_align if record.spinal else float("nan"),
    "coherence": lambda record: record.spinal.coherence if record.spinal else float("nan"),
    "gradient_concentration": lambda record: (
        record.spinal.gradient_concentration.mean if record.spinal else float("nan")
    ),
    "score": lambda record: record.spinal.score if record.spinal else float("nan"),
}


def harmed(record: AuditRecord) -> bool:
    """Does the policy predict the chosen answers far worse than the reference?"""
    return record.margins.token_accuracy.high < HARMED * record.margins.reference_token_accuracy.mean


def first_harm(run: StoredRun) -> int | None:
    """The step of the first full audit of the first slice that shows harm, none where none does."""
    return next((record.step for record in run.course if harmed(record)), None)


def first_alert(run: StoredRun, level: str = "error") -> tuple[int, int, str] | None:
    """The first alert of a level, or of ``any``, in the looks of a run: number of the look (0: before training), step, rule."""
    for number, record in enumerate(sorted(run.looks, key=lambda look: look.step)):
        for alert in record.alerts:
            if alert.level == level or level == "any":
                return number, record.step, alert.rule
    return None


def outside(run: StoredRun, others: Sequence[StoredRun], signal: Callable[[AuditRecord], float], until: int) -> bool:
    """Was a signal of a run, at an audit up to ``until``, further from what other runs had then than these are apart?

    Any less, and the extreme one of equal runs would be outside.
    """
    for record in run.course:
        if not 0 < record.step <= until:
            continue
        usual = [signal(each) for other in others for each in other.course if each.step == record.step]
        if len(usual) < 2:
            continue
        width = max(usual) - min(usual)
        if not min(usual) - width <= signal(record) <= max(usual) + width:
            return True
    return False


def told(ruined: Sequence[StoredRun], usual: Sequence[StoredRun]) -> dict[str, tuple[list[bool], int]]:
    """Of each signal: whether it told of each harmed run by its harm, and in how many usual runs it would have spoken.

    A usual run is judged by the others.
    """
    judged = {}
    for name, signal in SIGNALS.items():
        in_time = []
        for run in ruined:
            harm = first_harm(run)
            in_time.append(harm is not None and outside(run, usual, signal, harm))
        last = usual[0].setup.audited[-1]
        false = sum(outside(run, [each for each in usual if each is not run], signal, last) for run in usual)
        judged[name] = in_time, false
    return judged
