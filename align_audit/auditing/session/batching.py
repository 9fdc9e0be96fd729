"""The pairs of a session in batches as large as memory allows, and smaller ones after running out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from align_audit.auditing.session.memory import free_memory, out_of_memory, usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import AuditMemoryError
from align_audit.probes.batches import PairBatch, make_batch, pair_tokens, plan_batches

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair

logger = logging.getLogger(__name__)

_CPU_BYTES = 2**20
"""Size of one layer call's stream on a CPU: matrix products are as fast as they get, and the cache still helps."""
_DEVICE_TOKENS = 8192
"""Tokens of one layer call on an accelerator."""
_PADDING = {"cpu": 0.1}
_DEVICE_PADDING = 0.5
"""How much of a batch may be empty: a CPU pays for every empty token, an accelerator above all for every call."""
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
        plan = []
        padding = _PADDING.get(self.device.type, _DEVICE_PADDING)
        for role in range(int(self._roles.max()) + 1):
            alike = [i for i in places if self._roles[i] == role]
            pairs = [self.pairs[i] for i in alike]
            groups = plan_batches(pairs, self._batch_tokens(), shared=self.shared, padding=padding)
            plan += [[alike[i] for i in group] for group in groups]
        return plan

    def each_batch(self, work: Callable[[PairBatch], None], places: Sequence[int] | None = None) -> None:
        """Do ``work`` on all pairs (or those at ``places``), longest first, batch by batch; smaller batches after running
        out of memory.

        ``work`` may be called again on pairs of a batch in which it ran out; it must leave nothing behind then.

        Raises:
            AuditMemoryError: one pair and one stream at a time is still too much.
        """
        waiting = list(self.plan) if places is None else self.batches(places)
        while waiting:
            group = waiting.pop(0)
            try:
                work(self.batch(group))
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                words = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Out of the handler, so that the failed call's tensors are free.
            self.free_memory()
            waiting = self._halved(group, waiting, words)

    def free_memory(self) -> None:
        """Give back what nothing refers to any more."""
        free_memory(self.device)

    def _halved(self, group: list[int], waiting: list[list[int]], words: str) -> list[list[int]]:
        """What is left to do after ``group`` ran out of memory, in batches and groups of streams half as large."""
        longest = max(pair_tokens(self.pairs[i], self.shared) for i in group)
        tokens = longest * len(group) * (1 if self.shared else 2)
        if len(group) == 1 and self._working_bytes() // 2 < tokens * self._stream_bytes():
            pair = self.pairs[group[0]]
            raise AuditMemoryError(
                f"out of memory with a single pair of {len(pair.chosen_ids)} and {len(pair.rejected_ids)} tokens in a "
                f"batch and a single patched stream at a time ({words}). Expected room for two recordings of "
                f"{self.num_layers + 1} streams beside the models: a shorter max_length, or a smaller training batch."
            )
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
        left = sorted([*group, *(i for later in waiting for i in later)])
        self.plan = self.batches(everything)
        return list(self.plan) if len(left) == len(everything) else self.batches(left)

    # -- memory and work -----------------------------------------------------------------------------------------------

    def max_streams(self, stream: torch.Tensor) -> int:
        """How many streams like this one may be walked together within the working memory."""
        return max(1, self._working_bytes() // 2 // (stream.numel() * stream.element_size()))

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be held through a whole pass beside the streams: a quarter of the working memory."""
        return size <= self._working_bytes() // 4

    def _working_bytes(self) -> int:
        asked = self.config.working_memory_mb
        wanted = usual_working_bytes(self.device) if asked is None else asked * 2**20
        return min(wanted, self.models.bounds.bytes)

    def _stream_bytes(self) -> int:
        """Of one token's residual stream."""
        return self.width * torch.finfo(self.models.policy.stream_dtype).bits // 8

    def _batch_tokens(self) -> int:
        """Padded tokens a batch: as asked, unless the recordings of both models alone would fill the working memory."""
        wanted = self.config.batch_tokens
        if wanted is None:
            wanted = _CPU_BYTES // self._stream_bytes() if self.device.type == "cpu" else _DEVICE_TOKENS
        # Two recordings of L + 1 streams and L transplanted ones live at once, in half of the working memory; and before
        # anything is transplanted two recordings, one between them, and gradients on their way to disk.
        streams = (4 if self.config.patching.keep_reference else 3) * self.num_layers + 4
        recorded = self._working_bytes() // 2 // (streams * self._stream_bytes())
        return max(1, min(wanted, self.models.bounds.tokens, recorded))
