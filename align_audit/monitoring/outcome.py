"""When an audit is made, what came of it, and what broke in it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from align_audit.auditing.origin import Origin
from align_audit.config import AlertConfig
from align_audit.errors import named, pass_exit_on
from align_audit.monitoring.schedule import Training
from align_audit.ranks import Agreed
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditKind, AuditRecord

BREAKS = (Exception, SystemExit)
"""What must not leave an audit: a library that asks the process to end (rich does, when nobody reads its output any more)
ends an audit and no training. A keyboard interrupt is the user's, and passes, and so does what a handler of theirs asks for
(:func:`~align_audit.errors.pass_exit_on`)."""


@dataclass(frozen=True)
class Moment:
    """When an audit is made, and what is known of training then (see :class:`AuditRequest`).

    Attributes:
        kind: how much is measured.
        reason: why it is made, in words.
        training: what stands of training; None for a saved checkpoint.
        unaffordable: see :class:`~align_audit.monitoring.schedule.Due`.
        origin: of a saved checkpoint: what the log of its run says of it.
        planned: steps of the training that saved a checkpoint, where that is known.
        saved_in: the folder that the run's checkpoints lie in; None: the one that the log's folder lies in.
        kept: what else the record keeps, under ``extra``.
    """

    step: int
    kind: AuditKind = "full"
    reason: str = ""
    training: Training | None = None
    unaffordable: float | None = None
    at_start: bool = False
    beta: float | None = None
    learning_rate: float | None = None
    last_sync_step: int | None = None
    compare_precomputed: bool = True
    origin: Origin | None = None
    planned: int | None = None
    saved_in: Path | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_steps(self) -> int | None:
        """Of the run; None: not known."""
        return self.planned if self.training is None else self.training.max_steps


@dataclass(frozen=True)
class AuditFailure:
    """An audit that broke: what is said of it, and what is kept.

    Attributes:
        kind: the error in a line.
        probe_name: the probe set it was on, where that is known and has a name.
        rank: of the process that it broke on.
    """

    kind: str
    traceback: str
    probe_name: str | None = None
    rank: int = 0

    @classmethod
    def of(cls, error: BaseException, probe_name: str | None = None, rank: int = 0) -> Self:
        """What is worth telling other processes of an error."""
        return cls(named(error), "".join(traceback.format_exception(error)), probe_name, rank)


@dataclass(frozen=True)
class Outcome:
    """What came of the audits of one moment, and what it asks of training. Equal on all processes, but for ``records``.

    Attributes:
        records: of the sets that were audited, by name; empty where no log is kept.
        alerts: of all those sets.
        failures: on all processes, by rank.
        reasons: the rules of the alerts that are new, or got worse, and serious enough to act on; sorted.
        save, stop: a checkpoint is wished for; training should end.
        opened: the rules of warnings and errors that are new, or got worse, with this audit.
        failed: an error is among them.
        next_look: the step of the next health audit, as the process that writes has planned it.
    """

    records: Mapping[str | None, AuditRecord]
    alerts: list[Alert]
    failures: list[AuditFailure]
    reasons: list[str]
    save: bool
    stop: bool
    opened: list[str] = field(default_factory=list)
    failed: bool = False
    next_look: int | None = None

    @classmethod
    def of(
        cls,
        records: Mapping[str | None, AuditRecord],
        alerts: list[Alert],
        failures: list[AuditFailure],
        config: AlertConfig,
        next_look: int | None = None,
    ) -> Self:
        """With what the options say is to be done about these alerts."""
        serious = {"error"} if config.action_level == "error" else {"error", "warning"}
        news = [alert for alert in alerts if alert.event in ("opened", "worse")]
        reasons = sorted({alert.rule for alert in news if alert.level in serious})
        acts = bool(reasons) and config.action != "log"
        opened = sorted({alert.rule for alert in news if alert.level != "info"})
        failed = any(alert.level == "error" for alert in news)
        stop = acts and config.action == "stop"
        return cls(
            records, alerts, failures, reasons, save=acts, stop=stop, opened=opened, failed=failed, next_look=next_look
        )


@dataclass
class Findings:
    """Of one process, so far."""

    records: dict[str | None, AuditRecord] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    failures: list[AuditFailure] = field(default_factory=list)
    strict: bool = False
    error: BaseException | None = None
    """The first, where it is to be raised (``strict``); else none, as it would hold the models and all that was measured."""

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """What breaks inside is kept here, and goes no further."""
        try:
            yield
        except (*BREAKS, Agreed) as error:
            self.fail(error)

    def fail(self, error: BaseException, probe_name: str | None = None) -> None:
        if isinstance(error, Agreed):
            return  # that process says what it was
        pass_exit_on(error)
        failure = AuditFailure.of(error, probe_name)
        if self.strict:
            self.error = self.error or error
        else:
            without_frames(error)
        # A look that breaks as the full audit before it did is no second failure.
        if (failure.kind, probe_name) not in ((each.kind, each.probe_name) for each in self.failures):
            self.failures.append(failure)


def without_frames(error: BaseException) -> BaseException:
    """The same error, that no longer holds the models that it was raised beside."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
