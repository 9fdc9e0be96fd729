"""An audit that is foreseen: of which model, on which pairs, with which options, on how many processes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from align_audit.auditing.costs.shape import ModelShape
from align_audit.auditing.session.kept import KEPT_LOGIT_BYTES
from align_audit.auditing.session.room import Room
from align_audit.auditing.session.subsets import CONTROL, PATCHED, PairChoice, choose_pairs
from align_audit.config import AuditConfig
from align_audit.errors import ConfigurationError
from align_audit.probes.batches import make_batch
from align_audit.probes.pairs import ProbePair, in_canonical_order

Group = tuple[int, ...]
"""Places of the pairs of a batch."""


@dataclass(frozen=True)
class Laid:
    """A batch as it is laid out: R rows of T tokens.

    Attributes:
        pairs: B.
        rows, width: R and T.
        entries: prediction entries, at which a model is read.
        read: positions that hold one.
        longest: tokens of the longest sequence.
    """

    pairs: int
    rows: int
    width: int
    entries: int
    read: int
    longest: int

    @property
    def tokens(self) -> int:
        """R · T, with padding."""
        return self.rows * self.width

    @property
    def meetings(self) -> int:
        """Of queries with keys in one layer."""
        return self.rows * self.width**2


@dataclass(frozen=True)
class Assumed:
    """What only an audit shows, and its cost depends on. None: what makes it cost most, or about as much as it usually does.

    Attributes:
        peak_layer: on which further noise is drawn; None: the middle one.
        low_rank_layers: which are reconstructed where the audit chooses them itself; None: the middle one.
        spanned: by basis and layer, how many of the ranks the rows span; those left out: all.
        transport_rows: on how many transport is measured where it draws them as it needs; None: on all.
        new_tokens: of each continuation; None: as many as may be written.
        embedding_moves: what enters layer 0 is not the same in both models, as with adapters it is.
    """

    peak_layer: int | None = None
    low_rank_layers: tuple[int, ...] | None = None
    spanned: Mapping[tuple[str, int], int] = field(default_factory=dict)
    transport_rows: int | None = None
    new_tokens: int | None = None
    embedding_moves: bool = True


@dataclass(frozen=True)
class Job:
    """An audit on one probe set.

    Args:
        pairs: at least one; as an audit does, those that repeat another are left out.
        room: what batches depend on.
        shared: each pair's prompt is computed once for both completions.
        ranks: processes that share the work.
        spread: weights are spread over them (FSDP2, ZeRO-3), so that all call the same layers.
        assumed: what only the audit will show.

    Raises:
        ConfigurationError: no pair, less than one process, or finer sites, of which nothing is counted.
    """

    shape: ModelShape
    pairs: tuple[ProbePair, ...]
    config: AuditConfig
    room: Room
    shared: bool = True
    ranks: int = 1
    spread: bool = False
    assumed: Assumed = field(default_factory=Assumed)

    def __post_init__(self) -> None:
        if not self.pairs or self.ranks < 1:
            raise ConfigurationError(
                f"expected at least one pair and one process; found {len(self.pairs)} and {self.ranks}"
            )
        if self.config.sites:
            raise ConfigurationError(
                f"expected no finer sites, whose cost is not counted; found {len(self.config.sites)} (sites). Foresee the "
                "audit without them, and measure one with them (align-audit doctor)"
            )

    @classmethod
    def on(cls, shape: ModelShape, pairs: Sequence[ProbePair], config: AuditConfig, room: Room, **more: object) -> Self:
        """With the pairs in the order that an audit puts them in."""
        return cls(shape, in_canonical_order(pairs)[0], config, room, **more)  # type: ignore[arg-type]

    @functools.cached_property
    def choice(self) -> PairChoice:
        """Which pairs are patched."""
        return choose_pairs(self.pairs, self.shape.layers, self.config)

    @functools.cached_property
    def roles(self) -> dict[int, int]:
        """Of each place."""
        return dict(enumerate(self.choice.roles().tolist()))

    @functools.cached_property
    def layers_of(self) -> list[list[int]]:
        """Of each place, the layers that its pair is patched at."""
        return self.choice.layers_of()

    @functools.cached_property
    def plan(self) -> list[Group]:
        """All batches."""
        tokens = self.room.batch_tokens(self.config, self.shape.layers, self.shape.stream_bytes)
        places = range(len(self.pairs))
        plan = self.room.batches(self.pairs, places, self.choice.roles(), tokens, shared=self.shared)
        return [tuple(group) for group in plan]

    def dealt(self, rank: int) -> list[tuple[Group, bool]]:
        """The batches that a process computes in a pass, and whether what they give is kept; else another one's are computed
        once more, as all call the same layers."""
        waiting, computed = list(self.plan), []
        while waiting:
            turn = [group for group in waiting[: self.ranks] if self.roles[group[0]] == self.roles[waiting[0][0]]]
            if rank < len(turn):
                computed.append((turn[rank], True))
            elif self.spread:
                computed.append((turn[0], False))
            waiting = waiting[len(turn) :]
        return computed

    def share(self, rank: int) -> float:
        """Of all pairs, those whose numbers a process keeps after a pass."""
        return sum(len(group) for group, kept in self.dealt(rank) if kept) / sum(map(len, self.plan))

    def kept_logits(self, rank: int) -> int:
        """Rows of which a run's health audits keep the reference's logits, on one process."""
        if self.room.device != "cpu" or self.spread:
            return 0
        entries = sum(self.laid(group).entries for group, _ in self.dealt(rank))
        return min(entries, KEPT_LOGIT_BYTES // (self.shape.vocabulary * self.shape.value_bytes))

    @functools.cached_property
    def _laid(self) -> dict[Group, Laid]:
        return {}

    def laid(self, group: Group, *, shared: bool | None = None) -> Laid:
        """A batch, in the layout of the job or another."""
        shared = self.shared if shared is None else shared
        if not shared or group not in self._laid:
            batch = make_batch([self.pairs[place] for place in group], group, 0, shared=shared)
            rows, width = batch.input_ids.shape
            longest = int(batch.place.max()) + 1
            laid = Laid(len(group), rows, width, batch.row.numel(), batch.read.numel(), longest)
            if shared != self.shared:
                return laid
            self._laid[group] = laid
        return self._laid[group]

    def is_exact(self, group: Group) -> bool:
        """Whether everything is patched on its pairs."""
        return self.roles[group[0]] <= PATCHED

    def is_control(self, group: Group) -> bool:
        """Whether controls are measured on its pairs."""
        return self.roles[group[0]] == CONTROL

    # -- what only an audit shows --------------------------------------------------------------------------------------

    @property
    def peak_layer(self) -> int:
        """On which further noise is drawn."""
        peak = self.assumed.peak_layer
        return self.shape.layers // 2 if peak is None else peak

    @property
    def low_rank_layers(self) -> tuple[int, ...]:
        """Which are reconstructed."""
        named, assumed = self.config.low_rank.layers, self.assumed.low_rank_layers
        if named == "all":
            return tuple(range(self.shape.layers))
        if named != "auto":
            return tuple(sorted(set(named)))
        return (self.shape.layers // 2,) if assumed is None else assumed

    @property
    def ranks_patched(self) -> list[int]:
        """Ranks of subspaces, as far as the model is wide."""
        return [rank for rank in self.config.low_rank.ranks if rank <= self.shape.width] or [self.shape.width]

    @functools.cached_property
    def distinct_rows(self) -> int:
        """Prediction positions that may enter spectra, each prefix counted once in its pair."""
        batches = (make_batch([pair], [place], 0, shared=self.shared) for place, pair in enumerate(self.pairs))
        return sum(int(batch.distinct.sum()) for batch in batches)

    @property
    def spectrum_rows(self) -> int:
        """Rows that enter the spectra."""
        return min(self.distinct_rows, self.config.spinal.max_rows)

    @property
    def transport_rows(self) -> int:
        """Rows that transport is measured on."""
        asked, assumed = self.config.spinal.transport_rows, self.assumed.transport_rows
        if asked == "auto":
            return self.spectrum_rows if assumed is None else min(assumed, self.spectrum_rows)
        return self.spectrum_rows if asked == "all" else min(asked, self.spectrum_rows)
