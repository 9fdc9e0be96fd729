"""The run that patched runs are compared with, computed in the same shapes as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align_audit.auditing.session.batching import Batching
from align_audit.auditing.session.readout import Readout
from align_audit.models.replay import Recording, Replay
from align_audit.probes.batches import PairBatch


@dataclass(frozen=True)
class Unpatched:
    """The unpatched run of a batch, in the shapes in which patched streams are walked.

    Attributes:
        margins: [B] float64 on the CPU; of a last layer that ran at all positions, as that of a recording does.
        narrowed: [B] the same of one that ran at those that are read, as that of a walk does: in other shapes numbers round
            otherwise.
        strays: layers at which a replay strays from the recording; None where it does not stray at all, and patching a
            layer with itself cannot change anything.
    """

    margins: torch.Tensor
    narrowed: torch.Tensor
    strays: list[int] | None

    def beside(self, last: bool) -> torch.Tensor:
        """[B] what a patched run is compared with, whose stream joined behind the ``last`` layer, or below it."""
        return self.margins if last else self.narrowed


class UnpatchedRuns(Batching):
    """Of the batches of a session, for both models; those of the reference are kept for its later passes."""

    readout: Readout

    def __init__(self) -> None:
        self.reference_strays = False
        self._replayed: dict[bool, int] = {}
        """Batches whose recordings were replayed as a check, by whether the model is the reference."""
        self._strays: dict[bool, bool] = {}
        self._unpatched: dict[tuple[int, ...], Unpatched] = {}
        """The reference's, by the places of a batch's pairs."""

    def unpatched(
        self, replay: Replay, batch: PairBatch, recording: Recording, margins: torch.Tensor, *, is_reference: bool
    ) -> Unpatched:
        """The run that patched ones are compared with.

        It is the recording, computed in the same shapes as the walked streams; that replaying it gives it back bit by bit is
        checked at every layer on the first batch, and at one layer, another each time, on each that follows. Where it is not
        so (kernels that are not deterministic), the unpatched run is walked too.

        Args:
            margins: [B] of the recording.
        """
        strays = self._replay_check(replay, recording, is_reference)
        unpatched = self.compared_with(replay, batch, recording, margins, strays)
        if is_reference:
            self.reference_strays |= strays is not None
            self._unpatched[tuple(batch.pair_index.tolist())] = unpatched
        return unpatched

    def compared_with(
        self,
        replay: Replay,
        batch: PairBatch,
        recording: Recording,
        margins: torch.Tensor | None,
        strays: list[int] | None,
    ) -> Unpatched:
        """The run that patched ones are compared with, where it is known at which layers a replay strays.

        Args:
            margins: [B] of the recording; None: not read yet.
        """
        last = self.num_layers - 1
        top, entering = recording.after(last), recording.after(last - 1)
        if strays is not None:
            entering = replay.entering_last(recording)
            top, margins = replay.layer(last, entering, recording), None
        if margins is None:
            margins = self.readout.margins(replay, top, batch)
        at, narrowed = (batch.row, batch.position), margins
        walked = replay.layer(last, entering, recording, batch.read)
        if self.so_for_any(not torch.equal(walked[at], top[at])):
            narrowed = self.readout.margins(replay, walked, batch)
        return Unpatched(margins, narrowed, strays)

    def unpatched_before(self, batch: PairBatch) -> Unpatched | None:
        """The reference's unpatched run of a batch of the first pass, to the bit; None of another batch, or where replays
        stray from recordings."""
        return None if self.reference_strays else self._unpatched.get(tuple(batch.pair_index.tolist()))

    def _replay_check(self, replay: Replay, recording: Recording, is_reference: bool) -> list[int] | None:
        """Layers at which a replay strays from the recording; None where it does not stray at all.

        Where processes have to call the same layers, those at which it strays on any of them: which ones are tried on this
        batch, and on the next, is then the same everywhere.
        """
        layers = self.num_layers
        seen = self._replayed.get(is_reference, 0)
        every = range(layers)
        checked = every if seen == 0 or self._strays.get(is_reference) else [seen % layers]

        def stray(layer: int) -> bool:
            return not torch.equal(replay.layer(layer, recording.after(layer - 1), recording), recording.after(layer))

        strays = self.layers_of_any([layer for layer in checked if stray(layer)])
        if strays and len(checked) < layers:
            strays = self.layers_of_any([layer for layer in every if stray(layer)])
        # Counted only now: a check that ran out of memory has shown nothing, and the next batch is the first again.
        self._replayed[is_reference] = seen + 1
        self._strays[is_reference] = bool(strays)
        return strays or None
