"""Saved checkpoints: audited one after the other into one run log, or looked at for what transfers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.transfer import run_transfer
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.loading import base_of, load_model, load_tokenizer
from align_audit.models.reference import Reference, load_policy, policy_fingerprint, resolve_reference
from align_audit.monitoring.monitor import Moment, Monitor
from align_audit.probes.names import check_names
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.terminal import Terminal, progress_bar
from align_audit.writers.writer import Writers


def audit_saved(
    checkpoints: Mapping[Path, int],
    reference: str | None,
    probes: str | Path | Mapping[str, str | Path],
    config: AuditConfig,
    output: str | Path,
    device: str = "cpu",
) -> list[AuditRecord]:
    """Audit each checkpoint (folder → step) against ``reference`` and append to the log in ``output``.

    With several probe sets (name → path), each checkpoint is opened once and audited on each of them.

    A checkpoint whose weights are in the log already, at that step, is not audited again. Alerts compare each with
    those before it.

    Raises:
        ConfigurationError: the log in ``output`` is another run's.
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.audit`.
    """
    log = RunLog(output)
    sets = read_probes(probes, checkpoints, reference, config)
    progress = progress_bar if config.progress else None
    # An error ends the command.
    monitor = Monitor(sets, config, log, writers=Writers([Terminal()]), progress=progress, strict=True)
    shared = _load_reference(reference, device)
    records: list[AuditRecord] = []
    for folder, step in checkpoints.items():
        policy = load_policy(folder, device=device)
        resolved = _reference(policy, shared, folder)
        weights = (policy_fingerprint(policy), resolved.fingerprint())
        stored = _stored(step, weights, sets, config, log, one_reference=shared is not None)
        for record in stored.values():
            monitor.tell(record)
        monitor.resume(step)
        outcome = monitor.audit(OpenModels(policy, resolved), Moment(step))
        by_name = {**stored, **outcome.records}
        records += [by_name[name] for name in sets]
    return records


def transfer_saved(
    policy: Path,
    reference: str | None,
    probes: Mapping[str, str | Path],
    config: AuditConfig,
    step: int = 0,
    device: str = "cpu",
) -> TransferRecord:
    """The transfer matrix of one saved policy over several probe sets (name → path).

    Raises:
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.transfer`.
    """
    sets = read_probes(probes, [policy], reference, config)
    shared = _load_reference(reference, device)
    model = load_policy(policy, device=device)
    progress = progress_bar if config.progress else None
    named = {name: pairs for name, pairs in sets.items() if name is not None}
    return run_transfer(model, _reference(model, shared, policy), named, config, step, progress=progress)


def read_probes(
    probes: str | Path | Mapping[str, str | Path],
    checkpoints: Iterable[Path],
    reference: str | None,
    config: AuditConfig,
) -> dict[str | None, ProbeSet]:
    """The probe sets at those paths, tokenized with the models' tokenizer; a single path's set is called None."""
    paths: dict[str | None, str | Path] = {}
    if isinstance(probes, Mapping):
        check_names(probes)
        paths.update(probes)
    else:
        paths[None] = probes
    bases = [base for folder in checkpoints if (base := base_of(folder)) is not None]
    tokenizer = load_tokenizer([*checkpoints, *([reference] if reference is not None else []), *bases])
    return {
        name: ProbeSet.from_dataset(
            path,
            tokenizer,
            max_pairs=config.max_pairs,
            max_length=config.max_length or 1024,
            truncation_mode=config.truncation_mode or "keep_start",
            seed=config.seed,
        )
        for name, path in paths.items()
    }


def _load_reference(reference: str | None, device: str) -> Reference | None:
    if reference is None:
        return None
    return Reference(f"loaded from {Path(reference).name}", model=load_model(reference, device=device))


def _reference(policy: nn.Module, shared: Reference | None, folder: Path) -> Reference:
    """The reference that was asked for, else the one the saved policy names."""
    if shared is None and not is_peft(policy):
        # A saved full model names its own folder as its source: that is the policy again, not its reference.
        raise ReferenceUnavailableError(
            f"{folder.name} is a full model and does not say what it was trained from; pass --reference with the model "
            "that training started from"
        )
    return shared if shared is not None else resolve_reference(policy)


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
    for record in log.records:
        provenance, odd = record.provenance, None
        name = provenance.probe_name
        if name in sets and provenance.probe_hash != sets[name].content_hash:
            odd = "on other probe pairs" + (f" called {name!r}" if name is not None else "")
        elif provenance.reference_hash != reference and (one_reference or record.step == step):
            odd = "against another reference"
        elif record.step == step and provenance.policy_hash != policy:
            odd = "of another model"
        elif record.step == step and provenance.config != config.to_dict():
            odd = "with other options"
        elif record.step == step and name in sets:
            stored[name] = record
        if odd is not None:
            raise ConfigurationError(
                f"{log.directory} holds an audit of step {record.step} {odd}; one log is one run: choose another --output"
            )
    return stored
