"""How much an audit takes at once on a device: tokens of a batch, and streams that are walked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from align_audit.probes.batches import plan_batches

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair

_CPU_BYTES = 2**20
"""Size of one layer call's stream on a CPU: matrix products are as fast as they get, and the cache still helps."""
_DEVICE_TOKENS = 8192
"""Tokens of one layer call on an accelerator."""
_PADDING = {"cpu": 0.1}
_DEVICE_PADDING = 0.5
"""How much of a batch may be empty: a CPU pays for every empty token, an accelerator above all for every call."""


@dataclass(frozen=True)
class Room:
    """A device, as far as batches depend on it.

    Attributes:
        device: its type, as ``torch.device.type`` has it.
        working_bytes: what the streams of one batch may take together.
    """

    device: str
    working_bytes: int

    def batch_tokens(self, config: AuditConfig, layers: int, stream_bytes: int, most: int = 2**62) -> int:
        """Padded tokens a batch: as asked, unless the recordings of both models alone would fill the working memory.

        Args:
            layers: L.
            stream_bytes: of one token's residual stream.
            most: what memory was seen to hold.
        """
        wanted = config.batch_tokens
        if wanted is None:
            wanted = _CPU_BYTES // stream_bytes if self.device == "cpu" else _DEVICE_TOKENS
        # Two recordings of L + 1 streams and L transplanted ones live at once, in half of the working memory; and before
        # anything is transplanted two recordings, one between them, and gradients on their way to disk.
        streams = (4 if config.patching.keep_reference else 3) * layers + 4
        recorded = self.working_bytes // 2 // (streams * stream_bytes)
        return max(1, min(wanted, most, recorded))

    def max_streams(self, stream_bytes: int) -> int:
        """How many streams of so many bytes may be walked together within the working memory."""
        return max(1, self.working_bytes // 2 // stream_bytes)

    def holds_beside(self, size: int) -> bool:
        """Whether so many bytes may be held through a whole pass beside the streams: a quarter of the working memory."""
        return size <= self.working_bytes // 4

    def batches(
        self, pairs: Sequence[ProbePair], places: Sequence[int], roles: np.ndarray, tokens: int, *, shared: bool
    ) -> list[list[int]]:
        """The pairs at ``places`` in batches of at most so many padded tokens: those of one role together, by role.

        Args:
            roles: [N] of each place, see :meth:`~align_audit.auditing.session.subsets.PairChoice.roles`.
        """
        plan = []
        padding = _PADDING.get(self.device, _DEVICE_PADDING)
        for role in range(int(roles.max()) + 1):
            alike = [i for i in places if roles[i] == role]
            groups = plan_batches([pairs[i] for i in alike], tokens, shared=shared, padding=padding)
            plan += [[alike[i] for i in group] for group in groups]
        return plan
