"""Few rows against ranks: directions that no row spans are arbitrary, and what is measured with them is not known."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import scipy.linalg
from torch import nn

from align_audit import AuditRecord, ProbeSet, audit
from align_audit.auditing.once import audit_once
from align_audit.models.reference import resolve_reference
from tests.helpers import oracle
from tests.helpers.misleading import Floats, asked, layer, pair_of, probe_set, prompt_of, pushed, small_llama
from tests.helpers.tiny import perturbed

REFERENCE = small_llama(layers=2, width=32, seed=3)
PAIRS = 12
RANKS = (1, 2, 12, 16, 24)
CONFIG = asked(
    patching={"positions": "last_prompt_token"}, low_rank={"layers": (0,), "ranks": RANKS, "random_draws": 1}
)


@cache
def probes() -> ProbeSet:
    """One row a pair: both sequences have the same last prompt token."""
    generator = np.random.default_rng(4)
    return probe_set(
        pair_of(index, *(generator.integers(3, 61, size=count).tolist() for count in (3, 2, 2)))
        for index in range(PAIRS)
    )


@cache
def policy(seed: int = 1) -> nn.Module:
    return pushed(perturbed(REFERENCE, 0.03, seed=seed), probes(), layer(0), 2.0)


@cache
def record() -> AuditRecord:
    return audit(policy(), REFERENCE, probes(), CONFIG)


@pytest.mark.parametrize("basis", ["activation", "shift"])
def test_ranks_above_the_rows_of_a_half_are_unknown(basis: str) -> None:
    """A half of twelve pairs has eleven rows at most."""
    curve = record().low_rank[basis][0]
    assert curve.ranks == list(RANKS)
    for place, rank in enumerate(RANKS):
        fraction, ratio = curve.effect_fraction[place], curve.explained_variance_ratio[place]
        if rank <= 2:
            assert math.isfinite(fraction.mean) and math.isfinite(ratio), rank
        else:
            assert math.isnan(fraction.mean) and math.isnan(fraction.low) and math.isnan(fraction.high), rank
            assert math.isnan(ratio), rank
            assert fraction.reason is not None and ("row" in fraction.reason or "span" in fraction.reason), fraction


@pytest.mark.parametrize("basis", ["activation", "shift"])
def test_rank_95_is_one_that_was_evaluated(basis: str) -> None:
    curve = record().low_rank[basis][0]
    evaluated = [rank for rank, one in zip(curve.ranks, curve.effect_fraction, strict=True) if math.isfinite(one.mean)]
    assert evaluated == [1, 2]
    assert math.isnan(curve.rank_95) or curve.rank_95 in evaluated
    if not math.isnan(curve.rank_95):
        kept = dict(zip(curve.ranks, curve.effect_fraction, strict=True))
        assert all(kept[rank].mean >= 0.95 for rank in evaluated if rank >= curve.rank_95)
    for bound in (curve.rank_95_low, curve.rank_95_high):
        assert math.isnan(bound) or math.isinf(bound) or bound in evaluated


def shift_rows(moved: nn.Module) -> Floats:
    return np.stack(
        [
            (oracle.forward(moved, ids).h(0) - oracle.forward(REFERENCE, ids).h(0))[-1].double().numpy()
            for ids in map(prompt_of, probes())
        ]
    )


def test_principal_angles_are_of_directions_that_rows_span() -> None:
    reference = resolve_reference(policy(), REFERENCE)
    first = audit_once(policy(), reference, probes(), CONFIG)
    moved = policy(seed=2)
    second = audit_once(moved, resolve_reference(moved, REFERENCE), probes(), CONFIG, previous=first.left)
    angles = second.record.low_rank["shift"][0].principal_angles
    assert angles is not None and 0 < len(angles) <= PAIRS
    assert np.isfinite(angles).all() and list(angles) == sorted(angles)
    bases = [np.linalg.svd(shift_rows(one))[2][: len(angles)].T for one in (policy(), moved)]
    assert angles == pytest.approx(sorted(scipy.linalg.subspace_angles(*bases)), abs=1e-5)


def test_a_subspace_that_is_stored_is_spanned() -> None:
    arrays = audit_once(policy(), resolve_reference(policy(), REFERENCE), probes(), CONFIG).arrays
    stored = arrays["subspace.shift.0"]
    spanned = np.linalg.svd(shift_rows(policy()), full_matrices=False)[2]
    assert stored.shape[1] <= PAIRS
    assert np.abs(stored - spanned.T @ (spanned @ stored)).max() < 1e-5


def test_the_finding_says_nothing_of_ranks_that_were_not_evaluated() -> None:
    finding = record().finding
    assert finding is not None and not any(f"rank ≤ {rank}" in finding.words for rank in (12, 16, 24))


def test_no_evaluated_rank_is_no_control_that_passed() -> None:
    """A verdict over no rank at all says nothing."""
    config = asked(
        patching={"positions": "last_prompt_token"}, low_rank={"layers": (0,), "ranks": (12, 16), "random_draws": 1}
    )
    few = audit(policy(), REFERENCE, probes(), config)
    assert few.margins.shift.low > 0.0, "the control would run"
    assert few.controls.random_subspace.verdict == "not_run"
    assert "dimensions, fewer than each of [12, 16]" in few.controls.random_subspace.reason
