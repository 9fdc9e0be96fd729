"""Both models of an audit, opened for replay, with the memory and work they take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align_audit.batches import PairBatch, make_batch, plan_batches
from align_audit.errors import ConfigurationError
from align_audit.measures.margin import preference_margin, token_logp
from align_audit.models.anatomy import Anatomy
from align_audit.models.reference import Reference, check_fit
from align_audit.models.replay import Recording, Replay

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes import ProbePair


def check_vocabulary(pairs: Sequence[ProbePair], size: int) -> None:
    """Refuse probe pairs that were tokenized for a larger vocabulary than the policy's."""
    largest = max(max(*pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    if largest >= size:
        raise ConfigurationError(
            f"the probes hold token id {largest}, the policy's vocabulary has {size}: they were tokenized with "
            "another model's tokenizer"
        )


class MemoryMeter:
    """Peak bytes above the start, sampled where an audit holds most; the host program's own statistics stay untouched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self.peak = 0

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        import psutil

        return int(psutil.Process().memory_info().rss)

    def sample(self) -> None:
        self.peak = max(self.peak, self._now() - self._start)


class Session:
    """Policy and reference side by side, each open between its layers.

    When both are one module in two adapter states, only one of them can compute at a time: every use of a replay
    stands inside :meth:`as_policy` or :meth:`as_reference`.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Reference,
        pairs: Sequence[ProbePair],
        config: AuditConfig,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        anatomy: Anatomy | None = None,
        pad_token_id: int = 0,
    ) -> None:
        self._reference = reference
        self.pairs = pairs
        self.config = config
        self.pad_token_id = pad_token_id
        self.policy = Replay(policy, anatomy, autocast)
        self.device = self.policy.device
        self.meter = MemoryMeter(self.device)
        with self.as_reference():
            self.reference = Replay(
                reference.model(), self.policy.anatomy if reference.shares_weights else anatomy, self.policy.autocast
            )
        check_fit(self.policy.anatomy, self.reference.anatomy)
        check_vocabulary(pairs, self.policy.anatomy.vocab_size)
        self.num_layers = self.policy.num_layers
        self.plan = plan_batches(pairs, self._batch_tokens())

    @contextlib.contextmanager
    def as_policy(self) -> Iterator[Replay]:
        yield self.policy

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Replay]:
        with self._reference.active():
            yield getattr(self, "reference", self.policy)

    def batches(self) -> Iterator[PairBatch]:
        """All pairs, longest first; the same batches every time."""
        for group in self.plan:
            yield make_batch([self.pairs[i] for i in group], group, self.pad_token_id).to(self.device)

    def record_both(self, batch: PairBatch) -> tuple[Recording, Recording]:
        """One forward of each model over a batch: (policy's, reference's)."""
        with self.as_policy() as policy:
            ours = policy.record(batch.input_ids, batch.attention_mask)
        with self.as_reference() as reference:
            theirs = reference.record(batch.input_ids, batch.attention_mask)
        self.meter.sample()
        return ours, theirs

    def margins(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Preference margins [B], float64 on the CPU, from a final residual stream [R, T, d]."""
        logp = torch.cat(
            [
                token_logp(replay.head(top[batch.row[block], batch.position[block]]), batch.target[block])
                for block in replay.head_blocks(batch.row.numel())
            ]
        )
        self.meter.sample()
        return preference_margin(logp, batch.pair, batch.side, batch.num_pairs).cpu()

    def max_streams(self, stream: torch.Tensor) -> int:
        """How many streams like this one may be walked together within the working memory."""
        return max(1, self._working_bytes() // 2 // (stream.numel() * stream.element_size()))

    def forward_equivalents(self) -> float:
        """Layer calls so far, as full forwards over all probe pairs."""
        once = sum(2 * len(group) * self._width(group) for group in self.plan) * self.num_layers
        return (self.policy.layer_tokens + self.reference.layer_tokens) / once

    def _width(self, group: Sequence[int]) -> int:
        return max(max(len(self.pairs[i].chosen_ids), len(self.pairs[i].rejected_ids)) for i in group)

    def _working_bytes(self) -> int:
        return self.config.working_memory_mb * 2**20

    def _batch_tokens(self) -> int:
        """Padded tokens a batch: as asked, unless the recordings of both models alone would fill the working memory."""
        # Two recordings of L + 1 streams and L transplanted ones live at once, in half of the working memory.
        size = self.policy.anatomy.hidden_size * torch.finfo(self.policy.stream_dtype).bits // 8
        return max(1, min(self.config.batch_tokens, self._working_bytes() // 2 // ((3 * self.num_layers + 2) * size)))
