"""What low-rank bases are fitted on is gathered in the first pass where the layers are named, else in one of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align_audit.auditing import Context, OpenModels, run_audit
from align_audit.conductor.lowrank import TokenRows
from align_audit.config import AuditConfig
from align_audit.models.reference import resolve_reference
from tests.tiny import perturbed, random_pairs, tiny_model

PAIRS = random_pairs(7)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    reference = tiny_model("llama")
    return perturbed(reference), reference


def config(layers: Any = "auto") -> AuditConfig:
    return AuditConfig.from_dict(
        {
            "batch_tokens": 100,
            "low_rank": {"layers": layers, "ranks": (1, 2, 4)},
            "statistics": {"bootstrap_resamples": 100},
        }
    )


def test_both_ways_give_the_same_numbers_and_naming_the_layers_saves_a_pass(models: tuple[Any, Any]) -> None:
    resolved = resolve_reference(*models)
    found, arrays = run_audit(models[0], resolved, PAIRS, config(), 0, Context())
    layers = sorted(found.low_rank["shift"])
    named, theirs = run_audit(models[0], resolved, PAIRS, config(layers), 0, Context())
    names = [name for name in arrays if "low_rank" in name or name.startswith("subspace.")]
    assert len(names) >= 2 * 2 * len(layers)
    for name in names:
        np.testing.assert_array_equal(theirs[name], arrays[name], err_msg=name)
    assert named.low_rank == found.low_rank
    # Both models, up to the highest of the layers.
    saved = 2 * (max(layers) + 1) / 4
    assert found.cost.forward_equivalents - named.cost.forward_equivalents > 0.5 * saved


def test_pairs_that_come_again_count_once(models: tuple[Any, Any]) -> None:
    """After running out of memory pairs come again, in other batches, some of them already added."""
    with OpenModels(models[0], resolve_reference(*models)) as opened:
        session = opened.session(PAIRS, config(), Context())
        once, again = TokenRows(session, [0, 2]), TokenRows(session, [0, 2])
        once.gather()
        places = range(len(PAIRS))
        for size in (3, 2, 7):
            for first in range(0, len(PAIRS), size):
                batch = session.batch(list(places[first : first + size]))
                again.update(batch, *session.record_both(batch))
    for key, halves in once.freeze().items():
        for one, other in zip(halves, again.freeze()[key], strict=True):
            assert one.rows == other.rows > 0
            torch.testing.assert_close(one.matrix, other.matrix, rtol=1e-6, atol=1e-9)
