"""``audit``: compare a policy with its reference on probe pairs, once, and return what was found."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from torch import nn

from align_audit.auditing.full import full_of
from align_audit.auditing.given import check_given
from align_audit.auditing.health import health_of
from align_audit.auditing.measurements.measurement import AuditTask
from align_audit.auditing.origin import check_origin
from align_audit.auditing.probe_files import Probes, opened
from align_audit.auditing.provenance import kept_under
from align_audit.auditing.request import AuditRequest, AuditResult
from align_audit.auditing.session.memory import memory_explained
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.walk import Session
from align_audit.config import AuditConfig
from align_audit.models.anatomy import Anatomy
from align_audit.models.reference import load_policy, refuse_itself, resolve_reference
from align_audit.models.saved_pair import check_saved
from align_audit.probes.names import check_names
from align_audit.record.audit_record import AuditRecord
from align_audit.record.checkpoint_names import step_to_record

logger = logging.getLogger(__name__)

Model = nn.Module | str | Path
"""A causal LM, a PEFT model, or the path of either."""


# fmt: off
@overload
def audit(policy: Model, reference: Model | None, probes: Probes, config: AuditConfig | None = ...,
          step: int | None = ..., *, anatomy: Anatomy | None = ...) -> AuditRecord: ...
@overload
def audit(policy: Model, reference: Model | None, probes: Mapping[str, Probes], config: AuditConfig | None = ...,
          step: int | None = ..., *, anatomy: Anatomy | None = ...) -> dict[str, AuditRecord]: ...
# fmt: on
def audit(
    policy: Model,
    reference: Model | None,
    probes: Probes | Mapping[str, Probes],
    config: AuditConfig | None = None,
    step: int | None = None,
    *,
    anatomy: Anatomy | None = None,
) -> AuditRecord | dict[str, AuditRecord]:
    """Audit one policy against its reference (METHODS §1–6).

    Args:
        policy: a causal LM, a PEFT model, or the path of either.
        reference: the same; None: the policy's ``"ref"`` adapter, else its adapters off, else its own source path.
        probes: preference pairs, tokenized as the trainer does, or the path of some (``.jsonl``, ``.json``, ``.parquet``, a
            data set folder), for which the tokenizer is that of the policy's folder; or several of either by name, all
            audited with the models opened once.
        config: what to measure; defaults to all of it.
        step: the training step the record names, 0 … 10¹⁸ − 1; None: N of a policy's path ``checkpoint-N``, else 0.
        anatomy: where the decoder layers are, for a model in which they cannot be found.

    Returns:
        The record, or the records by name. Neither model, nor any random state, is changed.

    Raises:
        ConfigurationError: a name that cannot be one (see :mod:`align_audit.probes.names`), a path where no tokenizer lies
            beside a model, a step out of its range, or an argument of another type.
        ReferenceUnavailableError: no reference can be had, it does not fit the policy, or a checkpoint's own files lead to
            another one than the log of its run names.
        AnatomyError: the model cannot be opened between its layers.
        ProbeError: there are no pairs, or their file cannot be read.

    Example::

        record = audit("runs/dpo/checkpoint-500", "base-model", "held-out.jsonl")
    """
    check_given(policy=policy, reference=reference, config=config, anatomy=anatomy)
    config = config or AuditConfig()
    given: Mapping[Any, Probes] = probes if isinstance(probes, Mapping) else {None: probes}
    if given is probes:
        check_names(given)
    sets = opened(given, policy, reference, config)
    folder = None if isinstance(policy, nn.Module) else Path(policy)
    step = step_to_record(step, folder)
    if not isinstance(policy, nn.Module):
        if not isinstance(reference, nn.Module):
            check_saved(policy, reference)
        policy = load_policy(policy, reference=reference)
    resolved = resolve_reference(policy, reference)
    with memory_explained(), OpenModels(policy, resolved, anatomy=anatomy) as models:
        refuse_itself(models.open().hashes[0], resolved, models.hashes[1])
        asked = {name: AuditRequest(pairs, config, step, probe_name=name) for name, pairs in sets.items()}
        origin = None if folder is None else check_origin(
            folder, step or None, policy, resolved, models.hashes, sets, named=reference is not None, tell=logger.warning,
        )  # fmt: skip
        records = {name: run_audit(models, request).record for name, request in asked.items()}
        if origin is not None:
            records = {name: origin.noted(record) for name, record in records.items()}
    return records if given is probes else records[None]


def run_audit(
    models: OpenModels,
    request: AuditRequest,
    cache: ReferenceCache | None = None,
    progress: Callable[[int, str], Any] | None = None,
) -> AuditResult:
    """The audit itself.

    Args:
        cache: what depends on the reference alone, kept for a run.
        progress: makes a progress bar of so many batches.

    Raises:
        AuditMemoryError: memory ran out although the audit had gone down to one pair and one stream at a time.
    """
    began = time.perf_counter()
    with memory_explained():
        cache = cache or ReferenceCache()
        kept = cache.kept(request.probe_name, kept_under(models.open(), request))
        probes, previous = request.probes, request.previous.attribution
        session = Session(
            models, probes.pairs, request.config, truncation_mode=probes.truncation_mode, previous=previous, kept=kept
        )
        task = AuditTask(session, request, cache, kept)
        make = health_of if request.kind == "health" else full_of
        return make(task, began, progress)
