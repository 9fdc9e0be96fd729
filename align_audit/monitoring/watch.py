"""A side process: it audits the checkpoints of a training that runs elsewhere, as they appear in its folder.

Alerts judge an audit by those before it, so checkpoints are audited in the order of their steps, also where several wait. All
that is known of earlier ones stands in the records: a process that was killed, at whatever moment, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.auditing.probe_files import read_probes
from align_audit.config import AuditConfig
from align_audit.errors import (
    AlignAuditError,
    ConfigurationError,
    ReferenceUnavailableError,
    first_line,
    named,
    pass_exit_on,
    plain,
)
from align_audit.models.anatomy import is_peft
from align_audit.models.folders import holds_model
from align_audit.models.loading import check_place
from align_audit.monitoring.arrivals import MAY_BE_WRITTEN, SETTLED, Arrivals, Checkpoint
from align_audit.monitoring.checkpoints import CheckpointAuditor, OtherAuditsError
from align_audit.monitoring.outcome import BREAKS, AuditFailure, without_frames
from align_audit.monitoring.watched_log import WatchedLog, kept_of
from align_audit.probes.sources import open_source
from align_audit.record.checkpoint_names import checkpoint_step
from align_audit.record.log import RunLog
from align_audit.record.training_log import TrainingLog
from align_audit.writers.words import duration
from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)

TORN_AFTER = 60.0
"""Seconds without a change after which an incomplete checkpoint no longer holds up the later ones."""
_SHOWN = 6
"""Steps that a line lists."""
_LONG_AGO = 3600.0
"""Seconds since the last checkpoint from which on its age is said."""


@dataclass
class WatchEnd:
    """What came of watching a run.

    Attributes:
        reason: why it ended, in a sentence.
        interrupted: it was stopped.
        audited: folders that were audited, in this order.
        in_log: folders that an earlier start had audited.
        broken: why a checkpoint could not be audited, by its folder.
    """

    reason: str = ""
    interrupted: bool = False
    audited: list[Path] = field(default_factory=list)
    in_log: list[Path] = field(default_factory=list)
    broken: dict[Path, BaseException] = field(default_factory=dict)


def watch_checkpoints(
    run: Path,
    reference: str | None,
    probes: str | Path | Mapping[str, str | Path],
    config: AuditConfig,
    output: Path | None = None,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    every: float = 10.0,
    idle: float = 3600.0,
    settled: float = SETTLED,
    say: Callable[[str], None] = logger.info,
    tell: Callable[[str], None] = logger.error,
) -> WatchEnd:
    """Audit the checkpoints of a training as they appear, until it ends.

    It ends when the newest checkpoint's trainer says that training is over and all are audited, when nothing new came for
    so long, or at a keyboard interrupt, which leaves what was being audited for the next start.

    Args:
        run: the training's output directory.
        reference, probes, config, device, dtype, trust_remote_code: as of
            :func:`~align_audit.monitoring.checkpoints.audit_saved`.
        output: the log goes to the ``align_audit`` folder in it; None: in ``run``.
        every: seconds between looks.
        idle: seconds without anything new after which it ends.
        settled: see :data:`~align_audit.monitoring.arrivals.SETTLED`.
        say: is given a line for what goes as it should.
        tell: is given a line for what does not: a checkpoint that is passed over, say.

    Raises:
        ConfigurationError: the folder is not there, another process writes the log, or the log is of other audits.
        ProbeError, ReferenceUnavailableError: no checkpoint could be audited so.
    """
    _check(run, probes, config)
    if reference is not None:
        check_place(reference)
    log, end = RunLog(run if output is None else output), WatchEnd()
    training_log = TrainingLog(log.directory.parent)
    opening: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}

    def open_auditor(folder: Path, around: Surroundings) -> CheckpointAuditor:
        sets = read_probes(probes, [folder], reference, config, trust_remote_code=trust_remote_code)
        around = replace(around, probe_names=tuple(sets))
        return CheckpointAuditor(log, sets, config, reference, around, training_log=training_log, tell=tell, **opening)

    watch = _Watch(Arrivals(run, settled=settled), WatchedLog(log, training_log), open_auditor, say, tell, end)
    with contextlib.closing(watch):
        try:
            end.reason = watch.until_it_ends(every, idle)
        except KeyboardInterrupt:
            end.reason, end.interrupted = watch.interrupted(), True
    return end


def _check(run: Path, probes: str | Path | Mapping[str, str | Path], config: AuditConfig) -> None:
    """Refuse what cannot work before anything is waited for; what the pairs are is found out when there is a tokenizer."""
    if not run.is_dir():
        raise ConfigurationError(
            f"no folder at {plain(run)}: expected the output directory of a training; make it, or start the training first"
        )
    if checkpoint_step(run.resolve().name) is not None and holds_model(run):
        raise ConfigurationError(
            f"{plain(run)} is a checkpoint itself; expected the output directory of a training, such as "
            f"{plain(run.resolve().parent)}. One checkpoint is audited by align-audit run"
        )
    for path in probes.values() if isinstance(probes, Mapping) else [probes]:
        open_source(path, config.max_pairs, config.seed)


class _Watch:
    """The checkpoints of one training, and what was done about each."""

    def __init__(
        self,
        arrivals: Arrivals,
        log: WatchedLog,
        open_auditor: Callable[[Path, Surroundings], CheckpointAuditor],
        say: Callable[[str], None],
        tell: Callable[[str], None],
        end: WatchEnd,
    ) -> None:
        self._arrivals, self._log = arrivals, log
        self._open_auditor = open_auditor
        self._say, self._tell, self._end = say, tell, end
        self._auditor: CheckpointAuditor | None = None
        self._names: dict[int, str] = {}
        """Step → folder, of the checkpoints that exist."""
        self._done: dict[Path, str] = {}
        """What each checkpoint was like that needs nothing more: audited, in the log, or passed over."""
        self._waiting: dict[Path, Checkpoint] = {}
        """Those of the last look that are not done, by step."""
        self._announced: set[int] = set()
        self._said_waiting: set[Path] = set()
        self._at_work: Checkpoint | None = None
        self._trouble = ""
        self._has_reference = False

    def until_it_ends(self, every: float, idle: float) -> str:
        """Look, audit what is next, and look again; why it ended, in a sentence."""
        last_new, seen = time.monotonic(), ""
        self._say(f"watching {plain(self._arrivals.run)} for checkpoints, every {every:g} s")
        while True:
            there = self._look()
            now_seen = seen if there is None else repr([(each.folder.name, each.signature) for each in there])
            if now_seen != seen:
                last_new, seen = time.monotonic(), now_seen
            checkpoint = None if there is None else self._next()
            if checkpoint is not None:
                self._work_on(checkpoint)
                last_new = time.monotonic()
                continue  # others came and went meanwhile
            if there and there[-1].lack is None and there[-1].ends_training and not self._waiting:
                return f"training ended at step {there[-1].step}{_age(there[-1])}, and all its checkpoints are done"
            if time.monotonic() - last_new >= idle:
                return self._leave_waiting(idle)
            time.sleep(every)

    def _leave_waiting(self, idle: float) -> str:
        """Say of those that still wait that they were not audited, and why it ends; what is not complete by now is broken."""
        for each in list(self._waiting.values()):
            if each.lack in (None, MAY_BE_WRITTEN):
                self._tell(f"{each.folder.name} was not audited: {each.lack or 'it came last'}")
            else:
                self._give_up(each, AlignAuditError(f"it is not complete: {each.lack}"))
        return f"nothing new came for {duration(idle)} (--idle)"

    def interrupted(self) -> str:
        """What a keyboard interrupt left undone, in a sentence."""
        if self._at_work is None:
            return "stopped"
        if self._is_audited(self._at_work, on_disk=True):  # it had just been written
            self._end.audited.append(self._at_work.folder)
            return "stopped"
        return f"stopped; the audit of {self._at_work.folder.name} was given up, and is made at the next start"

    def close(self) -> None:
        """Let go of the writers and of the log."""
        if self._auditor is not None:
            with contextlib.suppress(OSError):
                self._keep_names(self._arrivals.look())
            self._auditor.close()
        self._log.log.close()

    # -- what is there, and what is next -------------------------------------------------------------------------------

    def _look(self) -> list[Checkpoint] | None:
        """The checkpoints that are there, by step; None: the folder cannot be read now."""
        try:
            there = self._arrivals.look()
        except OSError as error:
            # A network folder comes back; one that was removed is nothing new, and ends the watch in time.
            words = f"cannot read {plain(self._arrivals.run)}: {first_line(error)}; tried again"
            if words != self._trouble:
                self._tell(words)
            self._trouble = words
            return None
        self._trouble = ""
        self._keep_names(there)
        gone = self._waiting.keys() - {each.folder for each in there}
        for folder in sorted(gone, key=lambda folder: self._waiting[folder].step):
            self._tell(f"{folder.name} was deleted before it was audited (save_total_limit?)")
        self._waiting = {each.folder: each for each in there if self._done.get(each.folder) != _mark(each)}
        return there

    def _keep_names(self, there: Sequence[Checkpoint]) -> None:
        self._names.clear()
        self._names.update({each.step: each.folder.name for each in there})

    def _next(self) -> Checkpoint | None:
        """The first of those that wait, unless it is still being written; what needs nothing more is done on the way."""
        for checkpoint in list(self._waiting.values()):
            if checkpoint.lack is not None:
                later = any(each.lack is None and each.step > checkpoint.step for each in self._waiting.values())
                if not later or checkpoint.quiet < TORN_AFTER:
                    self._say_waiting(checkpoint)
                    return None  # later ones are judged by it, and come after it
                self._give_up(checkpoint, AlignAuditError(f"it is not complete: {checkpoint.lack}"))
            elif not self._is_open(checkpoint):
                return None
            elif self._is_audited(checkpoint):
                self._end.in_log.append(checkpoint.folder)
                self._finish(checkpoint)
            elif later_step := self._log.later_step(checkpoint):
                self._tell(
                    f"{checkpoint.folder.name} is passed over: it is older than what was audited of step {later_step}, and "
                    "audits of one run go forward; align-audit run audits it into another --output"
                )
                self._finish(checkpoint)
            else:
                self._announce()
                return checkpoint
        return None

    def _say_waiting(self, checkpoint: Checkpoint) -> None:
        if checkpoint.quiet >= TORN_AFTER and checkpoint.folder not in self._said_waiting:
            self._said_waiting.add(checkpoint.folder)
            self._tell(f"{checkpoint.folder.name} waits, and those after it: {checkpoint.lack}")

    def _announce(self) -> None:
        """Say how many wait, where these are more than one and some of them new."""
        steps = [each.step for each in self._waiting.values() if each.lack is None]
        if len(steps) > 1 and not set(steps) <= self._announced:
            listed = ", ".join(map(str, steps[:_SHOWN])) + (" …" if len(steps) > _SHOWN else "")
            self._say(f"{len(steps)} checkpoints wait (steps {listed}); the oldest is audited first")
        self._announced = set(steps)

    def _is_open(self, checkpoint: Checkpoint) -> bool:
        """Open what audits; False: the checkpoint whose tokenizer was to be taken has just gone.

        Raises:
            ConfigurationError, ProbeError: no checkpoint could be audited so.
        """
        if self._auditor is None:
            around = Surroundings(
                self._log.log.directory.parent,
                training_log=lambda: self._log.training_log.rows,
                checkpoints=self._names,
            )
            try:
                self._auditor = self._open_auditor(checkpoint.folder, around)
            except Exception:
                if checkpoint.changed():
                    return False
                raise
        return True

    def _is_audited(self, checkpoint: Checkpoint, *, on_disk: bool = False) -> bool:
        return self._auditor is not None and self._log.holds(checkpoint, self._auditor.monitor, on_disk=on_disk)

    # -- one checkpoint ------------------------------------------------------------------------------------------------

    def _work_on(self, checkpoint: Checkpoint) -> None:
        """Audit one; what breaks of it is kept and said, and the others go on.

        Raises:
            OtherAuditsError: the log is of other audits.
            ReferenceUnavailableError: there is no reference to compare any checkpoint with.
        """
        assert self._auditor is not None
        self._at_work = checkpoint
        prepared = None
        try:
            with self._of_each():
                self._auditor.check(checkpoint.folder)
            policy = self._auditor.load(checkpoint.folder)
            _take_into_memory(policy)
            if checkpoint.changed():
                raise FileNotFoundError(checkpoint.folder)
            with self._of_each():
                self._auditor.reference_of(policy)
            self._has_reference = True
            self._keep_training_log(checkpoint)
            prepared = self._auditor.prepare(
                policy,
                checkpoint.folder,
                checkpoint.step,
                rewritten=self._log.is_older_than(checkpoint),
                **kept_of(checkpoint),
            )
            self._auditor.audit(prepared)
            self._at_work = None
            self._end.audited.append(checkpoint.folder)
            self._finish(checkpoint)
        except (OtherAuditsError, _Unreferenced):
            raise
        except BREAKS as error:
            pass_exit_on(error)
            if prepared is None and checkpoint.changed():
                # Nothing of it is kept. Where it is still there, it is looked at again.
                how = "changed" if checkpoint.folder.is_dir() else "was deleted"
                self._tell(f"{checkpoint.folder.name} {how} while it was read; nothing of it was audited")
                self._waiting.pop(checkpoint.folder)
            else:
                self._give_up(checkpoint, error, recorded=prepared is not None)
        self._at_work = None

    @contextlib.contextmanager
    def _of_each(self) -> Iterator[None]:
        """What is wrong inside with the reference of the first checkpoint would break the audit of each."""
        try:
            yield
        except ReferenceUnavailableError as error:
            if self._has_reference:
                raise
            raise _Unreferenced(str(error)) from error

    def _keep_training_log(self, checkpoint: Checkpoint) -> None:
        try:
            self._log.keep_training_log(checkpoint)
        except OSError as error:  # the audit does not need it
            self._tell(f"what the trainer logged until {checkpoint.folder.name} could not be kept: {first_line(error)}")

    def _finish(self, checkpoint: Checkpoint) -> None:
        self._done[checkpoint.folder] = _mark(checkpoint)
        self._waiting.pop(checkpoint.folder, None)

    def _give_up(self, checkpoint: Checkpoint, error: BaseException, *, recorded: bool = False) -> None:
        """Say and keep that a checkpoint cannot be audited.

        Args:
            recorded: the log's failures have it already.
        """
        self._tell(
            f"{checkpoint.folder.name} is passed over: {error if isinstance(error, AlignAuditError) else named(error)}"
        )
        if not recorded:
            self._keep(checkpoint.step, error)
        self._end.broken[checkpoint.folder] = without_frames(error)
        self._finish(checkpoint)

    def _keep(self, step: int, error: BaseException) -> None:
        """Keep what broke, where the screens of the run look for it."""
        if self._auditor is not None:
            self._auditor.monitor.failures.record(step, AuditFailure.of(error))
            return
        try:
            self._log.log.append_failure(step, "".join(traceback.format_exception(error)))
        except OSError as refusal:
            self._tell(f"it could not be kept in the log: {first_line(refusal)}")


class _Unreferenced(ReferenceUnavailableError):
    """No checkpoint of the run can be compared with anything."""


def _mark(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.signature} {'whole' if checkpoint.lack is None else 'torn'}"


def _take_into_memory(model: nn.Module) -> None:
    """Let no weight lie in a file that may be written to or deleted while it is read: safetensors maps files on the CPU."""
    if is_peft(model):
        return  # adapters are copied into the model; its base is not the training's to write
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _age(checkpoint: Checkpoint) -> str:
    """When a last checkpoint was written, where that is long ago: it may be of a training before the one that is meant."""
    age = time.time() - checkpoint.written
    return f" ({duration(age)} ago)" if age > _LONG_AGO else ""
