"""How much memory an audit takes above the models, on one process: on the device, and in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

from align_audit.auditing.costs.job import Job
from align_audit.auditing.measurements.lens_walk import PORTION
from align_audit.auditing.session.kept import KEPT_BYTES
from align_audit.models.replay import head_rows
from align_audit.record.audit_record import AuditKind

_LOGITS = {"cpu": 4}
_LOGITS_ELSEWHERE = 6
"""Tensors of a block's logits in float32 that live at once or are not given back yet, by device type: on a CPU what is made of
both models' is made in chunks, elsewhere of all rows together."""
_GRAPH = 2
"""What a layer's graph keeps, as a multiple of what its matrices give."""
_MATRICES = 3
"""Matrices of the size of a Gram matrix that its eigendecomposition works in."""


@dataclass(frozen=True)
class Memory:
    """Bytes; what is of one moment adds up.

    Attributes:
        streams: recordings and walked streams of a batch, on the device.
        logits: a block's, there.
        graph: of one layer, while gradients are taken, there.
        grams: sums over all token rows and what their subspaces are made in, there.
        gathered: of weights that are spread over processes, what is whole at once, there.
        rows: token rows of all layers for spectra and transport, of the pairs of the process that has most, and those that it
            is brought at a time of the others, in the host's memory.
        spectrum: what one layer's singular values are made in, on the device, after the passes.
        kept: of the reference, for later looks, in the host's memory.
    """

    streams: int = 0
    logits: int = 0
    graph: int = 0
    grams: int = 0
    gathered: int = 0
    rows: int = 0
    spectrum: int = 0
    kept: int = 0

    @property
    def device(self) -> int:
        """Where the models are, at most: gradients are taken, then streams are walked, then spectra made."""
        return max(max(self.streams, self.graph) + self.logits, self.spectrum) + self.grams + self.gathered

    @property
    def host(self) -> int:
        """In the host's memory; where the models are on a CPU that is the same memory, and both add up."""
        return self.rows + self.kept

    @property
    def largest(self) -> str:
        """What takes most."""
        return max((each.name for each in fields(self)), key=lambda name: getattr(self, name))


def foresee_memory(job: Job, kind: AuditKind) -> Memory:
    """What an audit of a kind holds at most, on one process.

    Rather too much: what is let go of before something else is made is counted beside it.
    """
    shape, config = job.shape, job.config
    tokens = max(job.laid(group).tokens for group in job.plan)
    stream = tokens * shape.stream_bytes
    block = head_rows(job.room.device, shape.vocabulary) * shape.vocabulary * 4
    logits = _LOGITS.get(job.room.device, _LOGITS_ELSEWHERE) * block
    outside, inside = shape.outside_weights * shape.value_bytes, shape.layer_weights * shape.value_bytes
    gathered = 2 * (outside + inside) if job.spread else 0
    if kind == "health":
        entries = sum(job.laid(group).entries for group in job.plan)
        kept = min(entries * shape.stream_bytes, KEPT_BYTES)
        kept += job.kept_logits(0) * shape.vocabulary * shape.value_bytes
        # What only the last layer gives is read: what lies below it is let go of with the recording.
        streams = (shape.layers + 2) * stream
        return Memory(streams=streams, logits=logits, gathered=gathered, kept=kept)
    walked = min(job.room.max_streams(stream), 3 * shape.layers) * stream if config.patching.enabled else 0
    recorded = (3 if config.patching.transplants and config.patching.enabled else 2) * (shape.layers + 1) * stream
    spinal, graph = config.spinal.enabled, 0
    if (spinal and config.spinal.gradient_concentration) or config.patching.exact_pairs is not None:
        graph = (
            2 * (shape.layers + 1) * stream
            + _GRAPH * tokens * (shape.layer_matrices // shape.width) * shape.value_bytes
        )
    grams = 0
    if config.low_rank.enabled and config.patching.enabled and job.low_rank_layers:
        keys = len(config.low_rank.bases) * len(job.low_rank_layers)
        grams = (2 * keys + _MATRICES) * shape.width**2 * 8
    rows = job.spectrum_rows
    return Memory(
        streams=recorded + walked,
        logits=logits,
        graph=graph,
        grams=grams,
        gathered=gathered,
        rows=_rows(job) if spinal else 0,
        spectrum=3 * rows * shape.width * 8 if spinal else 0,
    )


def _rows(job: Job) -> int:
    """Bytes of token rows, on the process that keeps most of them."""
    shape, rows = job.shape, job.spectrum_rows
    kept = 2 * max(map(job.share, range(job.ranks))) * rows * shape.layers
    # As they were sent, put together, and in order; of a block that walks every layer, as sent and put together.
    layer, block = 3 * rows, 2 * min(job.transport_rows, max(PORTION, head_rows(job.room.device, shape.vocabulary)))
    return round((kept + max(layer, block * shape.layers)) * shape.stream_bytes)
