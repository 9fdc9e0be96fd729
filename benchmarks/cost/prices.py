"""What a unit of an audit's work costs on a machine: measured in a short calibration, or published figures of an accelerator.

The units are those of :class:`align_audit.auditing.costs.work.Work`; :func:`seconds` multiplies one by the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.costs.work import PartName, Work


@dataclass(frozen=True)
class Prices:
    """Seconds for each unit, for a model of one shape.

    Attributes:
        call: a layer's call, whatever is in it.
        token_flop, meeting_flop: a FLOP of a layer's matrices, and of its attention.
        backward: how many times the forward's price a layer's backward pass costs, by its tokens.
        head_call, head_flop: a call of norm and unembedding, and a FLOP in it.
        scored, sloped, compared, travelled: one row's logit, read as :class:`Work` says.
        decode_call, decode_step: a layer's call for a few tokens, and what a step takes beside these.
        wide_flop, cube: of products and eigendecompositions in float64, where the models are.
        value_cube, singular: of eigenvalues and singular values alone, there.
        host_flop: of products in float64 in the host's memory.
        normal: a random number.
        stream_byte, kept_byte, hashed_byte: read or written.
        estimate, fit: of the statistics.
        gather, gathered_byte: a layer that is brought together, and a byte of it.
        exchange: a small message between all processes.
        brought_byte: of what is brought together after a pass, over the host's network.
        audit: what any audit takes beside all this.
    """

    call: float
    token_flop: float
    meeting_flop: float
    backward: float
    head_call: float
    head_flop: float
    scored: float
    sloped: float
    compared: float
    travelled: float
    decode_call: float
    decode_step: float
    wide_flop: float
    cube: float
    value_cube: float
    singular: float
    host_flop: float
    normal: float
    stream_byte: float
    kept_byte: float
    hashed_byte: float
    estimate: float
    fit: float
    gather: float
    gathered_byte: float
    exchange: float
    brought_byte: float
    audit: float


def between(first: Prices, second: Prices) -> Prices:
    """The mean of two calibrations, before and after a job: a machine that others use is not as fast all the time."""
    return Prices(*((getattr(first, each.name) + getattr(second, each.name)) / 2 for each in fields(Prices)))


def seconds(parts: Mapping[PartName, Work], shape: ModelShape, prices: Prices) -> dict[str, float]:
    """Of each part, on one process; what all messages take has a part of its own, ``messages``."""
    each: dict[str, float] = {part: _of(work, shape, prices) for part, work in parts.items()}
    each["opening"] = each.get("opening", 0.0) + prices.audit
    each["messages"] = sum(_messages(work, shape, prices) for work in parts.values())
    return each


def _of(work: Work, shape: ModelShape, prices: Prices) -> float:
    forward = work.tokens * shape.layer_flops - work.spared * shape.spared_flops
    vocabulary = (
        work.scored * prices.scored + work.sloped * prices.sloped + work.compared * prices.compared
        + work.travelled * prices.travelled
    )  # fmt: skip
    return (
        work.calls * prices.call
        + forward * prices.token_flop
        + work.meetings * shape.meeting_flops * prices.meeting_flop
        + prices.backward
        * (
            work.backward_tokens * shape.layer_flops * prices.token_flop
            + work.backward_meetings * shape.meeting_flops * prices.meeting_flop
        )
        + work.head_calls * prices.head_call
        + (work.head_rows + work.head_backward_rows) * shape.head_flops * prices.head_flop
        + vocabulary * shape.vocabulary
        + work.decode_calls * prices.decode_call
        + work.decode_tokens * shape.layer_flops * prices.token_flop
        + work.decode_steps * prices.decode_step
        + work.wide_flops * prices.wide_flop
        + work.cubes * prices.cube
        + work.value_cubes * prices.value_cube
        + work.singular * prices.singular
        + work.host_flops * prices.host_flop
        + work.normals * prices.normal
        + work.stream_bytes * prices.stream_byte
        + work.kept_bytes * prices.kept_byte
        + work.hashed_bytes * prices.hashed_byte
        + work.estimates * prices.estimate
        + work.fits * prices.fit
    )


def _messages(work: Work, shape: ModelShape, prices: Prices) -> float:
    return (
        work.gathers * prices.gather
        + work.gathered_weights * shape.value_bytes * prices.gathered_byte
        + work.exchanges * prices.exchange
        + work.brought_bytes * prices.brought_byte
    )
