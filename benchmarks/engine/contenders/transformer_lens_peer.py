"""TransformerLens: a bridge around the model, ``run_with_cache`` and ``run_with_hooks``.

Install: ``pip install transformer-lens`` (4.3 works with transformers 5; from 4.0 on the bridge is all there is,
``HookedTransformer`` is gone). The bridge sets eager attention, for its hooks on scores. Its ``start_at_layer`` runs the
layers below all the same and discards what they give, so it saves nothing and is no contender of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from engine.contenders.common import Batch, Contender
from engine.contenders.tokenizer import word_tokenizer

NAME = "llama"
"""The bridge asks for a name beside the model it is given; nothing is loaded by it."""


class TransformerLensPeer(Contender):
    """One ``run_with_hooks`` a layer; every layer runs."""

    def __init__(self, policy: Any, reference: Any) -> None:
        super().__init__(policy, reference)
        self.bridged_policy, self.bridged_reference = (bridged(model) for model in (policy, reference))

    def policy_streams(self, batch: Batch) -> list[Tensor]:
        return self._recorded(self.bridged_policy, batch)[1]

    def reference_run(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self._recorded(self.bridged_reference, batch)

    def base_logits(self, batch: Batch) -> Tensor:
        return self.bridged_reference(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def patched_logits(self, batch: Batch, layer: int, value: Tensor) -> Tensor:
        def swap(activation: Tensor, hook: Any) -> Tensor:
            return value

        return self.bridged_reference.run_with_hooks(
            batch.input_ids,
            fwd_hooks=[(f"blocks.{layer}.hook_out", swap)],
            attention_mask=batch.attention_mask,
            use_cache=False,
        )

    def _recorded(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        names = [f"blocks.{layer}.hook_out" for layer in range(self.num_layers)]
        logits, cache = model.run_with_cache(
            batch.input_ids, names_filter=names, attention_mask=batch.attention_mask, use_cache=False
        )
        return logits, [cache[name] for name in names]


def bridged(model: Any) -> Any:
    """The bridge around a model in memory, in the model's own numerics (no folding, no centring)."""
    return TransformerBridge.boot_transformers(
        NAME, hf_model=model, tokenizer=word_tokenizer(), device=str(model.device)
    )
