"""What a run keeps in memory of its reference on one probe set, so that a health audit does not run the reference again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from align_audit.probes.batches import PairBatch


@dataclass
class Continued:
    """Continuations by one model, and what the reference makes of them.

    Attributes:
        tokens: of each prompt, up to and with the one that ends it.
        ended: whether there is one.
        surprise: −log ρ in nats per token, of each.
    """

    tokens: list[list[int]]
    ended: list[bool]
    surprise: list[float]


@dataclass
class KeptReference:
    """Of one reference on one probe set, as long as neither changes.

    Attributes:
        key: what all of it depends on: weights, build, pairs, settings.
        continued: its own continuations; None: not made yet.
    """

    key: tuple[str, ...]
    continued: Continued | None = None
    _layout: list[str | None] = field(default_factory=list)
    _rows: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

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
        """The reference's last stream [P, d] at the prediction entries of a batch; ``run`` makes it the first time."""
        key = _key(batch)
        if key not in self._rows:
            # On the CPU, whatever the model is on: training wants the device's memory for itself in between.
            self._rows[key] = run().cpu()
        return self._rows[key].to(batch.row.device)

    def has_rows(self, batch: PairBatch) -> bool:
        """Whether :meth:`rows` were made of the batch."""
        return _key(batch) in self._rows

    def forget_rows(self, batch: PairBatch) -> None:
        """They are made again: another process does not have those of its own batch."""
        self._rows.pop(_key(batch), None)


def _key(batch: PairBatch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(batch.pair_index.tolist()), tuple(batch.input_ids.shape)
