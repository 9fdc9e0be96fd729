"""Records and histories made to fire one alert rule, or none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from align_audit.alerts.curves import TrainerLog
from align_audit.alerts.detectors import DETECTORS, LOG_DETECTORS, judge
from align_audit.alerts.history import History, Sign, View
from align_audit.config import AlertConfig
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Control, Controls, Generations
from align_audit.record.estimate import Estimate
from align_audit.record.training_log import LogRow
from tests.helpers.make_record import make_record

CONFIG = AlertConfig()
FIRST_LIMITS = AlertConfig(
    chosen_drop_warning=0.6, chosen_drop_error=1.2, kl_warning=1.0, kl_error=2.0, entropy_ratio_low=0.25,
    entropy_ratio_high=2.0, entropy_ratio_low_error=0.1, entropy_ratio_high_error=9.0, token_accuracy_ratio_warning=0.55,
    token_accuracy_ratio_error=0.5,
)  # fmt: skip
"""Round limits that the cases of the tests lie on both sides of, whatever the defaults are."""
NAN = math.nan


def about(mean: float, half: float = 0.01) -> Estimate:
    """An estimate with an interval of twice ``half``."""
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def without_interval(mean: float) -> Estimate:
    """An estimate of too few pairs for an interval."""
    return Estimate(mean=mean, low=NAN, high=NAN, reason="an interval needs 8 independent pairs; found 4")


def healthy(step: int = 100, **parts: Any) -> AuditRecord:
    """An audit of a healthy run, without alerts. As in most runs, chosen completions lose a little."""
    record = make_record(step, progress=0.5, generations=texts(), alerts=[], **parts)
    return with_margins(record, chosen_logp_change_per_token=about(-0.05, 0.02))


def health(record: AuditRecord) -> AuditRecord:
    """The same as a health audit: nothing patched."""
    not_run = Control(verdict="not_run", reason="a health audit patches nothing")
    changes: dict[str, Any] = {"kind": "health", "patching": None, "localization": None, "spinal": None, "low_rank": {}}
    changes |= {"controls": Controls(**dict.fromkeys(Controls.model_fields, not_run)), "finding": None}
    return record.model_copy(update=changes)


def run(count: int = 3) -> list[AuditRecord]:
    """Audits of a healthy run so far; the first before training."""
    return [make_record(0, progress=0.0), *(healthy(step) for step in range(10, 10 * count + 1, 10))]


def texts(**changes: Any) -> Generations:
    """What healthy models write."""
    values: dict[str, Any] = {
        "prompts": 8, "max_new_tokens": 32, "repetition": about(0.1), "reference_repetition": about(0.1), "length": about(20.0),
        "reference_length": about(20.0), "ended": about(0.9), "reference_ended": about(0.9), "surprise": about(0.8),
        "reference_surprise": about(0.7),
    }  # fmt: skip
    return Generations(**(values | changes))


def with_margins(record: AuditRecord, **changes: Estimate) -> AuditRecord:
    """The record with these margins."""
    return record.model_copy(update={"margins": record.margins.model_copy(update=changes)})


def with_part(record: AuditRecord, part: str, **changes: Any) -> AuditRecord:
    """The record with these fields in one of its parts."""
    return record.model_copy(update={part: getattr(record, part).model_copy(update=changes)})


def with_texts(record: AuditRecord, **changes: Any) -> AuditRecord:
    """The record with these continuations."""
    return record.model_copy(update={"generations": texts(**changes)})


def on_set(record: AuditRecord, name: str | None) -> AuditRecord:
    """The record as one of another probe set."""
    return with_part(record, "provenance", probe_name=name)


def rows(values: dict[int, dict[str, float]]) -> list[LogRow]:
    """The trainer's log: step → what was logged."""
    return [LogRow(step, logs) for step, logs in values.items()]


def log_of(steps: Iterable[int], **columns: float) -> list[LogRow]:
    """A row a step, all alike; ``__`` in a name stands for ``/``."""
    return [LogRow(step, {name.replace("__", "/"): value for name, value in columns.items()}) for step in steps]


def sign(
    rule: str,
    record: AuditRecord,
    before: Sequence[AuditRecord] | None = None,
    config: AlertConfig = CONFIG,
    **seen: Any,
) -> Sign | None:
    """What one rule sees of a record."""
    before = run() if before is None else before
    return DETECTORS[rule](History(step=record.step, record=record, earlier=before, config=config, **seen))


def log_sign(
    rule: str, log: Sequence[LogRow], config: AlertConfig = CONFIG, max_steps: int | None = None
) -> Sign | None:
    """What one rule sees in the trainer's log."""
    curve = TrainerLog(log)
    return LOG_DETECTORS[rule](View(step=curve.step, config=config, log=curve, max_steps=max_steps))


def signs(
    record: AuditRecord, before: Sequence[AuditRecord] | None = None, config: AlertConfig = CONFIG
) -> dict[str, Sign]:
    """Rule → what it sees of a record, of those that see anything."""
    seen = {rule: sign(rule, record, before, config) for rule in DETECTORS}
    return {rule: found for rule, found in seen.items() if found is not None}


def alerts(
    record: AuditRecord, before: Sequence[AuditRecord] | None = None, config: AlertConfig = CONFIG, **known: Any
) -> list[Alert]:
    """The alerts of a record after a healthy run."""
    return judge(record, run() if before is None else before, known.pop("log", ()), config, **known)


def judged(
    records: Iterable[AuditRecord], config: AlertConfig = CONFIG, log: Sequence[LogRow] = (), **known: Any
) -> list[AuditRecord]:
    """A run, each record with the alerts that it raises after those before it."""
    done: list[AuditRecord] = []
    for record in records:
        done.append(record.model_copy(update={"alerts": judge(record, done, log, config, **known)}))
    return done
