"""A monitor without a trainer, and what breaks or listens beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from align_audit import Alert, AuditConfig, AuditRecord, AuditRun
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.reference import resolve_reference
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import Moment, Outcome
from align_audit.record.log import RunLog
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import random_pairs

AT_ONCE: dict[str, Any] = {"rules": {"at_once": {"signal": "margins.kl", "above": 1e-9, "level": "error"}}}
"""Limits that any policy that has moved at all is beyond."""


class Bench:
    """A monitor on a log in ``output``, and audits of the policy of a step."""

    def __init__(
        self,
        reference: nn.Module,
        policies: list[nn.Module],
        output: Path,
        config: AuditConfig | None = None,
        **options: Any,
    ) -> None:
        self.reference, self.policies = reference, policies
        sets = options.pop("sets", {None: random_pairs(8)})
        log = options.pop("log", None) or RunLog(output)
        self.monitor = Monitor(sets, config or quick(), log, **options)
        self.output = output

    def audit(self, policy: int, step: int | None = None) -> Outcome:
        models = OpenModels(self.policies[policy], resolve_reference(self.policies[policy], self.reference))
        return self.monitor.audit(models, Moment(policy if step is None else step))

    @property
    def run(self) -> AuditRun:
        return AuditRun.load(self.output)


class Broken:
    """A method that breaks from now on, as a full disk would make it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(RunLog, name, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise OSError("no space left on device")


class Curves:
    """Stands for the TensorBoard curves."""

    name = "TensorBoard"

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.told: list[tuple[int, list[int]]] = []
        self.alerts: list[tuple[str, int]] = []
        self.closed = 0

    def start(self, run: AuditRun) -> None:
        raise AssertionError("started already")

    def record(self, record: AuditRecord, history: Any) -> None:
        if self.breaks:
            raise OSError("no space left on device")
        self.told.append((record.step, [each.step for each in history]))

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        self.alerts.append((alert.rule, record.step))

    def close(self) -> None:
        self.closed += 1
