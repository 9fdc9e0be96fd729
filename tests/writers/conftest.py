"""What several tests of writers look at."""

from __future__ import annotations

import pytest

from align_audit import AuditConfig, TransferRecord, transfer
from tests.auditing.test_transfer import made_of
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


@pytest.fixture(scope="session")
def transfer_record() -> TransferRecord:
    """Three sets that share a pair, and one of a single pair."""
    reference = tiny_model("llama", num_hidden_layers=2)
    first = list(random_pairs(9))
    sets = {
        "harmless": made_of(first),
        "helpful-v1.1": made_of([*random_pairs(8, seed=9), first[0]]),
        "one": random_pairs(1, seed=4),
    }
    config = AuditConfig.from_dict(
        {
            "statistics": {"bootstrap_resamples": 100, "confidence": 0.02},
            "low_rank": {"ranks": (1, 4), "layers": (1,), "bases": ("shift",)},
        }
    )
    return transfer(perturbed(reference), reference, sets, config, step=30)
