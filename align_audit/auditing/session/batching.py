"""The pairs of a session in batches as large as memory allows, and smaller ones after running out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from align_audit.auditing.session.memory import free_memory, out_of_memory, usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.room import Room
from align_audit.errors import AuditMemoryError
from align_audit.probes.batches import PairBatch, make_batch, pair_tokens
from align_audit.ranks import Agreed, Ranks, Status, told

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair

logger = logging.getLogger(__name__)

Work = Callable[[PairBatch], Callable[[], None] | None]
"""Does something on a batch; gives what adds it up, and cannot be written over, if anything."""

Merge = Callable[[Ranks, np.ndarray], None]
"""Brings together what processes hold, of the pairs at the places that this one has worked on."""

_PAD_TOKEN = 0
"""Any token of any vocabulary: what stands there is masked."""


class Batching:
    """Which pairs go together. Pairs of one role are in one batch, so that a batch is treated as a whole.

    Attributes:
        plan: places of the pairs, batch by batch.
    """

    models: OpenModels
    pairs: Sequence[ProbePair]
    config: AuditConfig
    plan: list[list[int]]
    layout_reason: str | None
    """Why each completion has its own copy of the prompt; None where the prompt is computed once."""
    worked_on: np.ndarray
    """[N] whether this process has worked on the pair since :meth:`bring_together`."""
    reference_strays: bool
    """Replaying a recording of the reference did not give it back bit by bit, on some batch."""
    _roles: np.ndarray
    """[N] of each place, see :meth:`PairChoice.roles`."""

    @property
    def num_layers(self) -> int:
        """L."""
        return self.models.num_layers

    @property
    def width(self) -> int:
        """d, of the residual stream."""
        return self.models.policy.anatomy.hidden_size

    @property
    def device(self) -> torch.device:
        """Where both models compute."""
        return self.models.device

    @property
    def shared(self) -> bool:
        """Whether a pair's prompt is computed once for both completions."""
        return self.layout_reason is None

    # -- batches -------------------------------------------------------------------------------------------------------

    def batch(self, group: Sequence[int]) -> PairBatch:
        """The pairs at those places as one batch, on the models' device."""
        pairs = [self.pairs[i] for i in group]
        return make_batch(pairs, group, _PAD_TOKEN, shared=self.shared).to(self.device)

    def batches(self, places: Sequence[int]) -> list[list[int]]:
        """The pairs at ``places`` in batches as large as memory is known to allow: first those that controls are measured
        on, then those that are patched, then the others."""
        return self._room().batches(self.pairs, places, self._roles, self._batch_tokens(), shared=self.shared)

    def each_batch(
        self, work: Work, places: Sequence[int] | None = None, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Do ``work`` on all pairs (or those at ``places``), longest first, batch by batch; smaller batches after running
        out of memory. Several processes take turns of the one plan; see :meth:`bring_together`.

        ``work`` may be called again on pairs of a batch in which it ran out, or another process did; it must leave nothing
        behind then that is not written over. What it gives back is called once for a batch that went through everywhere.

        Args:
            tick: called after each batch.

        Raises:
            AuditMemoryError: one pair and one stream at a time is still too much.
            Agreed: another process cannot go on.
        """
        waiting = list(self.plan) if places is None else self.batches(places)
        while waiting:
            turn = self._turn(waiting)
            words = self._work_on(turn, work)
            waiting = waiting[len(turn) :]
            if words is None:
                for _ in turn:
                    tick()
                continue
            # Out of the handler, so that the failed call's tensors are free.
            self.models.rest()
            self.free_memory()
            waiting = self._halved(turn, waiting, words)

    def _turn(self, waiting: list[list[int]]) -> list[list[int]]:
        """The next batches that are worked on at once, one on each process: all of one role, and so treated alike."""
        turn = waiting[: self.models.ranks.size]
        roles = [self._roles[group[0]] for group in turn]
        return [group for group, role in zip(turn, roles, strict=True) if role == roles[0]]

    def _work_on(self, turn: list[list[int]], work: Work) -> str | None:
        """This process's batch of a turn; what running out of memory said, here or elsewhere, or None."""
        ranks = self.models.ranks
        share = turn[ranks.rank] if ranks.rank < len(turn) else None
        # Weights that are spread are brought together by all: who has no batch left repeats the first one, and keeps nothing.
        group = turn[0] if share is None and self.models.spread else share
        add = None
        try:
            with ranks.together(out_of_memory):
                if group is not None:
                    add = work(self.batch(group))
                if add is not None and ranks.size == 1:
                    add()
        except Agreed as agreed:
            if agreed.status is not Status.MEMORY:
                raise
            return "on another process"
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        if share is not None:
            self.worked_on[share] = True
            if add is not None and ranks.size > 1:
                add()
        return None

    def bring_together(self, *merges: Merge) -> None:
        """After a pass: every process then holds what one would have of all pairs.

        Args:
            merges: each takes over what other processes have of the pairs that they worked on.
        """
        ranks, places = self.models.ranks, np.flatnonzero(self.worked_on)
        self.worked_on[:] = False
        if ranks.size == 1:
            return
        self.reference_strays = ranks.any(self.reference_strays)
        for merge in merges:
            merge(ranks, places)

    def least(self, number: int) -> int:
        """What all processes have room for, where they have to call the same layers."""
        return min(self.models.ranks.gather(number)) if self.models.spread else number

    def layers_of_any(self, layers: Sequence[int]) -> list[int]:
        """The layers that any process names, ascending, where they have to call the same ones."""
        if not self.models.spread:
            return list(layers)
        return sorted(set().union(*self.models.ranks.gather(layers)))

    def so_for_any(self, decision: bool) -> bool:
        """Whether it is so on any process, where they have to call the same layers."""
        return self.models.ranks.any(decision) if self.models.spread else decision

    def free_memory(self) -> None:
        """Give back what nothing refers to any more."""
        free_memory(self.device)

    def _halved(self, turn: list[list[int]], waiting: list[list[int]], words: str) -> list[list[int]]:
        """What is left to do after a ``turn`` ran out of memory, in batches and groups of streams half as large."""
        tokens, group = max((self._tokens(group), group) for group in turn)
        if len(group) == 1 and self._working_bytes() // 2 < tokens * self._stream_bytes():
            pair = self.pairs[group[0]]
            # All processes come to this.
            error = AuditMemoryError(
                f"out of memory with a single pair of {len(pair.chosen_ids)} and {len(pair.rejected_ids)} tokens in a "
                f"batch and a single patched stream at a time ({words}). Expected room for two recordings of "
                f"{self.num_layers + 1} streams beside the models: a shorter max_length, or a smaller training batch."
            )
            raise told(error)
        bounds = self.models.bounds
        # A budget far above what is used would take many halvings to matter: half of what this batch was.
        bounds.tokens = max(1, tokens // 2)
        # A batch's streams: recordings, transplants, and several walked together for each layer.
        used = 8 * self.num_layers * tokens * self._stream_bytes()
        bounds.bytes = max(1, min(self._working_bytes(), used) // 2)
        logger.warning(
            "the audit ran out of memory (%s); it goes on with half the batch (at most %d tokens)", words, bounds.tokens
        )
        everything = range(len(self.pairs))
        left = sorted(i for group in (*turn, *waiting) for i in group)
        self.plan = self.batches(everything)
        return list(self.plan) if len(left) == len(everything) else self.batches(left)

    def _tokens(self, group: Sequence[int]) -> int:
        """Of a batch, with its padding."""
        longest = max(pair_tokens(self.pairs[i], self.shared) for i in group)
        return longest * len(group) * (1 if self.shared else 2)

    # -- memory and work -----------------------------------------------------------------------------------------------

    def max_streams(self, stream: torch.Tensor) -> int:
        """How many streams like this one may be walked together within the working memory."""
        return self._room().max_streams(stream.numel() * stream.element_size())

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be held through a whole pass beside the streams: a quarter of the working memory."""
        return self._room().holds_beside(size)

    def _room(self) -> Room:
        return Room(self.device.type, self._working_bytes())

    def _working_bytes(self) -> int:
        asked = self.config.working_memory_mb
        wanted = usual_working_bytes(self.device) if asked is None else asked * 2**20
        return min(wanted, self.models.bounds.bytes)

    def _stream_bytes(self) -> int:
        """Of one token's residual stream."""
        return self.width * torch.finfo(self.models.policy.stream_dtype).bits // 8

    def _batch_tokens(self) -> int:
        """Padded tokens a batch."""
        return self._room().batch_tokens(
            self.config, self.num_layers, self._stream_bytes(), most=self.models.bounds.tokens
        )
