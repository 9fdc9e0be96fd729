"""Saved checkpoints: audited one after the other into one run log, or looked at for what transfers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from align_audit.auditing.origin import check_origin
from align_audit.auditing.probe_files import read_probes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.transfer import check_before_transfer, run_transfer
from align_audit.config import AuditConfig
from align_audit.errors import AlignAuditError, AnatomyError, ConfigurationError, ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.reference import Reference, load_policy, policy_fingerprint, resolve_reference
from align_audit.monitoring.monitor import Moment, Monitor
from align_audit.monitoring.resumed_writers import start_writers
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.messages import OnAlert, checked
from align_audit.writers.registry import OF_SAVED, writers_for
from align_audit.writers.terminal import progress_bar
from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedAudits:
    """What came of a folder of checkpoints.

    Attributes:
        records: in the order of the checkpoints and, for each, of the probe sets.
        broken: why a checkpoint could not be audited, by its folder.
    """

    records: list[AuditRecord]
    broken: dict[Path, AlignAuditError]


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
    those before it. Of several checkpoints, those that cannot be opened are passed over.

    Args:
        dtype: of policy and reference; None: the policy's.
        trust_remote_code: whether code that is saved with a model or tokenizer may run.
        tell: is given a line for each checkpoint that is passed over, and for what is not as its own run recorded it (see
            :mod:`align_audit.auditing.origin`).
        on_alert: is called with each alert that is news, and the record it was raised on (as of the callback).
        on_turn: is called before each checkpoint.
        fresh: begin an empty log, and move one that is there into a folder beside it; else it is gone on with.

    Raises:
        ConfigurationError: the log in ``output`` is another run's, no checkpoint could be audited, or a webhook has no URL.
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.audit`; of the
            only checkpoint, or of all together.
    """
    log = RunLog(output)
    sets = read_probes(probes, checkpoints, reference, config, trust_remote_code=trust_remote_code)
    if fresh and log.records:
        tell(f"the {len(log.records)} audits that were in {log.directory} are in {log.set_aside().name} there now")
    names = {step: folder.name for folder, step in checkpoints.items()}
    around = Surroundings(Path(output), tuple(sets), on_alert=checked(on_alert), checkpoints=names)
    writers = start_writers(writers_for(config, around, OF_SAVED), log)
    progress = progress_bar if config.progress else None
    # An error ends the audit of a checkpoint.
    monitor = Monitor(sets, config, log, writers=writers, progress=progress, strict=True)
    shared = SharedReference(reference, trust_remote_code)
    records: list[AuditRecord] = []
    broken: dict[Path, AlignAuditError] = {}
    with contextlib.closing(writers):
        for folder, step in _in_turn(checkpoints, log, on_turn):
            try:
                policy = load_policy(
                    folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, reference=reference
                )
                resolved = shared.of(policy, folder)
                hashes = policy_fingerprint(policy), resolved.fingerprint()
                origin = check_origin(
                    folder, step or None, policy, resolved, hashes, sets, named=reference is not None, tell=tell
                )
                records += _audit_checkpoint(policy, resolved, hashes, Moment(step, origin=origin), monitor, log)
            except (AnatomyError, ReferenceUnavailableError) as error:
                if len(checkpoints) == 1:
                    raise
                broken[folder] = error
                tell(f"{folder.name} is passed over: {error}")
    return _some_of(SavedAudits(records, broken))


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
        raise type(first)(
            f"none of the {len(audits.broken)} checkpoints could be audited; the first: {first}"
        ) from first
    return audits


def _audit_checkpoint(
    policy: nn.Module, reference: Reference, hashes: tuple[str, str], moment: Moment, monitor: Monitor, log: RunLog
) -> list[AuditRecord]:
    """The records of one checkpoint, by probe set: those that the log holds, and new ones.

    Args:
        hashes: of policy and reference.
    """
    sets = monitor.probe_sets
    stored = _stored(moment.step, hashes, sets, monitor.config, log, one_reference=not reference.shares_weights)
    for record in stored.values():
        monitor.tell(record)
    monitor.resume(moment.step)
    outcome = monitor.audit(OpenModels(policy, reference, hashes=hashes), moment)
    by_name = {**stored, **outcome.records}
    return [by_name[name] for name in sets]


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
    sets = read_probes(probes, [policy], reference, config, trust_remote_code=trust_remote_code)
    model = load_policy(policy, dtype=dtype, device=device, trust_remote_code=trust_remote_code, reference=reference)
    resolved = SharedReference(reference, trust_remote_code).of(model, policy)
    progress = progress_bar if config.progress else None
    named = {name: pairs for name, pairs in sets.items() if name is not None}
    check_before_transfer(policy, step or None, model, resolved, named, named=reference is not None, tell=tell)
    return run_transfer(model, resolved, named, config, step, progress=progress)


class SharedReference:
    """The reference that was asked for, loaded whole and once for all checkpoints; else the one each policy names.

    It is loaded as :func:`~align_audit.models.reference.resolve_reference` loads one for the policy: in its dtype, with
    its attention. A policy of another dtype has it loaded again.

    Args:
        path: a folder or hub name; None: the reference that an adapter comes with.
    """

    def __init__(self, path: str | None, trust_remote_code: bool = False) -> None:
        self._path = path
        self._trust_remote_code = trust_remote_code
        self._held: tuple[torch.dtype, Reference] | None = None

    def of(self, policy: nn.Module, folder: Path) -> Reference:
        """The reference of ``policy``, which came from ``folder``.

        Raises:
            ReferenceUnavailableError: it cannot be loaded, it is the policy's own folder, or a full model was given without
                any.
        """
        if self._path is None:
            if not is_peft(policy):
                # A saved full model names its own folder as its source: that is the policy again, not its reference.
                raise ReferenceUnavailableError(
                    f"{folder.name} is a full model and does not say what it was trained from; pass --reference with "
                    "the model that training started from"
                )
            return resolve_reference(policy)
        if Path(self._path).is_dir() and Path(self._path).resolve() == folder.resolve():
            raise ReferenceUnavailableError(
                f"--reference is {folder.name} itself, the checkpoint to be audited; expected the model that its training "
                "started from"
            )
        dtype = next(weight.dtype for weight in policy.parameters() if weight.is_floating_point())
        if self._held is None or self._held[0] != dtype:
            self._held = None  # lets go of it first
            loaded = resolve_reference(policy, self._path, trust_remote_code=self._trust_remote_code, stream=False)
            # Held as a model, which an audit does not let go of.
            self._held = dtype, Reference(loaded.source, model=loaded.model())
        return self._held[1]


def _stored(
    step: int,
    weights: tuple[str, str],
    sets: Mapping[str | None, ProbeSet],
    config: AuditConfig,
    log: RunLog,
    *,
    one_reference: bool,
) -> dict[str | None, AuditRecord]:
    """The records of these very audits that the log holds, by the name of their set.

    Args:
        weights: hashes of policy and reference.

    Raises:
        ConfigurationError: the log holds audits that these cannot stand beside.
    """
    policy, reference = weights
    stored: dict[str | None, AuditRecord] = {}
    records = log.records
    for place, head in enumerate(records.heads):
        name, odd = head.probe_name, None
        if name in sets and head.probe_hash != sets[name].content_hash:
            odd = "on other probe pairs" + (f" called {name!r}" if name is not None else "")
        elif head.reference_hash != reference and (one_reference or head.step == step):
            odd = "against another reference"
        elif head.step == step and head.policy_hash != policy:
            odd = "of another model"
        elif head.step == step and not config.measures_as(records[place].provenance.config):
            odd = "with other options"
        elif head.step == step and name in sets:
            stored[name] = records[place]
        if odd is not None:
            raise ConfigurationError(
                f"{log.directory} holds an audit of step {head.step} {odd}; one log is one run: choose another --output"
            )
    return stored
