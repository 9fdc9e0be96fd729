"""Both models of an audit, opened for replay, with the memory and work they take."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align_audit.auditing.session.layout import why_not_shared
from align_audit.auditing.session.subsets import CONTROL, PATCHED, PairChoice, choose_pairs
from align_audit.errors import AuditMemoryError, ConfigurationError
from align_audit.measures.margin import preference_margin, sum_by_pair, token_logp
from align_audit.models.anatomy import Anatomy, unwrap
from align_audit.models.reference import Reference, check_fit
from align_audit.models.replay import Recording, Replay
from align_audit.probes.batches import PairBatch, make_batch, pair_tokens, plan_batches

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair
    from align_audit.record.audit_record import Attribution

logger = logging.getLogger(__name__)

_CPU_BYTES = 2**20
"""Size of one layer call's stream on a CPU: matrix products are as fast as they get, and the cache still helps."""
_DEVICE_TOKENS = 8192
"""Tokens of one layer call on an accelerator."""
_PADDING = {"cpu": 0.1}
_DEVICE_PADDING = 0.5
"""How much of a batch may be empty: a CPU pays for every empty token, an accelerator above all for every call."""
_WORKING_BYTES = 2**30
_DEVICE_SHARE = 16
"""Working memory where none is given; of an accelerator one part in so many, where that is more: its calls have to be
large to keep it busy. Of all its memory, not of what is free now, so that every audit of a run has the same batches."""


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
        """Look now."""
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
        truncation_mode: str = "keep_start",
        before: Attribution | None = None,
    ) -> None:
        """
        Args:
            truncation_mode: of the pairs; cut from the left, two sequences have no common beginning to rely on.
            before: what the audit before said of attribution on the pairs.
        """
        self._reference = reference
        self.config = config
        self.pad_token_id = pad_token_id
        self.policy = Replay(policy, anatomy, autocast)
        self.device = self.policy.device
        self.meter = MemoryMeter(self.device)
        with self.as_reference():
            self.alike = reference.shares_weights or self._alike(reference.model())
            """Both models are built the same: what holds for how one computes holds for the other."""
            self.reference = Replay(
                reference.model(),
                self.policy.anatomy if reference.shares_weights else anatomy,
                self.policy.autocast,
                self.policy if self.alike and not reference.shares_weights else None,
            )
        check_fit(self.policy.anatomy, self.reference.anatomy)
        self.num_layers = self.policy.num_layers
        self._most_tokens = self._most_bytes = 2**62
        """What running out of memory has taught: bounds of a batch and of the streams walked together."""
        self._work_before = 0
        self._take(pairs, truncation_mode, before)

    def over(
        self, pairs: Sequence[ProbePair], truncation_mode: str = "keep_start", before: Attribution | None = None
    ) -> Session:
        """The same open models on other pairs, with what running out of memory has taught."""
        other = copy.copy(self)
        other.meter = MemoryMeter(self.device)
        other._work_before = self.policy.layer_tokens + self.reference.layer_tokens
        other._take(pairs, truncation_mode, before)
        return other

    def _take(self, pairs: Sequence[ProbePair], truncation_mode: str, before: Attribution | None) -> None:
        """Everything that depends on the pairs."""
        check_vocabulary(pairs, self.policy.anatomy.vocab_size)
        self.pairs = pairs
        self.take_choice(choose_pairs([pair.index for pair in pairs], self.num_layers, self.config, before))
        self.exact_pairs = self.choice.everywhere
        """Places of the pairs that everything is patched on; of the others effects at some layers, or attributions only."""
        self.control_pairs = self.choice.control_pairs
        """Places of the pairs that controls are measured on, some of those that are patched."""
        self._roles = self.choice.roles()
        self.layout_reason = self._why_not_shared(truncation_mode)
        """Why each completion has its own copy of the prompt; None where the prompt is computed once."""
        self.plan = self._plan(range(len(pairs)))

    def take_choice(self, choice: PairChoice) -> None:
        """Which layers each pair is patched at, from now on; roles, and so batches, stay what they are."""
        self.choice = choice
        self._layers_of = choice.layers_of()

    @contextlib.contextmanager
    def as_policy(self) -> Iterator[Replay]:
        """Inside, the policy computes."""
        yield self.policy

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Replay]:
        """Inside, the reference computes."""
        with self._reference.active():
            yield getattr(self, "reference", self.policy)

    def _alike(self, reference: nn.Module) -> bool:
        """Whether the reference is built just as the policy is: what holds for how one computes holds for the other."""
        ours, theirs = self.policy.model, unwrap(reference)

        def build(model: Any) -> tuple[Any, ...]:
            config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
            elsewhere = ("_name_or_path", "dtype", "transformers_version", "use_cache")
            return (
                [(name, type(module)) for name, module in model.named_modules()],
                {name: value for name, value in config.items() if name not in elsewhere},
                getattr(model.config, "_attn_implementation", None),
            )

        return build(ours) == build(theirs)

    @property
    def shared(self) -> bool:
        """Whether a pair's prompt is computed once for both completions."""
        return self.layout_reason is None

    def _why_not_shared(self, truncation_mode: str) -> str | None:
        if not self.config.share_prompts:
            return "switched off (share_prompts)"
        if truncation_mode == "keep_end":
            return "sequences truncated with keep_end begin at different tokens"
        tolerance = 64 * torch.finfo(torch.float32).eps
        for replay in (self.policy, self.reference):
            tolerance = max(tolerance, 8 * torch.finfo(replay.compute_dtype).eps)
        with self.as_reference() as replay:
            reason = why_not_shared(replay, self.pairs, tolerance)
        if reason is None and not self._alike(self.reference.model):
            with self.as_policy() as replay:
                reason = why_not_shared(replay, self.pairs, tolerance)
        return reason

    def is_exact(self, batch: PairBatch) -> bool:
        """Whether everything is patched on this batch's pairs: on all of them, or on none."""
        return bool(self._roles[int(batch.pair_index[0])] <= PATCHED)

    def layers_of(self, batch: PairBatch) -> list[int]:
        """The layers, −1 for what enters layer 0, that this batch's pairs are patched at."""
        return self._layers_of[int(batch.pair_index[0])]

    def is_control(self, batch: PairBatch) -> bool:
        """Whether controls are measured on this batch: on all of its pairs, or on none."""
        return bool(self._roles[int(batch.pair_index[0])] == CONTROL)

    def batch(self, group: Sequence[int]) -> PairBatch:
        """The pairs at those places as one batch, on the models' device."""
        pairs = [self.pairs[i] for i in group]
        return make_batch(pairs, group, self.pad_token_id, shared=self.shared).to(self.device)

    def batches(self, places: Sequence[int]) -> list[list[int]]:
        """The pairs at ``places`` in batches as large as memory is known to allow."""
        return self._plan(places)

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
                words = str(error).splitlines()[0]
            # Out of the handler, so that the failed call's tensors are free.
            self.free_memory()
            waiting = self._halved(group, waiting, words)

    def free_memory(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        # A budget far above what is used would take many halvings to matter: half of what this batch was.
        self._most_tokens = max(1, tokens // 2)
        # A batch's streams: recordings, transplants, and several walked together for each layer.
        used = 8 * self.num_layers * tokens * self._stream_bytes()
        self._most_bytes = max(1, min(self._working_bytes(), used) // 2)
        logger.warning(
            "the audit ran out of memory (%s); it goes on with half the batch (at most %d tokens)",
            words,
            self._most_tokens,
        )
        everything = range(len(self.pairs))
        left = sorted([*group, *(i for later in waiting for i in later)])
        self.plan = self._plan(everything)
        return list(self.plan) if len(left) == len(everything) else self._plan(left)

    def _plan(self, places: Sequence[int]) -> list[list[int]]:
        """Batches of pairs that controls are measured on, of those that are patched, and of the others."""
        plan = []
        padding = _PADDING.get(self.device.type, _DEVICE_PADDING)
        for role in range(int(self._roles.max()) + 1):
            own = [i for i in places if self._roles[i] == role]
            pairs = [self.pairs[i] for i in own]
            groups = plan_batches(pairs, self._batch_tokens(), shared=self.shared, padding=padding)
            plan += [[own[i] for i in group] for group in groups]
        return plan

    def record_both(
        self, batch: PairBatch, until: int | None = None, *, whole_reference: bool = True
    ) -> tuple[Recording, Recording]:
        """One forward of each model over a batch: (policy's, reference's); the policy's up to layer ``until``.

        Args:
            whole_reference: False: the reference's streams end at ``until`` as well; its calls above are kept, so that walks
                can go on.
        """
        ours = self.record_policy(batch, until)
        with self.as_reference() as reference:
            theirs = reference.record(batch.model_inputs(), until=None if whole_reference else until, calls_above=True)
        self.meter.sample()
        return ours, theirs

    def record_policy(self, batch: PairBatch, until: int | None = None) -> Recording:
        """One forward of the policy over a batch, up to layer ``until``."""
        with self.as_policy() as policy:
            recording = policy.record(batch.model_inputs(), until=until)
        self.meter.sample()
        return recording

    def token_logp(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Log-probabilities [P] of the batch's targets, float64, from a final residual stream [R, T, d]."""
        pieces = [
            token_logp(replay.head(top[batch.row[block], batch.position[block]]), batch.target[block])
            for block in replay.head_blocks(batch.row.numel())
        ]
        self.meter.sample()
        return torch.cat(pieces)

    def summed_logp(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of all chosen completions of a batch, and of all rejected ones: two scalars to differentiate.

        Pairs do not touch each other, so the gradient of a sum holds each pair's own gradient in its rows.
        """
        logp = self.token_logp(replay, top, batch)
        chosen, rejected = sum_by_pair(logp, batch.pair, batch.side, batch.num_pairs).sum(1)
        return chosen, rejected

    def margin_objective(self, replay: Replay, batch: PairBatch) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """Of a final stream [R, T, d] the sum of the batch's margins, as ``Replay.stream_gradients`` takes it."""

        def total(top: torch.Tensor) -> list[torch.Tensor]:
            chosen, rejected = self.summed_logp(replay, top, batch)
            return [chosen - rejected]

        return total

    def margins(self, replay: Replay, top: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Preference margins [B], float64 on the CPU, from a final residual stream [R, T, d]."""
        logp = self.token_logp(replay, top, batch)
        return preference_margin(logp, batch.pair, batch.side, batch.num_pairs).cpu()

    def each_margin(
        self, replay: Replay, walked: Iterator[tuple[Hashable, torch.Tensor | None]], batch: PairBatch
    ) -> Iterator[tuple[Hashable, torch.Tensor | None]]:
        """:meth:`margins` of every walked stream; None for one that was not walked.

        Streams go through the head together, as many rows at once as keep it busy; only those rows are kept of each.
        """
        waiting: list[tuple[Hashable, torch.Tensor]] = []
        block = next(replay.head_blocks(2**62)).stop
        for key, top in walked:
            if top is None:
                yield key, None
                continue
            waiting.append((key, top[batch.row, batch.position]))
            if (len(waiting) + 1) * batch.row.numel() > block:
                yield from self._read(replay, waiting, batch)
                waiting = []
        yield from self._read(replay, waiting, batch)

    def _read(
        self, replay: Replay, waiting: list[tuple[Hashable, torch.Tensor]], batch: PairBatch
    ) -> Iterator[tuple[Hashable, torch.Tensor]]:
        if not waiting:
            return
        rows = torch.cat([part for _, part in waiting])
        target = batch.target.repeat(len(waiting))
        logp = [token_logp(replay.head(rows[block]), target[block]) for block in replay.head_blocks(len(rows))]
        self.meter.sample()
        for (key, _), own in zip(waiting, torch.cat(logp).split(batch.row.numel()), strict=True):
            yield key, preference_margin(own, batch.pair, batch.side, batch.num_pairs).cpu()

    def max_streams(self, stream: torch.Tensor) -> int:
        """How many streams like this one may be walked together within the working memory."""
        return max(1, self._working_bytes() // 2 // (stream.numel() * stream.element_size()))

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be held through a whole pass beside the streams: a quarter of the working memory."""
        return size <= self._working_bytes() // 4

    def forward_equivalents(self, pairs: Sequence[ProbePair] | None = None) -> float:
        """Layer calls so far, as full forwards over both sequences of every probe pair (or of these ``pairs``)."""
        over = self.pairs if pairs is None else pairs
        once = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in over) * self.num_layers
        return (self.policy.layer_tokens + self.reference.layer_tokens - self._work_before) / once

    def _working_bytes(self) -> int:
        asked = self.config.working_memory_mb
        wanted = _usual_working_bytes(self.device) if asked is None else asked * 2**20
        return min(wanted, self._most_bytes)

    def _stream_bytes(self) -> int:
        """Of one token's residual stream."""
        return self.policy.anatomy.hidden_size * torch.finfo(self.policy.stream_dtype).bits // 8

    def _batch_tokens(self) -> int:
        """Padded tokens a batch: as asked, unless the recordings of both models alone would fill the working memory."""
        wanted = self.config.batch_tokens
        if wanted is None:
            wanted = _CPU_BYTES // self._stream_bytes() if self.device.type == "cpu" else _DEVICE_TOKENS
        # Two recordings of L + 1 streams and L transplanted ones live at once, in half of the working memory; and before
        # anything is transplanted two recordings, one between them, and gradients on their way to disk.
        streams = (4 if self.config.patching.keep_reference else 3) * self.num_layers + 4
        recorded = self._working_bytes() // 2 // (streams * self._stream_bytes())
        return max(1, min(wanted, self._most_tokens, recorded))


def _usual_working_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _WORKING_BYTES
    return max(_WORKING_BYTES, torch.cuda.get_device_properties(device).total_memory // _DEVICE_SHARE)


def out_of_memory(error: BaseException) -> bool:
    """An allocation that failed: on a device, or in the words of torch's CPU allocator."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "not enough memory" in str(error)
        or ("can't allocate memory" in str(error))
    )
