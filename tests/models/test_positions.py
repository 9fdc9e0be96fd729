"""Which models have positions in a table, and how many; and probes that go beyond them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align_audit import audit
from align_audit.auditing.check import check_audit
from align_audit.errors import ConfigurationError
from align_audit.models.positions import learned_positions, positions_of
from align_audit.models.reference import resolve_reference
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

SMALL: dict[str, Any] = {"vocab_size": 61, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
BUILT: dict[str, dict[str, Any]] = {
    "opt": {"max_position_embeddings": 40, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "gpt_neox": {"max_position_embeddings": 40, "intermediate_size": 16},
}


@pytest.mark.parametrize(
    ("family", "limit", "learned"), [("gpt2", 64, 64), ("opt", 40, 40), ("gpt_neox", 40, None), ("llama", 2048, None)]
)
def test_where_positions_are_a_table(family: str, limit: int, learned: int | None) -> None:
    if family in BUILT:
        config = AutoConfig.for_model(family, **SMALL, **BUILT[family])
        model: Any = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(family)
    assert positions_of(model) == limit
    assert learned_positions(model) == learned


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_probes_beyond_a_table_are_refused_and_said_before_training(family: str) -> None:
    """On a CPU it would be an error of the audit; on a CUDA device the end of training."""
    name = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[family]
    reference = tiny_model(family, dtype=torch.float32, **{name: 16})
    policy, probes = perturbed(reference), random_pairs(6)
    checks = (
        lambda: audit(policy, reference, probes, quick()),
        lambda: check_audit(
            policy, resolve_reference(policy, reference), [probes], quick(), autocast=contextlib.nullcontext
        ),
    )
    for check in checks:
        if family == "llama":
            check()
            continue
        with pytest.raises(ConfigurationError, match=r"the policy has 16 positions .* Set max_length=16 or less"):
            check()
