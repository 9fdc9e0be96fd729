"""Saved checkpoints: audited one after the other into one run log, or looked at for what transfers."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.auditing.check import check_audit
from align_audit.auditing.origin import check_origin
from align_audit.auditing.probe_files import read_probes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.transfer import check_before_transfer, run_transfer
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, ConfigurationError, counted, named, pass_exit_on, plain
from align_audit.models.loading import check_place
from align_audit.models.reference import Reference, fingerprints, load_policy
from align_audit.models.saved_pair import check_saved
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import BREAKS, AuditFailure, Moment, without_frames
from align_audit.monitoring.resumed_writers import start_writers
from align_audit.monitoring.shared_reference import SharedReference
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord
from align_audit.record.audited_checkpoints import audited_checkpoints, note_checkpoint
from align_audit.record.checkpoint_names import as_called
from align_audit.record.log import RunLog
from align_audit.record.recorded import steps_planned
from align_audit.record.training_log import TrainingLog
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.messages import OnAlert, checked
from align_audit.writers.registry import OF_SAVED, writers_for
from align_audit.writers.terminal import progress_bar
from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)


@dataclass
class SavedAudits:
    """What came of a folder of checkpoints.

    Attributes:
        records: in the order of the checkpoints and, for each, of the probe sets.
        made: audits that were added to the log; of a checkpoint that broke on its second probe set, the first.
        in_log: checkpoints that an earlier start had audited.
        broken: why a checkpoint could not be audited, by its folder.
    """

    records: list[AuditRecord] = field(default_factory=list)
    made: int = 0
    in_log: list[Path] = field(default_factory=list)
    broken: dict[Path, BaseException] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """A checkpoint that is about to be audited.

    Attributes:
        number: from 1, of ``count``.
        seconds_left: for this one and the rest, as long as those that were audited took; None: none was yet.
    """

    folder: Path
    number: int
    count: int
    seconds_left: float | None


def audit_saved(
    checkpoints: Mapping[Path, int],
    reference: str | None,
    probes: str | Path | Mapping[str, str | Path],
    config: AuditConfig,
    output: str | Path,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = logger.error,
    on_alert: OnAlert | None = None,
    on_turn: Callable[[Turn], object] | None = None,
    fresh: bool = False,
) -> SavedAudits:
    """Audit each checkpoint (folder → step) against ``reference`` and append to the log in ``output``.

    With several probe sets (name → path), each checkpoint is opened once and audited on each of them.

    A checkpoint whose weights are in the log already, at that step, is not audited again. Alerts compare each with
    those before it. Of several checkpoints, one whose audit breaks is passed over, whatever broke it.

    Args:
        dtype: of policy and reference; None: the policy's.
        trust_remote_code: whether code that is saved with a model or tokenizer may run.
        tell: is given a line for each checkpoint that is passed over, and for what is not as its own run recorded it (see
            :mod:`align_audit.auditing.origin`).
        on_alert: is called with each alert that is news, and the record it was raised on (as of the callback).
        on_turn: is called before each checkpoint.
        fresh: begin an empty log as soon as a checkpoint was opened and can be audited, and move one that is there into a
            folder beside it; else it is gone on with.

    Raises:
        ConfigurationError: the log in ``output`` is another run's, no checkpoint could be audited, or a webhook has no URL.
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.audit`; of the
            only checkpoint, or of all together.
        Exception: what broke the audit of the only checkpoint.
    """
    if reference is not None:
        check_place(reference)
    with contextlib.closing(RunLog(output)) as log:
        sets = read_probes(probes, checkpoints, reference, config, trust_remote_code=trust_remote_code)
        # Those that an earlier start audited lie where they were, too.
        names = audited_checkpoints(log.directory) | {step: folder.name for folder, step in checkpoints.items()}
        around = Surroundings(Path(output), tuple(sets), on_alert=checked(on_alert), checkpoints=names)
        writers_for(config, around, OF_SAVED).check()  # before a log is set aside
        opening: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        if fresh and log.records and _can_be_audited(checkpoints, reference, sets, config, opening):
            _set_aside(log, tell)
        auditor = CheckpointAuditor(log, sets, config, reference, around, tell=tell, **opening)
        with contextlib.closing(auditor):
            return _some_of(_audit_each(checkpoints, auditor, log, tell, on_turn))


def _audit_each(
    checkpoints: Mapping[Path, int],
    auditor: CheckpointAuditor,
    log: RunLog,
    tell: Callable[[str], None],
    on_turn: Callable[[Turn], object] | None,
) -> SavedAudits:
    """Audit one after the other; of several, one that breaks is passed over."""
    audits, held = SavedAudits(), len(log.records)
    for folder, step in _in_turn(checkpoints, log, on_turn):
        stored = len(log.records)
        try:
            audits.records.extend(auditor.audit_folder(folder, step))
        except OtherAuditsError:
            raise
        except BREAKS as error:
            pass_exit_on(error)
            if len(checkpoints) == 1:
                raise
            audits.broken[folder] = without_frames(error)
            tell(
                f"{plain(folder.name)} is passed over: {error if isinstance(error, AlignAuditError) else named(error)}"
            )
        else:
            if len(log.records) == stored:
                audits.in_log.append(folder)
    audits.made = len(log.records) - held
    return audits


def _can_be_audited(
    checkpoints: Mapping[Path, int],
    reference: str | None,
    sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
    opening: Mapping[str, Any],
) -> bool:
    """Whether one of the checkpoints, the first that does, opens and has what every audit needs."""
    for folder in checkpoints:
        with contextlib.suppress(*BREAKS):  # the audit that follows meets it again, and says so
            check_saved(folder, reference)
            policy = load_policy(folder, reference=reference, **opening)
            resolved = SharedReference(reference, opening["trust_remote_code"]).of(policy)
            check_audit(policy, resolved, sets.values(), config, autocast=contextlib.nullcontext)
            return True
    return False


def _set_aside(log: RunLog, tell: Callable[[str], None]) -> None:
    count = len(log.records)
    audits, are = ("the audit that was", "is") if count == 1 else (f"the {counted(count, 'audit')} that were", "are")
    tell(f"{audits} in {log.directory} {are} in {log.set_aside().name} there now")


def _in_turn(
    checkpoints: Mapping[Path, int], log: RunLog, on_turn: Callable[[Turn], object] | None
) -> Iterator[tuple[Path, int]]:
    """The checkpoints with their steps, each announced."""
    audited, spent = 0, 0.0
    for place, (folder, step) in enumerate(checkpoints.items()):
        if on_turn is not None:
            left = (len(checkpoints) - place) * spent / audited if audited else None
            on_turn(Turn(folder, place + 1, len(checkpoints), left))
        began, stored = time.perf_counter(), len(log.records)
        yield folder, step
        # One that the log held already took no time to speak of, and says nothing of the rest.
        if len(log.records) > stored:
            audited, spent = audited + 1, spent + time.perf_counter() - began


def _some_of(audits: SavedAudits) -> SavedAudits:
    """The audits, where there are any."""
    if not audits.records:
        first = next(iter(audits.broken.values()))
        kind = type(first) if isinstance(first, AlignAuditError) else AlignAuditError
        words = first if isinstance(first, AlignAuditError) else named(first)
        raise kind(f"none of the {len(audits.broken)} checkpoints could be audited; the first: {words}") from first
    return audits


class OtherAuditsError(ConfigurationError):
    """The log is of other pairs, options or another reference: no checkpoint can be audited into it so."""


@dataclass(frozen=True)
class PreparedAudit:
    """A checkpoint that was compared with its reference and with what is in the log, ready to be audited.

    Attributes:
        stored: what the log holds of this audit already, by probe set.
    """

    models: OpenModels
    moment: Moment
    stored: Mapping[str | None, AuditRecord]


class CheckpointAuditor:
    """Audits saved checkpoints, one after the other, into one log; the writers and the reference serve for all.

    Args:
        log: that they go into.
        sets: probe sets by name.
        reference: a folder or hub name; None: the one that each checkpoint comes with.
        around: what the writers of the run have to know.
        tell: is given a line for what is not as a checkpoint's own run recorded it.
        device, dtype, trust_remote_code: as of :func:`audit_saved`.
        training_log: what the checkpoints' trainer has logged; None: it is not known.

    Raises:
        ConfigurationError: a writer cannot write.
    """

    def __init__(
        self,
        log: RunLog,
        sets: Mapping[str | None, ProbeSet],
        config: AuditConfig,
        reference: str | None,
        around: Surroundings,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        trust_remote_code: bool = False,
        training_log: TrainingLog | None = None,
        tell: Callable[[str], None] = logger.error,
    ) -> None:
        self._log = log
        self._path = reference
        self._reference = SharedReference(reference, trust_remote_code)
        self._opening: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        self._tell = tell
        self._differences: set[str] = set()
        """What was said to be other than a checkpoint's run recorded it."""
        self._writers = start_writers(writers_for(config, around, OF_SAVED), log)
        progress = progress_bar if config.progress else None
        # An error ends the audit of a checkpoint.
        self.monitor = Monitor(
            sets,
            config,
            log,
            writers=self._writers,
            progress=progress,
            strict=True,
            training_log=training_log,
        )

    def check(self, folder: Path) -> None:
        """Refuse a folder that cannot be compared with the reference, before anything of it is loaded.

        Raises:
            ReferenceUnavailableError: as :func:`~align_audit.models.saved_pair.check_saved`.
        """
        check_saved(folder, self._path)

    def load(self, folder: Path) -> nn.Module:
        """The policy that was saved in a folder.

        Raises:
            ReferenceUnavailableError: as :func:`~align_audit.models.reference.load_policy`.
        """
        return load_policy(folder, reference=self._path, **self._opening)

    def audit_folder(self, folder: Path, step: int) -> list[AuditRecord]:
        """The records of a saved checkpoint, by probe set (see :meth:`audit`). What breaks is among the log's failures, but for
        what we refuse ourselves before the audit begins.

        Raises:
            OtherAuditsError: the log is of other audits, whatever the checkpoint.
            Exception: what else there is about this checkpoint.
        """
        self.check(folder)
        try:
            prepared = self.prepare(self.load(folder), folder, step)
        except AlignAuditError:
            raise
        except BREAKS as error:
            self.monitor.failures.record(step, AuditFailure.of(error))
            raise
        return self.audit(prepared)

    def _tell_difference(self, folder: Path, words: str) -> None:
        """Say what is not as recorded; what is so of every checkpoint (the pairs, the reference) once."""
        difference = words.removeprefix(f"{plain(folder.name)}: ")
        if difference not in self._differences:
            self._differences.add(difference)
            self._tell(words)

    def reference_of(self, policy: nn.Module) -> Reference:
        """The reference of a policy (see :meth:`SharedReference.of`)."""
        return self._reference.of(policy)

    def prepare(
        self, policy: nn.Module, folder: Path, step: int, *, rewritten: bool = False, **kept: Any
    ) -> PreparedAudit:
        """Compare a policy with its run's own log, with its reference, and with what this log holds of it.

        Args:
            policy: as :meth:`load` gives it.
            folder: where it was loaded from.
            rewritten: other weights than the log has of this step are those of a training that was resumed before it.
            kept: what else the new records keep, under ``extra``.

        Raises:
            ReferenceUnavailableError: there is none, or it is not the run's.
            ConfigurationError: the log holds audits that these cannot stand beside.
        """
        reference = self.reference_of(policy)
        hashes = fingerprints(policy, reference)
        sets, config = self.monitor.probe_sets, self.monitor.config
        origin = check_origin(
            folder, step or None, policy, reference, hashes, sets,
            named=self._path is not None, tell=functools.partial(self._tell_difference, folder),
        )  # fmt: skip
        note_checkpoint(self._log.directory, step, as_called(folder))
        stored = _stored(
            step, hashes, sets, config, self._log, one_reference=not reference.shares_weights, rewritten=rewritten
        )
        saved_in = as_called(folder).parent
        moment = Moment(step, origin=origin, planned=steps_planned(folder), saved_in=saved_in, kept=kept)
        return PreparedAudit(OpenModels(policy, reference, hashes=hashes), moment, stored)

    def audit(self, prepared: PreparedAudit) -> list[AuditRecord]:
        """The records of one checkpoint, by probe set: those that the log holds, which are shown again, and new ones.

        Raises:
            Exception: what broke the audit, which is among the log's failures.
        """
        for record in prepared.stored.values():
            self.monitor.tell(record)
        self.monitor.resume(prepared.moment.step)
        outcome = self.monitor.audit(prepared.models, prepared.moment)
        by_name = {**prepared.stored, **outcome.records}
        return [by_name[name] for name in self.monitor.probe_sets]

    def close(self) -> None:
        """Let go of the writers: the table is printed, and whatever they send is sent."""
        self._writers.close()


def transfer_saved(
    policy: Path,
    reference: str | None,
    probes: Mapping[str, str | Path],
    config: AuditConfig,
    step: int = 0,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = logger.error,
) -> TransferRecord:
    """The transfer matrix of one saved policy over several probe sets (name → path).

    Args:
        dtype: of policy and reference; None: the policy's.
        trust_remote_code: whether code that is saved with a model or tokenizer may run.
        tell: is given a line for what is not as the checkpoint's own run recorded it.

    Raises:
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.transfer`.
    """
    check_saved(policy, reference)
    sets = read_probes(probes, [policy], reference, config, trust_remote_code=trust_remote_code)
    model = load_policy(policy, dtype=dtype, device=device, trust_remote_code=trust_remote_code, reference=reference)
    resolved = SharedReference(reference, trust_remote_code).of(model)
    progress = progress_bar if config.progress else None
    named = {name: pairs for name, pairs in sets.items() if name is not None}
    hashes = fingerprints(model, resolved)
    check_before_transfer(policy, step or None, model, resolved, hashes, named=reference is not None, tell=tell)
    return run_transfer(model, resolved, named, config, step, hashes=hashes, progress=progress)


def _stored(
    step: int,
    weights: tuple[str, str],
    sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
    log: RunLog,
    *,
    one_reference: bool,
    rewritten: bool,
) -> dict[str | None, AuditRecord]:
    """The records of these very audits that the log holds, by the name of their set.

    Args:
        weights: hashes of policy and reference.
        rewritten: see :meth:`CheckpointAuditor.prepare`.

    Raises:
        OtherAuditsError: the log holds audits that these cannot stand beside, whatever the policy.
        ConfigurationError: it holds one of another policy at this step.
    """
    policy, reference = weights
    stored: dict[str | None, AuditRecord] = {}
    records = log.records
    for place, head in enumerate(records.heads):
        name, odd = head.probe_name, None
        kind: type[ConfigurationError] = OtherAuditsError
        if name in sets and head.probe_hash != sets[name].content_hash:
            odd = "on other probe pairs" + (f" called {name!r}" if name is not None else "")
        elif head.reference_hash != reference and (one_reference or head.step == step):
            odd = "against another reference, or the same in another dtype"
        elif head.step == step and head.policy_hash != policy:
            odd, kind = None if rewritten else "of another model", ConfigurationError
        elif head.step == step and not config.measures_as(records[place].provenance.config):
            odd = "with other options"
        elif head.step == step and name in sets:
            stored[name] = records[place]
        if odd is not None:
            raise kind(
                f"{log.directory} holds an audit of step {head.step} {odd}; one log is one run: choose another --output "
                "(align-audit run --fresh sets that log aside)"
            )
    return stored
