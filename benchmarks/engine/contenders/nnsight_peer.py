"""nnsight: the model wrapped, a trace in which a layer's output is replaced; and its ``.skip`` of the layers below.

Install: ``pip install nnsight`` (0.8 works with transformers 5).
"""

from __future__ import annotations

from typing import Any

import nnsight
from nnsight import NNsight
from torch import Tensor

from engine.contenders.common import Batch, Contender


class NNsightPeer(Contender):
    """One trace a layer; every layer runs."""

    def __init__(self, policy: Any, reference: Any) -> None:
        super().__init__(policy, reference)
        self.traced_policy, self.traced_reference = NNsight(policy), NNsight(reference)

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        return self._recorded(self.traced_policy, batch)[1]

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._recorded(self.traced_reference, batch)

    def base_logits(self, batch: Batch) -> Tensor:
        model = self.traced_reference
        with model.trace(**inputs(batch)):
            logits = model.lm_head.output.save()
        return logits

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        model = self.traced_reference
        with model.trace(**inputs(batch)):
            model.model.layers[layer].output = value
            logits = model.lm_head.output.save()
        return logits

    @staticmethod
    def _recorded(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        with model.trace(**inputs(batch)):
            streams = nnsight.save([])
            for layer in model.model.layers:
                streams.append(layer.output)
            logits = model.lm_head.output.save()
        return logits, streams


class NNsightSkip(NNsightPeer):
    """The patched layer and all below it are skipped; they return the patched stream."""

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        model = self.traced_reference
        with model.trace(**inputs(batch)):
            for below in model.model.layers[: layer + 1]:
                below.skip(value)
            logits = model.lm_head.output.save()
        return logits


def inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
