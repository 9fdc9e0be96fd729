"""No number depends on the order of the pairs, the size of batches, other probe sets, or an audit before."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import nn

from align_audit import AuditConfig, AuditRecord, ProbeSet, audit
from tests.helpers.misleading import asked, differences, layer, pair_of, probe_set, pushed, shuffles, small_llama
from tests.helpers.tiny import VOCABULARY, perturbed, random_pairs

REFERENCE = small_llama(layers=2, width=20, seed=2)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "every pair": {},
    "twelve patched": {"exact_pairs": 12, "control_pairs": 10},
    "as many as it takes": {"exact_pairs": "auto", "control_pairs": 12, "equivalent_pairs": 16},
}


SITES: tuple[dict[str, Any], ...] = (
    {"site": "attention_output"},
    {"site": "head", "layers": (1,), "estimator": "control_variate", "pairs": 10},
)


def everything(patching: str = "every pair", **changes: Any) -> AuditConfig:
    """All that there is to measure."""
    return asked(
        patching={"noise_draws": 2, "split_half_repeats": 40, **CONFIGURATIONS[patching]},
        localization={
            "selection_resamples": 5,
            "permutations": 3,
            "target": "effect" if patching == "every pair" else "shift",
        },
        low_rank={"ranks": (1, 3), "layers": (1,)},
        spinal={"max_rows": 64},
        sites=SITES if patching == "twelve patched" else (),
        **changes,
    )


@cache
def probes() -> ProbeSet:
    """Pairs of their own prompt, and three that share one; the repeats of prefixes are many."""
    generator = np.random.default_rng(12)
    shared = [pair_of(100 + i, (7, 8, 9), *generator.integers(3, VOCABULARY, size=(2, 4)).tolist()) for i in range(3)]
    return probe_set([*random_pairs(23, seed=6, longest=4).pairs, *shared])


@cache
def policy() -> nn.Module:
    return pushed(perturbed(REFERENCE, 0.03), probes(), layer(1), 1.5)


@cache
def record_of(patching: str) -> AuditRecord:
    return audit(policy(), REFERENCE, probes(), everything(patching))


@pytest.mark.parametrize(
    ("patching", "order"),
    [
        ("every pair", "reversed"),
        ("every pair", "shuffled and numbered anew"),
        ("twelve patched", "shuffled"),
        ("twelve patched", "reversed and numbered anew"),
        ("as many as it takes", "reversed"),
        ("as many as it takes", "shuffled and numbered anew"),
    ],
)
def test_the_order_of_the_pairs_changes_nothing(patching: str, order: str) -> None:
    record = audit(policy(), REFERENCE, shuffles(probes())[order](), everything(patching))
    assert differences(record, record_of(patching), 1e-6) == []


@pytest.mark.parametrize(
    ("patching", "batch_tokens"), [("every pair", 1), ("twelve patched", 60), ("as many as it takes", 100_000)]
)
def test_the_size_of_batches_changes_nothing(patching: str, batch_tokens: int) -> None:
    record = audit(policy(), REFERENCE, probes(), everything(patching, batch_tokens=batch_tokens))
    assert differences(record, record_of(patching), 1e-6) == []


@pytest.mark.parametrize("patching", CONFIGURATIONS)
def test_nothing_around_an_audit_changes_its_numbers(patching: str) -> None:
    """All four at once: small batches, another order, beside two other sets, and not the first audit."""
    apart, beside = random_pairs(17, seed=31, longest=3), random_pairs(18, seed=32, longest=3)
    sets = {"beside": beside, "set": shuffles(probes())["shuffled"](), "apart": apart}
    record = audit(policy(), REFERENCE, sets, everything(patching, batch_tokens=30))["set"]
    assert differences(record, record_of(patching), 1e-6) == []


def test_an_audit_of_the_same_again_says_the_same() -> None:
    again = audit(policy(), REFERENCE, probes(), everything())
    assert differences(again, record_of("every pair"), 0.0) == []


def test_a_seed_does_change_what_is_drawn() -> None:
    """Else the comparisons above would hold of a record without draws."""
    record = audit(policy(), REFERENCE, probes(), everything(seed=1))
    changed = differences(record, record_of("every pair"), 1e-6)
    assert any("noise" in path for path in changed) and any("low" in path for path in changed)
