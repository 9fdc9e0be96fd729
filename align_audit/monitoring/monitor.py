"""The life of an audit: previous → audit → judge → store → tell → act; and what happens when it breaks.

Every run of audits goes through :class:`Monitor`: training with the callback, and saved checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from align_audit.alerts.advice import advise
from align_audit.alerts.detectors import judge
from align_audit.auditing.audit import run_audit
from align_audit.auditing.costs.foresight import full_per_look
from align_audit.auditing.previous import PreviousAudit, left_by
from align_audit.auditing.request import AuditRequest, AuditResult
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, named, pass_exit_on, plain
from align_audit.monitoring.failures import Failures
from align_audit.monitoring.outcome import BREAKS, Findings, Moment, Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.trainer_log import TrainerLog
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Agreed, Ranks
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditKind, AuditRecord
from align_audit.record.course import course_of
from align_audit.record.course_checkpoints import checkpoints_of_course
from align_audit.record.log import RunLog
from align_audit.record.pair_texts import PairTexts
from align_audit.record.step_files import arrays_name
from align_audit.record.stored_records import Head, chosen
from align_audit.record.training_log import TrainingLog
from align_audit.writers.writer import Writers

logger = logging.getLogger(__name__)

Key = tuple[int, str, str | None, AuditKind]
"""What marks an audit in a run: step, hash of the policy's weights, name of the probe set, how much was measured."""


class Monitor:
    """Audits that belong together: they share a log, are judged by those before them, and go on where those stopped.

    What breaks in an audit is recorded with its traceback and shown once, and never leaves :meth:`audit`.

    Args:
        probe_sets: by name; None for a single one without a name.
        log: where records go; None on processes other than the first, which audit for their share of the work only.
        ranks: the processes of the run.
        writers: those that are told of every record; they were started.
        progress: makes a progress bar of so many batches.
        strict: an audit that breaks is recorded, and raised on all processes.
        pace: the run's clocks, which plan the next look; None where nothing trains.
        training_log: what the trainer logs, kept beside the records.
    """

    def __init__(
        self,
        probe_sets: Mapping[str | None, ProbeSet],
        config: AuditConfig,
        log: RunLog | None = None,
        *,
        ranks: Ranks | None = None,
        writers: Writers | None = None,
        progress: Callable[[int, str], Any] | None = None,
        strict: bool = False,
        pace: Pace | None = None,
        training_log: TrainingLog | None = None,
    ) -> None:
        self.pace = pace
        self.probe_sets = probe_sets
        self.config = config
        self.log = log
        self.writers = writers if writers is not None else Writers()
        self.strict = strict
        self._ranks = ranks if ranks is not None else Ranks()
        self.failures = Failures(log, self.writers, rank=self._ranks.rank, size=self._ranks.size, strict=strict)
        self.trainer_log = TrainerLog(training_log, config.alerts, self.failures, strict=strict)
        self._progress = progress
        self._cache = ReferenceCache(None if log is None else log.directory / "cache")
        self._previous: dict[str | None, PreviousAudit] = {}
        self._per_look: dict[bool, float | None] = {}
        """How many times a look's work that of a full audit is, by whether the look is the first."""
        self._stored: set[Key] = set() if log is None else set(map(_key_of, log.records.heads))
        """What an earlier process has audited, until this one comes by it."""
        self._audited: set[Key] = set(self._stored)

    def agree(self) -> None:
        """Let all processes know what is in the log, which only the first one reads. All of them call it together."""
        self._audited = self._ranks.share(self._audited)

    def resume(self, step: int) -> None:
        """Go on from what the log holds of steps before ``step``, instead of the audit made last."""
        self._previous = {}
        if self.log is not None:
            for name, probes in self.probe_sets.items():
                earlier = comparable(self.log.records, name, probes.content_hash, step, kind="full")
                self._previous[name] = left_by(earlier[-1] if earlier else None, self.log)

    def due(self, step: int, policy_hash: str, kind: AuditKind = "full") -> list[str | None]:
        """The probe sets on which these weights were not audited yet at this step, so much or more."""
        kinds: tuple[AuditKind, ...] = ("full",) if kind == "full" else ("health", "full")
        return [
            name
            for name in self.probe_sets
            if not any((step, policy_hash, name, each) in self._audited for each in kinds)
        ]

    def audit(self, models: OpenModels, moment: Moment) -> Outcome:
        """Audit every set that is due. The models are closed then.

        Raises:
            AlignAuditError: an audit broke on another process, with ``strict``; on this one its own error is raised.
        """
        findings = Findings(strict=self.strict)
        next_look = self._audit_due(models, moment, findings)
        # The one place where processes wait for each other: whatever happened before, each of them comes here. What
        # follows is made of what all of them said, so that they save together and stop together.
        said = self._ranks.gather((findings.alerts, findings.failures, next_look))
        failures = [replace(failure, rank=rank) for rank, (_, broken, _) in enumerate(said) for failure in broken]
        for failure in failures:
            self.failures.record(moment.step, failure, heard=True)
        if self.strict and failures:
            if findings.error is not None:
                raise findings.error
            raise AlignAuditError(f"the audit broke on rank {failures[0].rank}: {failures[0].kind}")
        # Also after a failure: an alert of a set that was audited before it is as true. The first process judges.
        return Outcome.of(findings.records, said[0][0], failures, self.config.alerts, said[0][2])

    def tell(self, record: AuditRecord) -> None:
        """Let the writers show an audit, among those of the log, and what is new of its alerts."""
        self.writers.record(record, [] if self.log is None else self.log.records)
        for alert in record.alerts:
            if alert.event != "open":
                self.writers.alert(alert, record)
        if self.log is not None:
            self.log.note_told(record)

    def close(self) -> None:
        """Let go of the writers, of the log and of the other processes, all of these together."""
        self.writers.close()
        self.trainer_log.sync()
        if self.log is not None:
            self.log.close()
        self._ranks.close()
        self._ranks = Ranks()

    def _audit_due(self, models: OpenModels, moment: Moment, findings: Findings) -> int | None:
        """Audit what is due; the step of the next look, as this process plans it. Nothing that breaks leaves it."""
        training, pace, next_look = moment.training, self.pace, None
        with findings.collecting(), contextlib.nullcontext() if pace is None else pace.timed(moment.kind):
            self._audit_sets(models, moment, findings)
        if pace is not None and training is not None:
            with findings.collecting():
                if self.log is not None and any(head.step == moment.step for head in self.log.records.heads):
                    pace.see(moment.step)  # now, or before; one that broke is none
                # After its time was booked: what this moment has cost is no time of training.
                next_look = pace.plan(training)
        return next_look

    def _audit_sets(self, models: OpenModels, moment: Moment, findings: Findings) -> None:
        with self._ranks.together():
            policy_hash = models.policy_hash
            if self.log is not None:
                self.log.come_by(moment.step, policy_hash)
            # The first process's word: an audit that all of them make together is due for all of them.
            due = self._ranks.share(self.due(moment.step, policy_hash, moment.kind))
            for name in self.probe_sets:
                if name not in due:
                    self._pass_by((moment.step, policy_hash, name, "full"))
        if not due:
            return
        with models:
            self._foresee(models, moment)
            for name in due:
                if not self._tried(models, moment, name, findings) and self.strict:
                    break  # else the other probe sets are audited all the same

    def _tried(self, models: OpenModels, moment: Moment, name: str | None, findings: Findings) -> bool:
        """Audit one probe set, and where a full audit of a training breaks, look at it: what broke may be no part of a look,
        and a run whose full audits all break is not to go unseen at the steps for which they were planned.

        Returns:
            Whether the audit that was asked for was made.
        """
        look: Key = (moment.step, models.policy_hash, name, "health")
        # An audit that breaks would break again on the same weights.
        self._audited.add((*look[:3], moment.kind))
        try:
            with self._ranks.together():
                self._audit_set(models, moment, name, findings)
            return True
        except (*BREAKS, Agreed) as error:
            findings.fail(error, name)
        if moment.kind == "full" and moment.training is not None and not self.strict:
            reason = f"{moment.reason}; the full audit broke".removeprefix("; ")
            # The first process's word, as of what is due. Where a writer broke, the audit itself is in the log.
            if self._ranks.share(look not in self._audited and name not in findings.records):
                self._tried(models, replace(moment, kind="health", reason=reason), name, findings)
        return False

    def _foresee(self, models: OpenModels, moment: Moment) -> None:
        """Before a look: how much more work a full audit would be, by which the first one is judged."""
        if self.pace is None or moment.kind != "health" or not self.pace.guesses:
            return
        first = not self.pace.looked
        if first not in self._per_look:
            self._per_look[first] = None
            try:
                self._per_look[first] = full_per_look(models, self.probe_sets.values(), self.config, first=first)
            except BREAKS as error:
                # A look is not lost, nor are other processes left waiting, for what it only helps to plan.
                pass_exit_on(error)
                logger.warning(
                    "what a full audit costs could not be counted; it is judged by its layers", exc_info=True
                )
        self.pace.expect_full(self._per_look[first])

    def _agreed_previous(self, name: str | None) -> PreviousAudit:
        """What the previous audit left; where the next one begins is for the first process to say, which has the log."""
        previous = self._previous.get(name, PreviousAudit())
        return replace(previous, attribution=self._ranks.share(previous.attribution))

    def _pass_by(self, key: Key) -> None:
        """An audit that an earlier process made hands on what it left, as if it had been made now."""
        if key in self._stored and self.log is not None:
            self._stored.discard(key)
            record = self.log.records.where(lambda head: _key_of(head) == key)[-1]
            self._previous[record.provenance.probe_name] = left_by(record, self.log)

    def _audit_set(self, models: OpenModels, moment: Moment, name: str | None, findings: Findings) -> None:
        """One probe set; what its record says in alerts is in ``findings`` before anything is written."""
        probes = self.probe_sets[name]
        request = AuditRequest(
            probes,
            self.config,
            moment.step,
            kind=moment.kind,
            probe_name=name,
            at_start=moment.at_start,
            beta=moment.beta,
            last_sync_step=moment.last_sync_step,
            compare_precomputed=moment.compare_precomputed,
            previous=self._agreed_previous(name),
        )
        result = run_audit(models, request, self._cache, self._progress)
        self._previous[name] = result.left
        if self.log is None:
            return
        record = result.record if moment.origin is None else moment.origin.noted(result.record)
        if moment.kept:
            record = record.model_copy(update={"extra": {**record.extra, **moment.kept}})
        if self.pace is not None and moment.training is not None:
            occasion = self.pace.occasion(record, moment.reason, moment.training, moment.unaffordable)
            record = self.pace.priced(record, occasion, moment.training)
        record = record.model_copy(update={"alerts": self._judged(record, moment)})
        findings.records[name] = record
        # Acted on whatever follows: neither a full disk nor a closed terminal makes them untrue.
        findings.alerts += record.alerts
        news, refused = _stored(self.log, record, result, self.failures)
        self.trainer_log.sync()
        # Writers come after the log: what breaks in one of them costs no record. What the log holds already is no news.
        if news:
            self.tell(record)
        if refused is not None:
            raise refused

    def _judged(self, record: AuditRecord, moment: Moment) -> list[Alert]:
        """What is open at an audit, and what to do about it."""
        assert self.log is not None
        earlier = course_of(record, self.log.records)
        rows = self.trainer_log.judged
        broken = self.failures.broken
        alerts = judge(record, earlier, rows, self.config.alerts, max_steps=moment.max_steps, broken=broken)
        knobs = {"beta": moment.beta, "learning_rate": moment.learning_rate}
        folder = moment.saved_in or self.log.directory.parent
        # Saved checkpoints are audited when all of them are there.
        there = checkpoints_of_course(folder, [] if moment.training is None else earlier) if alerts else {}
        return advise(
            alerts,
            earlier,
            rows,
            checkpoints=there,
            output_dir=str(folder),
            in_training=moment.training is not None,
            **knobs,
        )


def _stored(log: RunLog, record: AuditRecord, result: AuditResult, failures: Failures) -> tuple[bool, OSError | None]:
    """Write an audit to its log, what is large first: whether it is news, and what the disk has refused of it.

    A full disk takes neither the record from those who are told of it (a webhook, a tracker, a function of the user's), nor a
    line of it from the log that there may be room for.
    """
    news, refused = True, None
    try:
        log.save_arrays(record.step, arrays_name(record.provenance.probe_name), result.arrays)
    except OSError as error:
        refused = error
    _keep_texts(log, record, result.texts, failures)
    try:
        news = log.append(record)
    except OSError as error:
        refused = error
    return news, refused


def _keep_texts(log: RunLog, record: AuditRecord, texts: Callable[[], PairTexts] | None, failures: Failures) -> None:
    """Keep what changed in text. An audit without it is still one: what breaks is said once, and nothing else."""
    if texts is None:
        return
    try:
        log.save_texts(record, texts())
    except BREAKS as error:
        pass_exit_on(error)
        kind = f"texts: {type(error).__name__}"
        if failures.is_first(kind):
            logger.warning(
                "what changed in text at step %d could not be kept: %s. The audit was made all the same, and reports show "
                "it without texts (shown once)",
                record.step, plain(named(error), 300),
            )  # fmt: skip


def _key_of(head: Head) -> Key:
    return head.step, head.policy_hash, head.probe_name, head.kind


def comparable(
    records: Sequence[AuditRecord],
    probe_name: str | None,
    probe_hash: str,
    step: int,
    kind: AuditKind | None = None,
) -> Sequence[AuditRecord]:
    """The audits of a log that one at ``step`` goes on from and is judged by, in the order of the log.

    They are of the same pairs under the same name: numbers of other pairs are no trend. And of earlier steps only: a
    resumed run may find later ones in its log, on the course it took before.

    Args:
        kind: those that measured so much; None: all.
    """
    return chosen(
        records,
        lambda head: (
            head.step < step
            and head.probe_name == probe_name
            and head.probe_hash == probe_hash
            and kind in (None, head.kind)
        ),
    )
