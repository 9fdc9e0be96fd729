"""Audit saved checkpoints, one after the other, into one run log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from align_audit.alerts import evaluate
from align_audit.auditing import Context, run_audit
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError, ReferenceUnavailableError
from align_audit.models.anatomy import is_peft
from align_audit.models.loading import load_model
from align_audit.models.reference import policy_fingerprint, resolve_reference
from align_audit.probes import ProbeSet
from align_audit.record import AuditRecord
from align_audit.runlog import RunLog
from align_audit.writers.terminal import print_record, progress_bar


def audit_saved(
    checkpoints: Mapping[Path, int],
    reference: str | None,
    probes: str | Path,
    config: AuditConfig,
    output: str | Path,
    device: str = "cpu",
) -> list[AuditRecord]:
    """Audit each checkpoint (folder → step) against ``reference`` and append to the log in ``output``.

    A checkpoint whose weights are in the log already, at that step, is not audited again. Alerts compare each with
    those before it.

    Raises:
        ConfigurationError, ProbeError, ReferenceUnavailableError, AnatomyError: as :func:`align_audit.audit`.
    """
    log = RunLog(output)
    pairs = ProbeSet.from_dataset(
        probes,
        load_tokenizer([*checkpoints, *([reference] if reference else [])]),
        max_pairs=config.max_pairs,
        max_length=config.max_length or 1024,
        truncation_mode=config.truncation_mode or "keep_start",
        seed=config.seed,
    )
    context = Context(progress=progress_bar if config.progress else None)
    shared = load_model(reference, device=device) if reference is not None else None
    found = []
    for folder, step in checkpoints.items():
        policy = load_model(folder, device=device)
        record = _one(policy, shared, pairs, config, step, context, log, folder)
        found.append(record)
        print_record(record)
    return found


def _one(
    policy: nn.Module,
    shared: nn.Module | None,
    pairs: ProbeSet,
    config: AuditConfig,
    step: int,
    context: Context,
    log: RunLog,
    folder: Path,
) -> AuditRecord:
    if shared is None and not is_peft(policy):
        # A saved full model names its own folder as its source: that is the policy again, not its reference.
        raise ReferenceUnavailableError(
            f"{folder.name} is a full model and does not say what it was trained from; pass --reference with the model "
            "that training started from"
        )
    resolved = resolve_reference(policy, shared)
    known = {(record.step, record.provenance.policy_hash): record for record in log.records}
    key = (step, policy_fingerprint(policy))
    if key in known and known[key].provenance.reference_hash == resolved.fingerprint():
        same_probes = known[key].provenance.probe_hash == pairs.content_hash
        if same_probes:
            return known[key]
        raise ConfigurationError(
            f"{log.directory} holds an audit of {folder.name} on other probe pairs; choose another --output"
        )
    record, arrays = run_audit(policy, resolved, pairs, config, step, context)
    before = [earlier for earlier in log.records if earlier.step < step]
    record = record.model_copy(update={"alerts": evaluate(record, before, config.alerts)})
    log.save_arrays(step, "arrays", arrays)
    log.append(record)
    return record


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
