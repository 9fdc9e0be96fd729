"""nnterp: nnsight under standard names; ``layers_output[l] = value``.

Install: ``pip install nnterp`` (1.3 works with nnsight 0.8 and transformers 5).
"""

from __future__ import annotations

from typing import Any

import nnsight
from nnterp import StandardizedTransformer
from torch import Tensor

from engine.contenders.common import Batch, Contender
from engine.contenders.tokenizer import word_tokenizer


class NNterpPeer(Contender):
    """One trace a layer; every layer runs."""

    def __init__(self, policy: Any, reference: Any) -> None:
        super().__init__(policy, reference)
        self.traced_policy, self.traced_reference = (
            StandardizedTransformer(model, tokenizer=word_tokenizer(), device_map=None) for model in (policy, reference)
        )

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        return self._recorded(self.traced_policy, batch)[1]

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._recorded(self.traced_reference, batch)

    def base_logits(self, batch: Batch) -> Tensor:
        model = self.traced_reference
        with model.trace(inputs(batch), use_cache=False):
            logits = model.logits.save()
        return logits

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        model = self.traced_reference
        with model.trace(inputs(batch), use_cache=False):
            model.layers_output[layer] = value
            logits = model.logits.save()
        return logits

    def _recorded(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        count = self.num_layers
        with model.trace(inputs(batch), use_cache=False):
            streams = nnsight.save([])
            for layer in range(count):
                streams.append(model.layers_output[layer])
            logits = model.logits.save()
        return logits, streams


def inputs(batch: Batch) -> dict[str, Any]:
    """What a language model of nnsight takes in place of text."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
