"""Patching, subspaces and the depth trace: both sides of the limits, the run's own baseline, NaN, parts that are absent."""

from __future__ import annotations

from typing import Any

import pytest

from align_audit.config import AlertConfig
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import NAN, about, health, healthy, run, sign, with_part, without_interval

INSIDE = (
    "additivity_high", "additivity_collapsed", "localization_moved", "rank_inflated", "subspace_rotated", "coherence_collapsed",
    "terminal_jump", "gradient_left_terminal",
)  # fmt: skip


@pytest.mark.parametrize("rule", INSIDE)
def test_a_health_audit_and_a_healthy_one_say_nothing(rule: str) -> None:
    assert sign(rule, health(healthy()), run()) is None
    assert sign(rule, healthy(), run()) is None
    assert sign(rule, healthy(), []) is None


@pytest.mark.parametrize(("baseline", "limit"), [(None, 0.4), (0.95, 0.4), (0.5, 0.3)])
def test_additivity(baseline: float | None, limit: float) -> None:
    before = [with_part(healthy(step), "patching", additivity=about(baseline or 0.5)) for step in (10, 20, 30)]
    before = before if baseline else before[:2]
    below = sign("additivity_collapsed", with_part(healthy(), "patching", additivity=about(limit - 0.02)), before)
    assert below.limit == pytest.approx(limit)
    assert below.baseline == baseline
    assert f"Additivity is {limit - 0.02:.2f}" in below.message
    assert (
        sign("additivity_collapsed", with_part(healthy(), "patching", additivity=about(limit + 0.02)), before) is None
    )


@pytest.mark.parametrize(("additivity", "fires"), [(1.52, True), (1.505, False), (NAN, False)])
def test_additivity_far_above_1(additivity: float, fires: bool) -> None:
    seen = sign("additivity_high", with_part(healthy(), "patching", additivity=about(additivity)), [])
    assert (seen is not None) == fires
    for unsure in (Estimate(mean=2.5, low=1.0, high=4.0), without_interval(2.5)):
        assert sign("additivity_high", with_part(healthy(), "patching", additivity=unsure), []) is None


def test_additivity_without_an_interval_says_nothing() -> None:
    assert sign("additivity_collapsed", with_part(healthy(), "patching", additivity=without_interval(0.1)), []) is None


@pytest.mark.parametrize("drop", [0.5, 0.3])
def test_coherence(drop: float) -> None:
    """Against the reference's until the run has a baseline of its own."""
    config = AlertConfig(coherence_drop_warning=drop)
    limit = (1 - drop) * 0.8

    def record(value: float, reference: float, step: int = 40) -> AuditRecord:
        return with_part(healthy(step), "spinal", coherence=value, reference_coherence=reference)

    early = sign("coherence_collapsed", record(limit - 0.01, 0.8), [], config)
    assert "the reference's 0.80" in early.message
    assert f"less than {1 - drop:.0%} of" in early.message
    assert (early.baseline, early.layers) == (0.8, healthy().spinal.terminal_layers)
    assert early.limit == pytest.approx(limit)
    assert sign("coherence_collapsed", record(limit + 0.01, 0.8), [], config) is None

    before = [record(0.8, 0.2, step) for step in (10, 20, 30)]
    late = sign("coherence_collapsed", record(limit - 0.01, 0.2), before, config)
    assert "this run's own first 0.80" in late.message
    assert late.baseline == 0.8
    assert sign("coherence_collapsed", record(limit + 0.01, 0.99), before, config) is None
    assert sign("coherence_collapsed", record(limit - 0.01, NAN), [], config) is None


def localized(step: int, center: float, entropy: float = 0.5) -> AuditRecord:
    return with_part(healthy(step), "localization", center_of_mass=center, entropy=entropy)


def test_the_change_moves_or_spreads() -> None:
    before = [localized(step, 0.5) for step in (10, 20, 30)]
    assert sign("localization_moved", localized(40, 0.76), before).limit == pytest.approx(0.75)
    assert sign("localization_moved", localized(40, 0.24), before).limit == pytest.approx(0.25)
    assert sign("localization_moved", localized(40, 0.74), before) is None
    assert "spreads" in sign("localization_moved", localized(40, 0.5, 0.76), before).message
    assert sign("localization_moved", localized(40, 0.5, 0.74), before) is None
    assert sign("localization_moved", localized(40, 0.99, 0.99), before[1:]) is None, "two audits are no baseline"
    assert sign("localization_moved", localized(40, NAN, NAN), before) is None


def with_curves(step: int, **changes: Any) -> AuditRecord:
    record = healthy(step)
    curves = {layer: curve.model_copy(update=changes) for layer, curve in record.low_rank["shift"].items()}
    return record.model_copy(update={"low_rank": {"shift": curves}})


def test_the_change_needs_more_directions() -> None:
    before = [with_curves(step, rank_95=2.0) for step in (10, 20, 30)]
    seen = sign("rank_inflated", with_curves(40, rank_95=8.0), before)
    assert (seen.value, seen.baseline, seen.limit) == (8.0, 2.0, 6.0)
    assert len(seen.layers) == 1
    for rank in (6.0, NAN):
        assert sign("rank_inflated", with_curves(40, rank_95=rank), before) is None
    assert sign("rank_inflated", with_curves(40, rank_95=8.0), before[1:]) is None
    assert sign("rank_inflated", with_curves(40, full_effect=Estimate.unknown("no shift")), before) is None


def test_the_subspace_turns() -> None:
    assert sign("subspace_rotated", with_curves(40, principal_angles=[0.1, 1.21, 1.5]), []).value == 1.21
    for angles in ([0.1, 1.19, 1.5], None, [NAN, NAN, NAN]):
        assert sign("subspace_rotated", with_curves(40, principal_angles=angles), []) is None


@pytest.mark.parametrize(("name", "unit"), [("contraction", ""), ("transport", " radians")])
def test_the_terminal_block_is_far_from_the_references(name: str, unit: str) -> None:
    record = healthy()
    reference = getattr(record.spinal.reference, name)

    def moved(by: float) -> AuditRecord:
        policy = record.spinal.reference.model_copy(update={name: [value + by for value in reference]})
        return with_part(record, "spinal", policy=policy)

    seen = sign("terminal_jump", moved(0.31), [])
    assert (seen.limit, seen.layers) == (0.3, record.spinal.terminal_layers)
    assert f"{name.capitalize()} of the last 4 layers lies 0.31{unit}" in seen.message
    assert sign("terminal_jump", moved(0.29), []) is None
    assert sign("terminal_jump", moved(NAN), []) is None


def test_the_gradient_leaves_the_last_layers() -> None:
    before = [with_part(healthy(step), "spinal", gradient_concentration=about(0.5)) for step in (10, 20, 30)]

    def now(share: Estimate) -> AuditRecord:
        return with_part(healthy(40), "spinal", gradient_concentration=share)

    seen = sign("gradient_left_terminal", now(about(0.28)), before)
    assert (seen.baseline, seen.limit) == (0.5, pytest.approx(0.3))
    assert sign("gradient_left_terminal", now(about(0.295)), before) is None, "its interval reaches over the limit"
    assert sign("gradient_left_terminal", now(about(0.28)), before[1:]) is None
    assert sign("gradient_left_terminal", now(without_interval(0.1)), before) is None
    assert sign("gradient_left_terminal", now(Estimate.unknown("no gradient")), before) is None
