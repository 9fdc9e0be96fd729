"""pyvene: an intervenable model with one vanilla intervention on a block's output.

Install: ``pip install pyvene`` (0.1.8 works with transformers 5).
"""

from __future__ import annotations

from typing import Any

import pyvene
from torch import Tensor

from engine.contenders.common import Batch, Contender


class PyvenePeer(Contender):
    """One intervened forward a layer; every layer runs."""

    def __init__(self, policy: Any, reference: Any) -> None:
        super().__init__(policy, reference)
        self.patching = [_intervenable(reference, [layer], pyvene.VanillaIntervention) for layer in self.layers]
        self.collecting_policy, self.collecting_reference = (
            _intervenable(model, self.layers, pyvene.CollectIntervention) for model in (policy, reference)
        )

    @property
    def layers(self) -> list[int]:
        return list(range(self.num_layers))

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        return self._recorded(self.collecting_policy, batch)[1]

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._recorded(self.collecting_reference, batch)

    def base_logits(self, batch: Batch) -> Tensor:
        return self.reference(**inputs(batch)).logits

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        tool = self.patching[layer]
        (name,) = tool.interventions
        _, output = tool(inputs(batch), source_representations={name: value}, use_cache=False)
        return output.logits

    # Where no unit_locations are given, an intervention takes and writes all positions.
    def _recorded(self, tool: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        (_, streams), output = tool(inputs(batch), use_cache=False)
        return output.logits, streams


def _intervenable(model: Any, layers: list[int], kind: Any) -> Any:
    # Without keep_last_dim, what is collected is one long row a sequence, cut to its first token.
    parts = [
        pyvene.RepresentationConfig(
            layer=layer,
            component="block_output",
            intervention=kind(keep_last_dim=True, embed_dim=model.config.hidden_size),
        )
        for layer in layers
    ]
    tool = pyvene.IntervenableModel(pyvene.IntervenableConfig(parts), model=model)
    tool.disable_model_gradients()
    return tool


def inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model's forward."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
