"""What the trainer logs: kept beside the records, looked at as it comes, and told to all processes where they all are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers.trainer_callback import TrainerControl

from align_audit.alerts.detectors import Suspicion, suspect
from align_audit.config import AlertConfig
from align_audit.errors import named, pass_exit_on
from align_audit.monitoring.failures import Failures
from align_audit.monitoring.outcome import BREAKS
from align_audit.monitoring.schedule import Due, Event
from align_audit.ranks import Ranks
from align_audit.record.training_log import LogRow, TrainingLog

logger = logging.getLogger(__name__)


class LogMeetings:
    """Where all processes come after the trainer's log, so that they can tell each other what was in it.

    The event of a log is no such place: another callback may call ``trainer.log`` on the first process alone. Evaluations,
    checkpoints and ends are; and the beginning of a step before which the trainer's own log was due. At other steps nobody
    waits, and what came in another callback's log between is told at the next of these.
    """

    def __init__(self) -> None:
        self._due = False
        self._late: Due | None = None
        """The look that a log asks for which came after the audit of its step."""

    def foresee(self, control: TrainerControl) -> None:
        """At the end of a step or an epoch: whether the trainer logs next, which all processes know."""
        self._due = self._due or control.should_log or control.should_evaluate

    def at(self, event: Event, ranks: Ranks) -> bool:
        """Whether this event is one; the same on all processes."""
        if event in (Event.TRAIN_BEGIN, Event.STEP_END):
            return False
        if event is not Event.STEP_BEGIN or ranks.size == 1:
            return True
        due, self._due = self._due, False
        return due

    def asked(self, due: Due | None, *, audited: bool) -> Due | None:
        """The look that the log asks for now; None: none, or one that waits for the next step: the same weights are not audited
        again.

        Args:
            due: what the log has asked for since the event before.
            audited: this step was audited, before that was logged.
        """
        due, self._late = self._late if due is None else due.with_pending(self._late), None
        if audited:
            due, self._late = None, due
        return due


class TrainerLog:
    """What the trainer logs, as the process that writes keeps it, and what is suspicious in it.

    A log may come on one process only: another callback may call ``trainer.log`` where it is the first. So :meth:`hear` talks
    to no other process; what it has heard waits for :meth:`agree`, which all processes call.

    Args:
        rows: where it is kept; None on processes that keep none, to which every log is news from elsewhere.
        failures: what the disk refuses.
        strict: what the disk refuses is raised.
    """

    def __init__(
        self, rows: TrainingLog | None, config: AlertConfig, failures: Failures, *, strict: bool = False
    ) -> None:
        self.kept = rows
        self._config = config
        self._failures = failures
        self._strict = strict
        self._suspected: set[str] = set()
        self._looked_for: set[str] = set()
        """Rules for which a look was asked before."""
        self._heard: Due | None = None
        self._error: BaseException | None = None

    @property
    def judged(self) -> Sequence[LogRow]:
        """The rows as rules read them, by step; none where this process keeps none."""
        return [] if self.kept is None else self.kept.judged

    def hear(self, step: int, logs: Mapping[str, object], max_steps: int | None) -> None:
        """Keep what was logged, and look at it; what came of that waits for :meth:`agree`. No other process takes part."""
        try:
            news = self.add(step, logs, max_steps)
        except BREAKS as error:
            pass_exit_on(error)
            self._error = self._error or error
            return
        if not news:
            return
        # What wavers about a limit asks again and again: after the first time only where the budget has room.
        again = {suspicion.rule for suspicion in news} <= self._looked_for
        self._looked_for |= {suspicion.rule for suspicion in news}
        if self._heard is None or (self._heard.optional and not again):
            self._heard = Due("health", f"the training log: {news[0].message}", optional=again, later=True)

    def agree(self, ranks: Ranks) -> Due | None:
        """The look that the first suspicion since this was called last asks for; None: there was none. The same on all
        processes.

        Raises:
            Exception: what broke in :meth:`hear` on this process since.
            Agreed: something did on another one.
        """
        heard, error = self._heard, self._error
        self._heard = self._error = None
        with ranks.together():
            if error is not None:
                raise error
        return ranks.share(heard)

    def add(self, step: int, logs: Mapping[str, object], max_steps: int | None) -> list[Suspicion]:
        """Keep what the trainer logs, and say what is newly suspicious in it; nothing where this process keeps no log.

        What cannot be kept is looked at all the same: the disk that refuses it is a failure of its own.

        Raises:
            OSError: it cannot be kept, with ``strict``.
        """
        if self.kept is None:
            return []
        try:
            self.kept.append(step, logs)
        except OSError as error:
            if self._strict:
                raise
            self._failures.fail(step, error)
        suspicions = suspect(self.kept.judged, self._config, max_steps=max_steps)
        news = [suspicion for suspicion in suspicions if suspicion.rule not in self._suspected]
        self._suspected = {suspicion.rule for suspicion in suspicions}
        return news

    def sync(self) -> None:
        """Wait until what was kept is on disk; where it cannot be, that is said, and costs no audit."""
        if self.kept is None:
            return
        try:
            self.kept.sync()
        except OSError as error:
            logger.error("the trainer's log in %s is not safe on disk: %s", self.kept.path, named(error))
