"""What margins say of equal models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from align_audit.config import AuditConfig
from tests.helpers.audits import audited
from tests.helpers.tiny import random_pairs, tiny_model

pytestmark = pytest.mark.device

OFF = {"enabled": False}
MARGINS = AuditConfig.from_dict(
    {"patching": OFF, "localization": OFF, "low_rank": OFF, "spinal": OFF, "generations": OFF, "progress": False}
)


def test_of_equal_models_no_margin_has_grown_and_their_ranking_is_a_sample() -> None:
    """Accuracy is 0 by construction there; that the model ranks none of these pairs right is what it does to 12 pairs."""
    model, probes = tiny_model("llama"), random_pairs(40)
    _, arrays = audited(model, copy.deepcopy(model), probes, MARGINS)
    wrong = arrays["per_pair.chosen_logp"] < arrays["per_pair.rejected_logp"]
    chosen = [pair for pair, is_wrong in zip(probes.pairs, wrong, strict=True) if is_wrong][:12]
    assert len(chosen) == 12
    pairs = tuple(replace(pair, index=index) for index, pair in enumerate(chosen))
    record, _ = audited(model, copy.deepcopy(model), replace(probes, pairs=pairs), MARGINS)
    accuracy, ranking = record.margins.accuracy, record.margins.ranking_accuracy
    assert (accuracy.mean, accuracy.low, accuracy.high) == (0.0, 0.0, 0.0)
    assert (ranking.mean, ranking.low) == (0.0, 0.0)
    assert 0.2 < ranking.high < 0.3, "Wilson's of none of 12"
