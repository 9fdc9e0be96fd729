"""The record of an audit: what was measured, of which models, pairs and settings, against the right reference or not."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import math
import time
from typing import Any

import numpy as np
import torch

from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import PER_PAIR, AuditTask
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.walk import Session
from align_audit.models.precision import float32_products, product_unit
from align_audit.probes.pairs import REPEATED
from align_audit.record.audit_record import (
    CONTROL_NAMES,
    IN_TRAINING,
    NO_TRAINER,
    AuditRecord,
    Control,
    Controls,
    Cost,
    Provenance,
    ReferenceCheck,
    Verdict,
)
from align_audit.record.finding import find

HEALTH_ONLY = "a health audit patches nothing"
"""Why parts of its record are missing."""

_NOT_PATCHED: dict[str, Any] = {
    "patching": None, "localization": None, "low_rank": {}, "spinal": None,
    "controls": Controls(**{name: Control(verdict="not_run", reason=HEALTH_ONLY) for name in CONTROL_NAMES}),
}  # fmt: skip

_PACKAGES = ("align-audit", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy")


def provenance_of(session: Session, request: AuditRequest) -> Provenance:
    """Which models, pairs and settings a record of this session speaks of."""
    models, probes = session.models, request.probes
    anatomy, model = models.policy.anatomy, models.policy.model
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        model_type=str(getattr(model.config, "model_type", type(model).__name__)),
        num_layers=anatomy.num_layers,
        hidden_size=anatomy.hidden_size,
        vocab_size=anatomy.vocab_size,
        policy_hash=models.hashes[0],
        reference_hash=models.hashes[1],
        probe_hash=probes.content_hash,
        probe_name=request.probe_name,
        probe_source=probes.source,
        probe_held_out=probes.held_out,
        pairs=len(session.pairs),
        groups=session.estimates.independent,
        pairs_dropped=_dropped(session, request),
        seed=session.config.seed,
        device=str(session.device),
        parameter_dtype=str(weight.dtype).removeprefix("torch."),
        compute_dtype=_computed_in(models.policy.compute_dtype, session.device.type),
        max_length=probes.max_length,
        truncation_mode=probes.truncation_mode,
        shared_prompts=session.shared,
        layout_reason=session.layout_reason,
        beta=request.beta,
        config=session.config.to_dict(),
    )


def _computed_in(dtype: torch.dtype, device: str) -> str:
    """The dtype of matrix products, and what those of float32 are rounded to, where they are."""
    products = float32_products(device)
    words = str(dtype).removeprefix("torch.")
    return f"{words} ({products} products)" if dtype == torch.float32 and products != "ieee" else words


def kept_under(models: OpenModels, request: AuditRequest) -> tuple[str, ...]:
    """What all depends on that a run keeps in memory of its reference on a probe set."""
    config = request.config
    return (
        models.hashes[1], models.reference_build, models.policy_form, request.probes.content_hash,
        str(models.reference.compute_dtype), str(config.share_prompts), config.generations.model_dump_json(),
    )  # fmt: skip


def _dropped(session: Session, request: AuditRequest) -> dict[str, int]:
    """What the draw dropped, and pairs of a set made otherwise that repeat another."""
    dropped = dict(request.probes.dropped)
    if session.repeated:
        dropped[REPEATED] = dropped.get(REPEATED, 0) + session.repeated
    return dropped


@functools.cache  # a process keeps the packages that it has imported, and reading of them takes as long as a short audit
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_reference(session: Session, behaviour: Behaviour, request: AuditRequest) -> ReferenceCheck:
    """Is the reference what it should be: the policy's starting point, and the one the trainer precomputed with?"""
    verdict, reason = _against_the_start(behaviour, request)
    difference = None
    precomputed = [pair.reference_logps for pair in session.pairs]
    if request.compare_precomputed and all(logps is not None for logps in precomputed):
        expected = np.array([logps[0] - logps[1] for logps in precomputed if logps is not None])
        difference = float(np.abs(behaviour.reference_margin - expected).max())
        scale = np.array([abs(logps[0]) + abs(logps[1]) for logps in precomputed if logps is not None])
        # Two ways to sum the same log-probabilities differ by rounding, which grows with their size.
        half = product_unit(session.models.reference.compute_dtype, session.device.type) > 1e-4
        mismatch = float(np.abs(behaviour.reference_margin - expected).mean())
        if not math.isfinite(float(behaviour.reference_margin.mean())):
            if verdict != "failed":
                verdict, reason = (
                    "not_run",
                    "the reference's margins are not finite, so nothing can be compared with them",
                )
        elif not mismatch <= (1e-2 if half else 1e-4) * float(scale.mean()):
            verdict = "failed"
            reason = (
                f"the trainer's precomputed reference margins differ from this reference's by {mismatch:.3g} nats on "
                "average: it is not the reference the trainer uses"
            )
        elif verdict == "not_run":
            verdict = "passed"
            reason = f"its margins equal the trainer's precomputed ones (largest difference {difference:.2g} nats)"
    return ReferenceCheck(
        source=session.models.source.source,
        same_weights=behaviour.identical,
        verdict=verdict,
        reason=reason,
        last_sync_step=request.last_sync_step,
        precomputed_margin_difference=difference,
    )


def _against_the_start(behaviour: Behaviour, request: AuditRequest) -> tuple[Verdict, str]:
    if not request.at_start:
        return "not_run", "training has begun; policy and reference are compared at step 0"
    if behaviour.identical:
        compared = "activations" if request.kind == "full" else "last activations"
        return "passed", f"policy and reference give equal {compared}, bit by bit, before training"
    shifts = np.abs(behaviour.shift[np.isfinite(behaviour.shift)])
    moved = f"the margin shift is {shifts.mean():.3g} nats on average" if len(shifts) else "no margin is finite"
    return "failed", (
        f"before the first step policy and reference already differ: {moved}. "
        "Training optimizes the policy against this reference, not against its own starting point. "
        "Usual causes: an adapter initialization that changes the base weights (PiSSA, OLoRA), trained biases, "
        "or a reference loaded from another model or in another precision"
    )


def _plain(value: Any) -> Any:
    """What a part without a field in the record is stored as: JSON has no NaN, so what is not known is None there."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def agreed_record(task: AuditTask, began: float) -> AuditRecord:
    """:func:`make_record` on the first process, which says it for all: the others go on from the same."""
    ranks = task.session.models.ranks
    task.session.add_up()
    record = ranks.share(make_record(task, began) if ranks.rank == 0 else None)
    assert record is not None
    return record


def make_record(task: AuditTask, began: float) -> AuditRecord:
    """What every measurement says, its reasons under the name of its part.

    Args:
        began: ``time.perf_counter()`` when the audit began.
    """
    session, request = task.session, task.request
    parts: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for measurement in task:
        if measurement.name is None:
            continue
        part, why = measurement.part()
        fields = parts if measurement.name in AuditRecord.model_fields else extra
        fields[measurement.name] = part if fields is parts else _plain(part)
        reasons |= {f"{measurement.name}.{path}" if path else measurement.name: reason for path, reason in why.items()}
    reasons |= dict.fromkeys(IN_TRAINING, NO_TRAINER)
    if request.kind == "health":
        parts |= _NOT_PATCHED
        reasons |= dict.fromkeys(("patching", "localization", "low_rank", "spinal"), HEALTH_ONLY)
    session.meter.sample()
    record = AuditRecord(
        kind=request.kind,
        step=request.step,
        provenance=provenance_of(session, request),
        reference_check=check_reference(session, task[Behaviour], request),
        cost=Cost(
            seconds=time.perf_counter() - began,
            peak_memory=session.meter.peak,
            forward_equivalents=session.forward_equivalents(),
        ),
        extra=extra,
        reasons=reasons,
        **parts,
    )
    return record if request.kind == "health" else record.model_copy(update={"finding": find(record)})


def arrays_of(task: AuditTask) -> dict[str, np.ndarray]:
    """What all measurements keep beside the record, and the group of each pair; of the given pairs, in their order."""
    places = task.session.places
    return {f"{PER_PAIR}group": task.session.groups[places]} | {
        name: values[places] if name.startswith(PER_PAIR) else values
        for measurement in task
        for name, values in measurement.arrays().items()
    }
