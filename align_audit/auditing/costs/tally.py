"""What one process computes in an audit, added up call by call as the session makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from align_audit.auditing.costs.job import Job, Laid
from align_audit.auditing.costs.work import PartName, Work
from align_audit.models.replay import head_rows

ModelName = Literal["policy", "reference"]


class Tally:
    """Adds up work by part.

    Where weights are spread over processes, it follows which layer of each model is whole: calling another one brings that
    together, and one small message goes before it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._counts: dict[PartName, Counter[str]] = {}
        self._held: dict[ModelName, int | None] = {"policy": None, "reference": None}

    @property
    def parts(self) -> dict[PartName, Work]:
        """By part, what was added up so far."""
        return {part: Work(**counts) for part, counts in self._counts.items()}

    def add(self, part: PartName, **counts: int) -> None:
        """Units of :class:`~align_audit.auditing.costs.work.Work`."""
        self._counts.setdefault(part, Counter()).update(counts)

    # -- layers --------------------------------------------------------------------------------------------------------

    def up(self, part: PartName, model: ModelName, layers: range, laid: Laid, times: int = 1) -> None:
        """Each of ``layers`` is called ``times`` times in a row on a batch, from the first to the last."""
        calls = times * len(layers)
        self.add(part, calls=calls, tokens=calls * laid.tokens, meetings=calls * laid.meetings)
        self.hold(part, model, layers)

    def hold(self, part: PartName, model: ModelName, layers: range) -> None:
        """These layers are brought together one after the other, where they are not whole already."""
        if not self.job.spread or not len(layers):
            return
        gathers = len(layers) - (layers[0] == self._held[model])
        self._held[model] = layers[-1]
        weights = self.job.shape.layer_weights
        self.add(part, gathers=gathers, gathered_weights=gathers * weights, exchanges=gathers)

    def rest(self) -> None:
        """No layer of either model is whole."""
        self._held = {"policy": None, "reference": None}

    def down(self, part: PartName, model: ModelName, laid: Laid, objectives: int, down_to: int) -> None:
        """A backward pass to the stream after layer ``down_to``, each layer run again and differentiated on the way."""
        layers = self.job.shape.layers
        self.up(part, model, range(layers - 1, down_to, -1), laid)
        calls = objectives * max(0, layers - 1 - down_to)
        self.add(part, backward_tokens=calls * laid.tokens, backward_meetings=calls * laid.meetings)

    def walk(self, parts: Sequence[tuple[PartName, int]], model: ModelName, laid: Laid) -> None:
        """Streams, each of a part, that join after a layer are continued to the top, and read there."""
        job, top = self.job, self.job.shape.layers - 1
        limit = job.room.max_streams(laid.tokens * job.shape.stream_bytes)
        waiting = sorted(parts, key=lambda each: each[1])
        for part, start in waiting:
            calls = top - start
            self.add(part, calls=calls, tokens=calls * laid.tokens, meetings=calls * laid.meetings)
            # In the last layer what treats each position by itself runs where the stream is read.
            self.add(part, spared=(laid.tokens - laid.read) * (calls > 0), head_rows=laid.entries, scored=laid.entries)
            # Three tensors of the patch, and two that are compared with each other.
            self.add(part, stream_bytes=5 * laid.tokens * job.shape.stream_bytes)
        for first in range(0, len(waiting), limit):
            part, start = waiting[first]
            self.hold(part, model, range(max(0, start), job.shape.layers))
        block = head_rows(job.room.device, job.shape.vocabulary)
        together = max(1, block // laid.entries)
        for first in range(0, len(waiting), together):
            rows = laid.entries * min(together, len(waiting) - first)
            self.add(waiting[first][0], head_calls=-(-rows // block))

    # -- what is read at the top ---------------------------------------------------------------------------------------

    def read(self, part: PartName, rows: int, *, models: int = 1, backward: bool = False, scored: int = 1) -> None:
        """So many rows of each of some models go through norm and unembedding, and back.

        Args:
            scored: 0 where what is made of them is counted elsewhere.
        """
        calls = -(-rows // head_rows(self.job.room.device, self.job.shape.vocabulary))
        self.add(part, head_calls=models * calls, head_rows=models * rows)
        if backward:
            self.add(part, head_backward_rows=rows, sloped=rows)
        else:
            self.add(part, scored=models * rows * scored)
