"""What a measurement is: one concept of an audit, from what it walks to what it says in the record.

To add one: a class here below :class:`Measurement` in a file of its own, and one line in
:data:`align_audit.auditing.full.MEASUREMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.accumulators import State
from align_audit.auditing.session.kept import KeptReference
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.auditing.session.unpatched import Unpatched
from align_audit.auditing.session.walk import Session
from align_audit.models.replay import Recording, Stream
from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks

_Kind = TypeVar("_Kind", bound="Measurement")

Part = Any
"""A part of the record, or a mapping or list of such, as the record's field of that name holds it."""
PER_PAIR = "per_pair."
"""What the name of an array begins with that has a row for each pair of the session; stored, it has one for each given pair."""
Reasons = dict[str, str]
"""Why a number of a part is NaN or None: dotted path below the part (empty: the part itself) → reason."""


@dataclass
class RecordedBatch:
    """One batch on its way through the first pass.

    Attributes:
        policy, reference: one forward of each, with what passed between its layers.
        reference_gradients: ∂m(ρ)/∂h_l by layer, at ρ's own streams, where they were kept from an earlier audit.
        policy_margins, reference_margins: [B] float64 on the CPU, read beside the recordings.
        unpatched: what runs patched into the reference are compared with; None before that is known.
        transplants: π's block l on ρ's own stream, by layer; of the batches that everything is patched on.
        head_margins: [B] of ρ's last stream under π's norm and head, on the same.
    """

    batch: PairBatch
    policy: Recording
    reference: Recording
    reference_gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    policy_margins: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    reference_margins: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    unpatched: Unpatched | None = None
    transplants: list[torch.Tensor] = field(default_factory=list)
    head_margins: torch.Tensor | None = None


class SecondLook(Protocol):
    """Something to patch into the reference that can be named only after the first pass over all pairs."""

    @property
    def layers(self) -> set[int]:
        """At which of the policy's layers its streams are taken; empty: nothing to do."""

    def streams(self, batch: PairBatch, policy: Recording, reference: Recording) -> Iterator[Stream]:
        """What to walk through the reference."""

    def store(self, key: Any, places: np.ndarray, effect: np.ndarray) -> None:
        """Keep the effects [B], nats, of the pairs at ``places``."""

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Take over what other processes have kept, as :meth:`Measurement.merge`."""


class Measurement:
    """One concept of an audit. What a kind does not do, it leaves as it is here.

    A batch that runs out of memory comes again, in smaller ones: :meth:`read` and :meth:`store` overwrite what they put,
    :meth:`commit` is called once for a batch that went through, on all processes that worked at once; it calls no layer.

    Args:
        task: the audit it is part of.

    Attributes:
        name: the field of the record that its part fills; another name stands under ``AuditRecord.extra``. None: it has no
            part of its own.
        state: what it keeps of the pairs.
    """

    name: ClassVar[str | None] = None
    state: State

    def __init__(self, task: AuditTask) -> None:
        self.task = task
        self.session = task.session
        self.config = task.session.config
        self.estimates = task.session.estimates
        self.state = State()

    @property
    def batches(self) -> int:
        """How many its own passes will take, for a progress bar."""
        return 0

    @property
    def may_look_again(self) -> bool:
        """Whether it may ask for the second pass, for a progress bar."""
        return False

    def read(self, recorded: RecordedBatch) -> None:
        """First pass: from the recordings, before anything is patched."""

    def policy_streams(self, recorded: RecordedBatch) -> Iterable[Stream]:
        """First pass: what to walk through the policy."""
        return ()

    def streams(self, recorded: RecordedBatch) -> Iterable[Stream]:
        """First pass: what to walk through the reference; ``recorded.unpatched`` is known."""
        return ()

    def store(self, key: Hashable, recorded: RecordedBatch, effect: torch.Tensor) -> None:
        """Keep the effect [B], nats, of a stream of :meth:`streams` or :meth:`policy_streams`."""

    def commit(self, recorded: RecordedBatch) -> None:
        """First pass, after the walks: what is added up, and cannot be overwritten."""

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """After the first pass: take over what other processes have of their pairs. Called by all of them together.

        Args:
            places: places of the pairs that this process has worked on.
        """
        self.state.merge(ranks, places)

    def look_closer(self, tick: Callable[[], None]) -> None:
        """After the first pass: what takes the pairs together, or passes of its own (``tick`` after each batch)."""

    def second_looks(self) -> Sequence[SecondLook]:
        """What to patch in the second pass."""
        return ()

    def part(self) -> tuple[Part | None, Reasons]:
        """Its part of the record, and why numbers of it are not known."""
        return None, {}

    def arrays(self) -> dict[str, np.ndarray]:
        """What is too large for the record, by name: every number per pair."""
        return {f"{PER_PAIR}{name}": values for name, values in self.state.per_pair()}


class AuditTask:
    """One audit that is being made: its session, what was asked, and its measurements by kind.

    Args:
        cache: what depends on the reference alone, kept for the run.
        kept: the part of it that is of these pairs, in memory.
    """

    def __init__(
        self, session: Session, request: AuditRequest, cache: ReferenceCache, kept: KeptReference | None = None
    ) -> None:
        self.session = session
        self.request = request
        self.cache = cache
        self.kept = kept if kept is not None else KeptReference(())
        self.measurements: dict[type[Measurement], Measurement] = {}

    def begin(self, kinds: Iterable[type[Measurement]]) -> None:
        """Make the measurements, in this order; later ones may ask for earlier ones."""
        for kind in kinds:
            self.measurements[kind] = kind(self)

    def __getitem__(self, kind: type[_Kind]) -> _Kind:
        """The measurement of that kind, which stands before the one that asks for it."""
        measurement = self.measurements[kind]
        assert isinstance(measurement, kind)
        return measurement

    def __contains__(self, kind: type[Measurement]) -> bool:
        return kind in self.measurements

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements.values())
