"""What has to be computed, moved and said, counted in units whose price a machine has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from align_audit.auditing.costs.shape import ModelShape

PartName = Literal[
    "opening", "recordings", "margins", "attribution", "transplants", "patching", "controls", "low_rank", "gradients",
    "transport", "spectra", "generations", "hashing", "statistics",
]  # fmt: skip
"""What an audit does, each with work of its own."""

PARTS: tuple[PartName, ...] = get_args(PartName)


@dataclass(frozen=True)
class Work:
    """Counts; those of several parts, or processes, add up.

    Attributes:
        calls: of decoder layers, forward.
        tokens: layer calls × tokens, forward.
        spared: of these, tokens of the last layer that run through its keys and values only.
        meetings: of a query with a key in a layer, masked ones among them: attention computes them all.
        backward_tokens, backward_meetings: the same of layers' backward passes.
        head_calls: of norm and unembedding.
        head_rows, head_backward_rows: rows through these, forward and backward.
        scored, sloped, compared, travelled: rows whose distribution over the vocabulary is read for one log-probability, for
            that one's gradient, beside another model's, and beside the layer below's.
        decode_calls, decode_tokens: of layers, in continuations, where each call reads a layer's weights for a few tokens.
        decode_steps: tokens that continuations write one after the other.
        wide_flops: of matrix products in float64, where the models are.
        cubes: d³ of each eigendecomposition in float64, there.
        value_cubes: the same of each that makes no vectors, there.
        singular: rows · d · min(rows, d) of each matrix whose singular values are made in float64, there.
        host_flops: of matrix products in float64, in the host's memory.
        normals: random numbers that are drawn on the host.
        stream_bytes: that patches read and write of residual streams.
        kept_bytes: of rows that are copied to the host.
        hashed_bytes: of weights.
        estimates: numbers of the record that intervals are made for, times their pairs.
        fits: of a LASSO path, times the values that each is fitted to.
        gathers: how often a layer, or what is outside of the layers, is brought together from all processes.
        gathered_weights: weights that this brings.
        exchanges: of small messages between all processes.
        brought_bytes: that each process receives of the others after a pass: numbers of pairs, token rows, sums.
    """

    calls: int = 0
    tokens: int = 0
    spared: int = 0
    meetings: int = 0
    backward_tokens: int = 0
    backward_meetings: int = 0
    head_calls: int = 0
    head_rows: int = 0
    head_backward_rows: int = 0
    scored: int = 0
    sloped: int = 0
    compared: int = 0
    travelled: int = 0
    decode_calls: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    wide_flops: int = 0
    cubes: int = 0
    value_cubes: int = 0
    singular: int = 0
    host_flops: int = 0
    normals: int = 0
    stream_bytes: int = 0
    kept_bytes: int = 0
    hashed_bytes: int = 0
    estimates: int = 0
    fits: int = 0
    gathers: int = 0
    gathered_weights: int = 0
    exchanges: int = 0
    brought_bytes: int = 0

    def __add__(self, addend: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(addend, name) for name in NAMES))

    @property
    def layer_tokens(self) -> int:
        """Layer calls × tokens, as :class:`~align_audit.models.replay.Replay` counts them: a backward pass is a call."""
        return self.tokens + self.backward_tokens

    def flops(self, shape: ModelShape) -> int:
        """Of matrix products at the model's precision: layers, attention, norm and unembedding, forward and backward."""
        layers = (self.tokens + self.backward_tokens) * shape.layer_flops - self.spared * shape.spared_flops
        attention = (self.meetings + self.backward_meetings) * shape.meeting_flops
        return layers + attention + (self.head_rows + self.head_backward_rows) * shape.head_flops


NAMES = tuple(each.name for each in fields(Work))


def total(works: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(works, Work())
