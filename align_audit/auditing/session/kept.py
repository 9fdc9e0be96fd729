"""What a run keeps in memory of its reference on one probe set, so that a health audit does not run the reference again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import fmean

import torch

from align_audit.measures.margin import TokenReadout
from align_audit.probes.batches import PairBatch

KEPT_BYTES = 2**30
"""Of a probe set's rows, how much stays in the host's memory; what is beyond that is computed at every look."""

KEPT_LOGIT_BYTES = 2**29
"""Of a probe set's logits, how much stays in memory where the models compute on the host: on an accelerator they are made
faster than they are brought there."""

RowsKey = tuple[tuple[int, ...], tuple[int, ...]]
"""A batch: places of its pairs, and the shape that they are laid out in."""


@dataclass
class Continued:
    """Continuations by one model, and what the reference makes of them.

    Attributes:
        tokens: of each prompt, up to and with the one that ends it.
        ended: whether there is one.
        surprises: −log ρ of each of these tokens, nats.
        ends: the tokens that end a text.
    """

    tokens: list[list[int]]
    ended: list[bool]
    surprises: list[list[float]]
    ends: frozenset[int] = frozenset()

    @property
    def surprise(self) -> list[float]:
        """−log ρ of each continuation, nats per token."""
        return [fmean(values) for values in self.surprises]

    def read_before(self, place: int, text: Sequence[int]) -> list[float]:
        """What is known of another continuation of the prompt in this place: −log ρ of the tokens that both begin with."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, self.tokens[place], strict=False))
        return self.surprises[place][: sum(1 for _ in same)]


@dataclass
class KeptReference:
    """Of one reference on one probe set, as long as neither changes.

    Attributes:
        key: what all of it depends on: weights, build, how the policy is built, pairs, settings.
        continued: its own continuations; None: not made yet.
        why_not_continued: why it cannot continue a text, once that has shown.
    """

    key: tuple[str, ...]
    continued: Continued | None = None
    why_not_continued: str | None = None
    _layout: list[str | None] = field(default_factory=list)
    _rows: dict[RowsKey, torch.Tensor] = field(default_factory=dict)
    _readouts: dict[RowsKey, TokenReadout] = field(default_factory=dict)
    _logits: dict[RowsKey, dict[int, torch.Tensor]] = field(default_factory=dict)

    @property
    def has_layout(self) -> bool:
        """Whether :meth:`layout` was found out."""
        return bool(self._layout)

    def forget_layout(self) -> None:
        """It is found out again: another process does not know it."""
        self._layout.clear()

    def layout(self, find: Callable[[], str | None]) -> str | None:
        """Why a pair's prompt cannot be computed once, found out the first time; None: it can."""
        if not self._layout:
            self._layout.append(find())
        return self._layout[0]

    def rows(self, batch: PairBatch, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The reference's last stream [P, d] at the prediction entries of a batch; ``run`` makes it the first time, and every
        time where :data:`KEPT_BYTES` are full."""
        key = rows_key(batch)
        if key not in self._rows:
            made = run()
            if self.kept_bytes + made.nbytes > KEPT_BYTES:
                return made
            # On the CPU, whatever the model is on: training wants the device's memory for itself in between.
            self._rows[key] = made.cpu()
        return self._rows[key].to(batch.row.device)

    def readout(self, batch: PairBatch) -> TokenReadout | None:
        """What the reference says at the prediction entries [P] of a batch whose rows are kept; None: not read yet."""
        readout = self._readouts.get(rows_key(batch))
        return None if readout is None else readout.to(batch.row.device)

    def keep_readout(self, batch: PairBatch, readout: TokenReadout) -> None:
        """What was read from the rows of a batch, where they are kept."""
        if self.has_rows(batch):
            self._readouts[rows_key(batch)] = readout.to("cpu")

    def logits(self, batch: PairBatch, block: slice, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The reference's logits [n, V] at a block of a batch's prediction entries; ``run`` makes them the first time, and
        every time where the rows are not kept, :data:`KEPT_LOGIT_BYTES` are full or an accelerator makes them."""
        of_batch = self._logits.get(rows_key(batch), {})
        if block.start in of_batch:
            return of_batch[block.start]
        made = run()
        full = self.kept_logit_bytes + made.nbytes > KEPT_LOGIT_BYTES
        if made.device.type == "cpu" and self.has_rows(batch) and not full:
            self._logits[rows_key(batch)] = {**of_batch, block.start: made}
        return made

    @property
    def kept_logit_bytes(self) -> int:
        """Of all :meth:`logits` that are kept."""
        return sum(logits.nbytes for blocks in self._logits.values() for logits in blocks.values())

    @property
    def kept_bytes(self) -> int:
        """Of all :meth:`rows` that are kept."""
        return sum(rows.nbytes for rows in self._rows.values())

    def has_rows(self, batch: PairBatch) -> bool:
        """Whether :meth:`rows` of the batch are kept."""
        return rows_key(batch) in self._rows

    def forget_rows(self, batch: PairBatch) -> None:
        """They are made again: another process does not have those of its own batch."""
        self._rows.pop(rows_key(batch), None)
        self._readouts.pop(rows_key(batch), None)
        self._logits.pop(rows_key(batch), None)

    def forget_rows_but(self, keys: Collection[RowsKey]) -> None:
        """Let go of the rows of all other batches: pairs go together otherwise by now, and nobody asks for them again."""
        self._rows = {key: rows for key, rows in self._rows.items() if key in keys}
        self._readouts = {key: readout for key, readout in self._readouts.items() if key in keys}
        self._logits = {key: blocks for key, blocks in self._logits.items() if key in keys}


def rows_key(batch: PairBatch) -> RowsKey:
    """What :meth:`KeptReference.rows` of a batch are kept under."""
    return tuple(batch.pair_index.tolist()), tuple(batch.input_ids.shape)
