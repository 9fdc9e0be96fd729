"""Before the first step: what cannot work is refused, on all processes together, and the run's log is opened or set aside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.auditing.check import check_audit
from align_audit.auditing.session.open_models import OpenModels
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, ConfigurationError, listed, named, pass_exit_on, plain
from align_audit.models.anatomy import Anatomy
from align_audit.models.reference import Reference, policy_fingerprint, resolve_reference
from align_audit.models.weights.sharded import refuse_sharded
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import BREAKS, AuditFailure, Moment, Outcome
from align_audit.monitoring.pace import Pace
from align_audit.monitoring.resumed_writers import start_writers
from align_audit.monitoring.schedule import Due, Event, Training
from align_audit.monitoring.trainer import TrainerFacts
from align_audit.probes.pairs import ProbeSet
from align_audit.ranks import Agreed, Ranks, Status, told
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.messages import OnAlert
from align_audit.writers.registry import writers_for
from align_audit.writers.terminal import progress_bar
from align_audit.writers.words import duration
from align_audit.writers.writer import Surroundings, Writers

logger = logging.getLogger(__name__)

_CHECKED = 2**20 + 1
"""Where processes meet before they try what every audit needs."""
_REFUSED = 2**20 + 2
"""Where they meet after it, to tell each other what came of it."""


@dataclass(frozen=True)
class Run:
    """What is found out when training begins, and holds until it ends."""

    facts: TrainerFacts
    reference: Reference
    monitor: Monitor
    pace: Pace
    ranks: Ranks
    anatomy: Anatomy | None = None

    def begin_pace(self, training: Training) -> int | None:
        """Start the clocks; the step of the first look, as this process plans it."""
        self.pace.begin(training)
        return self.pace.next_look

    def affordable(self, due: Due, training: Training) -> Due | None:
        """What is due, as the budget allows it; None: nothing, which is said of the first checkpoint. Clocks differ from
        process to process: the first one's word holds."""
        log = self.monitor.log
        if due.optional and log is not None and any(head.step == training.step for head in log.records.heads):
            # Passed by, not made again, and what it left is handed on: a run that was killed, an alert that saves.
            due = replace(due, optional=False)
        chosen = self.ranks.share(self.pace.choose(due, training))
        if (
            chosen is None
            and due.kind == "full"
            and log is not None
            and self.monitor.failures.is_first("a checkpoint was left out")
        ):
            self._say_left_out(log, training)
        return chosen

    def escalation(self, made: Due, outcome: Outcome, training: Training) -> Due | None:
        """The full audit that a look's alerts call for; None: they call for none, or for one that a warning is not worth, which
        is said the first time."""
        config = self.monitor.config
        if not outcome.opened or made.kind != "health" or not config.schedule.escalate:
            return None
        if outcome.failed or self.ranks.share(self.pace.escalates(training)):
            return Due("full", f"a health audit warns: {', '.join(outcome.opened)}")
        if self.monitor.log is not None and self.monitor.failures.is_first("a warning was not escalated"):
            takes = self.pace.spent(training).expected_full
            assert takes is not None and config.budget is not None
            logger.warning(
                "align_audit: a look warns at step %d, and the full audit that would say where takes about %s, for which the "
                "budget of %s of the run has no room; it is made should this become an error (said once). To have it for a "
                "warning, raise AuditConfig(budget=...) or schedule.escalate_seconds",
                training.step, duration(takes), f"{config.budget:.1%}",
            )  # fmt: skip
        return None

    def say_unaudited(self, event: Event, training: Training) -> None:
        """At the end of a training: that its last step has no audit, where its weights were gone before one could be made."""
        log, due = self.monitor.log, self.monitor.config.schedule.on_last_step and self.pace.audited_at != training.step
        if event is Event.TRAIN_END and training.best_loaded and due and log is not None:
            logger.warning(
                "align_audit made no audit of the last step, %d: training was stopped by a callback that comes after this one, "
                "and the best checkpoint was loaded in its place. Where EarlyStoppingCallback is passed first, there is one",
                training.step,
            )

    def _say_left_out(self, log: RunLog, training: Training) -> None:
        """That a checkpoint gets no audit, and what to do about it."""
        spent, budget = self.pace.spent(training), self.monitor.config.budget
        assert budget is not None
        takes = "" if spent.health is None else f" takes about {duration(spent.health)} and"
        logger.warning(
            "align_audit leaves out the audit of the checkpoint of step %d: a look%s does not fit the budget of %s of the run "
            "yet, and training goes on. Others may follow without a word (said once). To have more checkpoints audited, raise "
            "AuditConfig(budget=...) or save less often; `align-audit run %s --probes PAIRS` (and --reference MODEL, if not "
            "an adapter) audits those that were saved, afterwards",
            training.step, takes, f"{budget:.1%}", plain(log.directory.parent),
        )  # fmt: skip

    def moment(self, due: Due, training: Training, *, at_start: bool) -> Moment:
        """An audit that is due now."""
        self.pace.audited_at = training.step
        return Moment(
            training.step,
            due.kind,
            due.reason,
            training,
            due.unaffordable,
            at_start=at_start,
            beta=self.facts.beta,
            learning_rate=self.facts.learning_rate,
            last_sync_step=self.facts.last_sync_step(training.step),
            compare_precomputed=self.facts.compare_precomputed,
        )

    def models(self, policy: nn.Module, due: Due) -> OpenModels:
        """The policy as it is now, and its reference, for an audit that is due."""
        return OpenModels(
            policy,
            self.reference,
            autocast=self.facts.numerics(policy),
            anatomy=self.anatomy,
            ranks=self.ranks,
            # That a reference moved which should not is noticed at the next full audit.
            rehash=due.kind == "full" or self.facts.sync_every is not None,
        )


def begin_run(
    policy: nn.Module,
    given_reference: nn.Module | str | Path | None,
    probe_sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
    facts: TrainerFacts,
    *,
    step: int,
    ranks: Ranks,
    writes: bool,
    anatomy: Anatomy | None,
    on_alert: OnAlert | None = None,
) -> Run:
    """Find the reference, try what every audit needs, and open what is written to, all processes together.

    Args:
        step: at which training begins, or goes on.
        writes: this process keeps the log, draws and shows.

    Raises:
        ConfigurationError, ReferenceUnavailableError, AnatomyError: audits could not work.
    """
    refuse_other_pairs(ranks, probe_sets)
    refuse_sharded_models(policy, given_reference, facts)
    reference = find_reference(policy, given_reference, facts)
    check(policy, reference, probe_sets, config, facts.numerics(policy), anatomy, ranks)
    training_log: TrainingLog | None = None
    around = Surroundings(
        Path(facts.output_dir),
        tuple(probe_sets),
        facts.summary_writer,
        on_alert,
        lambda: () if training_log is None else training_log.rows,
        trackers=facts.trackers,
    )
    writers = checked_writers(config, around) if writes else None  # before a log is opened, or set aside
    log = RunLog(facts.output_dir) if writes else None
    if ranks.share(log is not None and step == 0 and len(log.records) > 0):
        policy_hash = policy_fingerprint(policy, ranks)
        if log is not None:
            set_aside_another(log, policy_hash, probe_sets, config, facts.output_dir)
    if log is not None:
        log.go_on(step)
    training_log = TrainingLog(facts.output_dir, implicit_rewards=facts.beta is not None) if writes else None
    if training_log is not None:
        training_log.go_on(step)  # else the first looks are judged by what a course had logged that is trained anew
    pace = Pace(config, step, pairs_per_step=facts.pairs_per_step)
    monitor = Monitor(
        probe_sets,
        config,
        log,
        ranks=ranks,
        writers=None if log is None or writers is None else start_writers(writers, log),
        progress=progress_bar if writes and config.progress and facts.progress else None,
        strict=config.strict,
        training_log=training_log,
        pace=pace,
    )
    monitor.resume(step + 1)
    return Run(facts, reference, monitor, pace, ranks, anatomy)


def refuse_other_options(ranks: Ranks, config: AuditConfig) -> None:
    """All processes audit with the same options, or none does.

    Raises:
        ConfigurationError: one has others.
    """
    said = ranks.gather(config.to_dict())
    for rank, options in enumerate(said):
        if options != said[0]:
            odd = ", ".join(sorted(name for name, value in options.items() if value != said[0].get(name)))
            raise ConfigurationError(
                f"rank {rank} audits with other options than rank 0 ({odd}); expected the same AuditConfig on all ranks"
            )


def refuse_other_pairs(ranks: Ranks, probe_sets: Mapping[str | None, ProbeSet]) -> None:
    """All processes audit the same pairs, which they share among them, or none does.

    Raises:
        ConfigurationError: one has others.
    """
    said = ranks.gather({name: probes.content_hash for name, probes in probe_sets.items()})
    for rank, hashes in enumerate(said):
        if hashes != said[0]:
            names = {name for name in (*hashes, *said[0]) if hashes.get(name) != said[0].get(name)}
            called = "" if None in names else f" ({listed([repr(name) for name in sorted(filter(None, names))])})"
            raise ConfigurationError(
                f"rank {rank} audits other probe pairs{called} than rank 0; expected the same pairs on all ranks. Split the "
                "data with a seed (train_test_split(..., seed=0)), or pass pairs of one file (probes=...)"
            )


def refuse_together(ranks: Ranks, error: BaseException | None) -> None:
    """All processes go on, or none does: one that is missing would be waited for in training's first step.

    Args:
        error: what this process met; None: it can go on.

    Raises:
        ConfigurationError: another process cannot go on.
    """
    failure = None if error is None or isinstance(error, Agreed) else AuditFailure.of(error)
    said = ranks.gather(failure)
    if error is not None and not isinstance(error, Agreed):
        raise error
    for rank, reported in enumerate(said):
        if reported is not None:
            raise ConfigurationError(f"training cannot be audited: on rank {rank} {reported.kind}")


def refuse_sharded_models(policy: nn.Module, given: Any, facts: TrainerFacts) -> None:
    """Refuse models whose weights are spread over processes, before any of them is called.

    Raises:
        ConfigurationError: one is.
    """
    refuse_sharded(policy, "the policy")
    for model, what in ((facts.reference, "the trainer's ref_model"), (given, "the reference")):
        if isinstance(model, nn.Module):
            refuse_sharded(model, what)


def find_reference(policy: nn.Module, given: nn.Module | str | Path | None, facts: TrainerFacts) -> Reference:
    """The reference that the trainer trains against (see :func:`resolve_reference`).

    Raises:
        ConfigurationError: it moves during training, and is out of reach.
        ReferenceUnavailableError: there is none.
    """
    if facts.sync_every is not None and not facts.attached and not isinstance(given, nn.Module):
        raise ConfigurationError(
            "sync_ref_model=True moves the trainer's reference during training, and only the trainer holds it. "
            "Call callback.attach(trainer) after building the trainer."
        )
    return resolve_reference(
        policy, given, facts.reference, trust_remote_code=facts.trust_remote_code, revision=facts.revision
    )


def check(
    policy: nn.Module,
    reference: Reference,
    probe_sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    anatomy: Anatomy | None,
    ranks: Ranks,
) -> None:
    """Find out now what would otherwise break every audit (raises as :func:`check_audit`)."""
    refusal: BaseException | None = None
    ranks.check(_CHECKED)  # what broke on another process before this is not an outcome of the check
    try:
        with ranks.together():
            check_audit(policy, reference, probe_sets.values(), config, autocast=autocast, anatomy=anatomy, ranks=ranks)
    except Agreed:
        pass  # what it was, that process says below
    except AlignAuditError as error:
        refusal = error
    except BREAKS as error:
        pass_exit_on(error)
        # Not a finding of ours: let the first audit meet it, where it is recorded and training goes on.
        logger.warning("align_audit could not check its set-up: %s", named(error))
    ranks.check(_REFUSED)
    refused = ranks.any(refusal is not None)
    if refusal is not None:
        raise told(refusal)
    if refused:
        raise Agreed(Status.ERROR)


def set_aside_another(
    log: RunLog, policy_hash: str, probe_sets: Mapping[str | None, ProbeSet], config: AuditConfig, output_dir: str
) -> None:
    """Set the audits of a log aside, if they are of another run that began in the same folder."""
    if not continues(log.records, policy_hash, probe_sets, config):
        aside = log.set_aside()
        warnings.warn(
            f"{output_dir} holds the audits of an earlier run, and training starts again from step 0: they "
            f"were moved to {aside.name}",
            stacklevel=2,
        )


def continues(
    records: Iterable[AuditRecord],
    policy_hash: str,
    probe_sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
) -> bool:
    """Does a training that begins from step 0 go on with a log that holds these records? Else they are set aside."""
    return all(_begins_so(record, policy_hash, probe_sets, config) for record in records)


def _begins_so(
    record: AuditRecord, policy_hash: str, probe_sets: Mapping[str | None, ProbeSet], config: AuditConfig
) -> bool:
    """Is this what our own first audit would find: the same start, read on the same probes in the same way?"""
    provenance = record.provenance
    probes = probe_sets.get(provenance.probe_name)
    return (
        record.step == 0
        and provenance.policy_hash == policy_hash
        and probes is not None
        and provenance.probe_hash == probes.content_hash
        and config.measures_as(provenance.config)
    )


def checked_writers(config: AuditConfig, around: Surroundings) -> Writers:
    """What shows the run, not started yet: that it could be was found out without any effect.

    Raises:
        ConfigurationError: one of the writers could not write.
    """
    writers = writers_for(config, around)
    writers.check()
    return writers
