"""What an alert rule sees: the record to judge, those before it, and the run's own baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from align_audit.config import AlertConfig
from align_audit.record.audit_record import Alert, AlertLevel, AuditRecord
from align_audit.record.stored_records import chosen


@dataclass(frozen=True)
class History:
    """What a rule sees: the record to judge, and those before it, oldest first."""

    record: AuditRecord
    before: Sequence[AuditRecord]
    config: AlertConfig

    @property
    def healthy(self) -> Sequence[AuditRecord]:
        """Earlier audits of the trained policy that raised nothing above info: the run's own baseline."""
        return chosen(
            self.before, lambda head: head.step > 0 and not any(alert.level != "info" for alert in head.alerts)
        )

    def baseline(self, value: Callable[[AuditRecord], float]) -> float | None:
        """Median of ``value`` over the first healthy audits, or None before there are enough of them."""
        needed = self.config.baseline_audits
        # No more than these: each record that is looked at has to be parsed.
        finite = (number for record in self.healthy if math.isfinite(number := value(record)))
        first = list(islice(finite, needed))
        return median(first) if len(first) == needed else None

    def alert(
        self,
        rule: str,
        level: AlertLevel,
        value: float,
        message: str,
        suggestion: str,
        *,
        threshold: float | None = None,
        baseline: float | None = None,
        layers: Sequence[int] = (),
    ) -> Alert:
        """An alert of this record."""
        return Alert(
            rule=rule,
            level=level,
            step=self.record.step,
            layers=list(layers),
            value=value,
            baseline=baseline,
            threshold=threshold,
            message=message,
            suggestion=suggestion,
        )


def beyond(value: float, warning: float, error: float) -> AlertLevel | None:
    """The level of the limit that a value lies above; None where it lies above neither (or is NaN)."""
    if value > error:
        return "error"
    return "warning" if value > warning else None
