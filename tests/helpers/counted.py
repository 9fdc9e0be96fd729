"""What is counted of an audit in advance, beside the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align_audit.auditing.costs.job import Assumed, Job
from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.session.memory import usual_working_bytes
from align_audit.auditing.session.room import Room
from align_audit.config import AuditConfig
from align_audit.probes.pairs import ProbePair
from align_audit.record.audit_record import AuditRecord


def shown_by(record: AuditRecord) -> Assumed:
    """What the audit has shown that its work depends on. Continuations that ended early are not foreseen."""
    assert record.generations is None or record.generations.ended.mean == 0.0
    peak = None if record.patching is None else record.patching.peak_layer
    return Assumed(
        peak_layer=-1 if peak is None else peak,
        low_rank_layers=tuple(sorted({layer for layers in record.low_rank.values() for layer in layers})),
        spanned={
            (basis, layer): sum(ratio == ratio for ratio in curve.explained_variance_ratio)
            for basis, layers in record.low_rank.items()
            for layer, curve in layers.items()
        },
        transport_rows=None if record.spinal is None else record.spinal.transport_rows,
    )


def job_on_cpu(
    model: Any, pairs: Sequence[ProbePair], config: AuditConfig, record: AuditRecord | None = None, **more: Any
) -> Job:
    """The audit that a record is of, with what it has shown; as it would be assumed where there is none."""
    memory = config.working_memory_mb
    room = Room("cpu", usual_working_bytes(torch.device("cpu")) if memory is None else memory * 2**20)
    assumed = Assumed() if record is None else shown_by(record)
    shared = config.share_prompts
    assert record is None or record.provenance.shared_prompts == shared
    return Job.on(ModelShape.of(model), pairs, config, room, shared=shared, assumed=assumed, **more)


def forwards(job: Job, tokens: int) -> float:
    """Layer calls × tokens as a record tells them."""
    once = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in job.pairs) * job.shape.layers
    return tokens / once
