"""Saved checkpoints: audited one after the other into one run log, or looked at for what transfers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.alerts.detectors import evaluate
from align_audit.auditing.audit import run_audit
from align_audit.auditing.previous import left_by
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.transfer import run_transfer
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.loading import load_model
from align_audit.models.reference import Reference, load_policy, policy_fingerprint, resolve_reference
from align_audit.probes.names import check_names
from align_audit.probes.pairs import ProbeSet
from align_audit.record.audit_record import AuditRecord
from align_audit.record.log import RunLog, arrays_name
from align_audit.record.transfer_record import TransferRecord
from align_audit.writers.terminal import print_record, progress_bar


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
    cache = ReferenceCache(log.directory / "cache")
    shared = _load_reference(reference, device)
    found = []
    for folder, step in checkpoints.items():
        policy = load_policy(folder, device=device)
        resolved = _reference(policy, shared, folder)
        key = (step, policy_fingerprint(policy), resolved.fingerprint())
        with OpenModels(policy, resolved) as models:
            for name, pairs in sets.items():
                known = _known(key, name, pairs, config, log, one_reference=shared is not None)
                record = known or _audited(models, AuditRequest(pairs, config, step, probe_name=name), cache, log)
                found.append(record)
                print_record(record)
    return found


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
    bases = [base for folder in checkpoints if (base := _base_of(folder)) is not None]
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


def _audited(models: OpenModels, request: AuditRequest, cache: ReferenceCache, log: RunLog) -> AuditRecord:
    name, step, config = request.probe_name, request.step, request.config
    history = [earlier for earlier in log.records if earlier.step < step and earlier.provenance.probe_name == name]
    request = replace(request, previous=left_by(history[-1] if history else None, log))
    result = run_audit(models, request, cache, progress_bar if config.progress else None)
    record = result.record.model_copy(update={"alerts": evaluate(result.record, history, config.alerts)})
    log.save_arrays(step, arrays_name(name), result.arrays)
    log.append(record)
    return record


def _known(
    key: tuple[int, str, str],
    name: str | None,
    pairs: ProbeSet,
    config: AuditConfig,
    log: RunLog,
    *,
    one_reference: bool,
) -> AuditRecord | None:
    """The record of this very audit, where the log holds it. Other probe sets may stand beside it, under other names.

    Raises:
        ConfigurationError: the log holds audits that this one cannot stand beside.
    """
    step, policy, reference = key
    found = None
    for record in log.records:
        there, odd = record.provenance, None
        same = there.probe_name == name
        if same and there.probe_hash != pairs.content_hash:
            odd = "on other probe pairs" + (f" called {name!r}" if name is not None else "")
        elif there.reference_hash != reference and (one_reference or record.step == step):
            odd = "against another reference"
        elif record.step == step and there.policy_hash != policy:
            odd = "of another model"
        elif record.step == step and there.config != config.to_dict():
            odd = "with other options"
        elif record.step == step and same:
            found = record
        if odd is not None:
            raise ConfigurationError(
                f"{log.directory} holds an audit of step {record.step} {odd}; one log is one run: choose another --output"
            )
    return found


def _base_of(folder: Path) -> str | None:
    """What an adapter's folder names as its base model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # no adapter, or a damaged one: loading it says so
    return base or None


def load_tokenizer(places: list[Any]) -> Any:
    """The tokenizer of the first place that has one.

    Raises:
        ConfigurationError: none has.
    """
    from transformers import AutoTokenizer

    reasons = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(str(place))
        except (OSError, ValueError) as error:
            reasons.append(f"{Path(str(place)).name}: {str(error).splitlines()[0]}")
    raise ConfigurationError(
        "no tokenizer found in " + "; ".join(reasons) + ". Save it beside the model (processing_class.save_pretrained)"
    )
