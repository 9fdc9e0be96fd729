"""The probe pairs of an audit in batches, and patched streams walked through a model on each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch

from align_audit.auditing.session.estimates import Estimates
from align_audit.auditing.session.kept import KeptReference
from align_audit.auditing.session.layout import why_not_shared
from align_audit.auditing.session.memory import MemoryMeter, usual_working_bytes
from align_audit.auditing.session.open_models import OpenModels, check_positions, check_vocabulary, check_wrappers
from align_audit.auditing.session.readout import Readout
from align_audit.auditing.session.subsets import CONTROL, PATCHED, PairChoice, choose_pairs
from align_audit.auditing.session.unpatched import Unpatched, UnpatchedRuns
from align_audit.errors import ProbeError
from align_audit.models.precision import rounding
from align_audit.models.replay import Recording, Replay, Stream
from align_audit.probes.batches import PairBatch
from align_audit.probes.pairs import in_canonical_order

if TYPE_CHECKING:
    from align_audit.config import AuditConfig
    from align_audit.probes.pairs import ProbePair
    from align_audit.record.audit_record import Attribution

logger = logging.getLogger(__name__)


class Session(UnpatchedRuns):
    """One probe set between two open models: its batches, and what is walked on them.

    Args:
        pairs: at least one. Those that repeat another are left out, and the rest are put in an order that only their tokens
            decide: what goes by place then goes by what a pair is.
        truncation_mode: of the pairs; cut from the left, two sequences have no common beginning to rely on.
        previous: what the previous audit said of attribution on the pairs.
        kept: what a run keeps in memory of its reference on the pairs.

    Attributes:
        pairs: the N distinct ones in that order.
        places: for each given pair its place among them, or that of the one it repeats.
        estimates: makes intervals as the options say, over all N pairs.
        exact_pairs: places of the pairs that everything is patched on; of the others effects at some layers, or attributions
            only.
        control_pairs: places of the pairs that controls are measured on, some of those that are patched.
        reference_strays: replaying a recording of the reference did not give it back bit by bit, on some batch.

    Raises:
        ProbeError: there are no pairs.
        ConfigurationError: the pairs were tokenized for another vocabulary, or are longer than a model has positions.
        AnatomyError: what is around a model computes something that replay would not.
    """

    def __init__(
        self,
        models: OpenModels,
        pairs: Sequence[ProbePair],
        config: AuditConfig,
        *,
        truncation_mode: str = "keep_start",
        previous: Attribution | None = None,
        kept: KeptReference | None = None,
    ) -> None:
        if len(pairs) == 0:
            raise ProbeError("the probe set is empty; expected at least one preference pair")
        self.models = models.open()
        models.rest()
        self.pairs, self.places = in_canonical_order(pairs)
        self.config = config
        self.groups = np.array([pair.group for pair in self.pairs])
        self.estimates = Estimates(config, self.groups)
        self.meter = MemoryMeter(models.device)
        self.readout = Readout(self.meter.sample)
        self.as_policy, self.as_reference = models.as_policy, models.as_reference
        self._work_so_far = models.layer_tokens
        self._work_elsewhere = 0
        self.worked_on = np.zeros(len(self.pairs), dtype=bool)
        super().__init__()
        check_vocabulary(self.pairs, models)
        check_positions(self.pairs, models)
        check_wrappers(self.pairs, models)
        self.take_choice(choose_pairs(self.pairs, self.num_layers, config, previous))
        self.exact_pairs = self.choice.everywhere
        self.control_pairs = self.choice.control_pairs
        self._roles = self.choice.roles()
        self._agree_on_memory()
        kept = kept if kept is not None else KeptReference(())
        if models.ranks.any(not kept.has_layout):
            kept.forget_layout()
        self.layout_reason = models.ranks.share(kept.layout(lambda: self._why_not_shared(truncation_mode)))
        self.plan = self.batches(range(len(self.pairs)))

    @property
    def exact_estimates(self) -> Estimates:
        """Makes intervals over the pairs that everything is patched on."""
        return self.estimates.over(self.exact_pairs)

    @property
    def control_estimates(self) -> Estimates:
        """Makes intervals over the pairs that controls are measured on."""
        return self.estimates.over(self.control_pairs)

    @property
    def repeated(self) -> int:
        """How many of the given pairs repeat another, and were left out."""
        return len(self.places) - len(self.pairs)

    def take_choice(self, choice: PairChoice) -> None:
        """Which layers each pair is patched at, from now on; roles, and so batches, stay what they are."""
        self.choice = choice
        self._layers_of = choice.layers_of()

    def _agree_on_memory(self) -> None:
        """The plan of batches goes by the memory of the smallest device."""
        if self.config.working_memory_mb is None:
            bounds = self.models.bounds
            bounds.bytes = min(bounds.bytes, *self.models.ranks.gather(usual_working_bytes(self.device)))

    def add_up(self) -> None:
        """What the work of other processes has cost, at the end."""
        ranks = self.models.ranks
        self.meter.sample()
        done, peaks = zip(*ranks.gather((self.models.layer_tokens - self._work_so_far, self.meter.peak)), strict=True)
        self._work_elsewhere = sum(done) - done[ranks.rank]
        self.meter.peak = max(peaks)

    def _why_not_shared(self, truncation_mode: str) -> str | None:
        if not self.config.share_prompts:
            return "switched off (share_prompts)"
        if truncation_mode == "keep_end":
            return "sequences truncated with keep_end begin at different tokens"
        dtypes = [replay.compute_dtype for replay in (self.models.policy, self.models.reference)]
        tolerance = rounding(64, self.device.type, *dtypes)
        with self.as_reference() as replay:
            reason = why_not_shared(replay, self.pairs, tolerance)
        if reason is None and not self.models.alike:
            with self.as_policy() as replay:
                reason = why_not_shared(replay, self.pairs, tolerance)
        return reason

    # -- roles of pairs ------------------------------------------------------------------------------------------------

    def is_exact(self, batch: PairBatch) -> bool:
        """Whether everything is patched on this batch's pairs: on all of them, or on none."""
        return bool(self._roles[int(batch.pair_index[0])] <= PATCHED)

    def layers_of(self, batch: PairBatch) -> list[int]:
        """The layers, −1 for what enters layer 0, that this batch's pairs are patched at."""
        return self._layers_of[int(batch.pair_index[0])]

    def is_patched(self, batch: PairBatch) -> bool:
        """Whether anything is patched on this batch's pairs: everything, or effects at some layers."""
        patching = self.config.patching
        if not patching.enabled:
            return False
        return self.is_exact(batch) or any(layer >= 0 or patching.embedding for layer in self.layers_of(batch))

    def is_control(self, batch: PairBatch) -> bool:
        """Whether controls are measured on this batch: on all of its pairs, or on none."""
        return bool(self._roles[int(batch.pair_index[0])] == CONTROL)

    # -- runs of a batch -----------------------------------------------------------------------------------------------

    def record_both(
        self, batch: PairBatch, until: int | None = None, *, whole_reference: bool = True
    ) -> tuple[Recording, Recording]:
        """One forward of each model over a batch: (policy's, reference's); the policy's up to layer ``until``.

        Args:
            whole_reference: False: the reference's streams end at ``until`` as well; its calls above are kept, so that walks
                can go on.
        """
        policy = self.record_policy(batch, until)
        with self.as_reference() as replay:
            last = None if whole_reference else until
            reference = replay.record(batch.model_inputs(), until=last, calls_above=True)
        self.meter.sample()
        return policy, reference

    def record_policy(self, batch: PairBatch, until: int | None = None, *, top_only: bool = False) -> Recording:
        """One forward of the policy over a batch, up to layer ``until``; with the stream after that one alone, if asked for."""
        with self.as_policy() as policy:
            recording = policy.record(batch.model_inputs(), until=until, top_only=top_only)
        self.meter.sample()
        return recording

    def effects(
        self,
        active: Callable[[], AbstractContextManager[Replay]],
        batch: PairBatch,
        recording: Recording,
        streams: Iterable[Stream],
        unpatched: Unpatched,
        *,
        same_as: Recording | None = None,
        limit: int | None = None,
    ) -> Generator[tuple[Hashable, torch.Tensor], None, None]:
        """Walk streams through the receiving model: by key, by how much each moves the margins [B], float64 on the CPU.

        Args:
            active: makes the receiving model compute: :meth:`as_policy` or :meth:`as_reference`.
            recording: of the receiving model.
            unpatched: its run that these are compared with.
            same_as: as in :meth:`Replay.walk`: a stream that equals it where it joins is not walked; its effect is 0.
            limit: streams walked together; None: as many as the working memory holds.
        """
        limit = self.least(limit or self.max_streams(recording.after(-1)))
        streams, last = list(streams), self.num_layers - 1
        unchanged = torch.zeros_like(unpatched.margins)
        beside = {stream.key: unpatched.beside(stream.start == last) for stream in streams}
        with active() as replay:
            walked = replay.walk(recording, streams, limit, same_as=same_as, read=batch.read)
            for key, patched in self.readout.each_margin(replay, walked, batch):
                yield key, unchanged if patched is None else patched - beside[key]

    def forward_equivalents(self, pairs: Sequence[ProbePair] | None = None) -> float:
        """Layer calls so far, as full forwards over both sequences of every probe pair (or of these ``pairs``)."""
        over = self.pairs if pairs is None else pairs
        once = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in over) * self.num_layers
        return (self.models.layer_tokens - self._work_so_far + self._work_elsewhere) / once
