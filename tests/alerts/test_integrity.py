"""Numbers that overflow, and references that are not what they should be."""

from __future__ import annotations

import math

import pytest

from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from tests.helpers.alert_cases import NAN, healthy, judged, run, sign, with_margins, with_part


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_either_model_may_overflow(value: float) -> None:
    broken = Estimate(mean=value, low=NAN, high=NAN)
    policy = sign("non_finite", with_margins(healthy(), policy=broken))
    reference = sign("non_finite", with_margins(healthy(), reference=broken))
    assert "The policy's preference margin" in policy.message
    assert "The reference's preference margin" in reference.message
    assert str(policy.value) == str(value)
    both = sign("non_finite", with_margins(healthy(), policy=broken, reference=broken))
    assert "The policy's preference margin" in both.message
    assert "The reference's preference margin" in both.message
    assert "5 of 64" in sign("non_finite", with_margins(healthy(), policy=Estimate.unknown("5 of 64 values"))).message


def test_the_message_on_a_mismatch_is_the_checks_own_reason() -> None:
    record = with_part(
        healthy(), "reference_check", verdict="failed", reason="its margins differ by 12.5 nats",
        precomputed_margin_difference=12.5,
    )  # fmt: skip
    seen = sign("reference_mismatch", record)
    assert seen.value == 12.5
    assert "the trainer's ref_model" in seen.message
    assert "its margins differ by 12.5 nats." in seen.message
    for verdict in ("passed", "not_run"):
        assert sign("reference_mismatch", with_part(record, "reference_check", verdict=verdict)) is None


def test_a_reference_that_moves_is_explained_by_a_synchronization_only() -> None:
    before = run()
    moved = with_part(healthy(), "provenance", reference_hash="beef")
    seen = sign("reference_changed", moved, before)
    assert before[-1].provenance.reference_hash in seen.message
    assert "beef" in seen.message
    assert sign("reference_changed", with_part(moved, "reference_check", last_sync_step=40), before) is None
    synchronized = [*before, with_part(moved, "reference_check", last_sync_step=40)]
    assert sign("reference_changed", with_part(moved, "reference_check", last_sync_step=40), synchronized) is None
    later = with_part(with_part(healthy(), "provenance", reference_hash="cafe"), "reference_check", last_sync_step=40)
    assert sign("reference_changed", later, synchronized) is not None
    assert sign("reference_changed", moved, []) is None


def test_a_reference_that_moved_once_stays_another_one() -> None:
    before = [*run(), with_part(healthy(40), "provenance", reference_hash="beef")]
    seen = sign("reference_changed", with_part(healthy(50), "provenance", reference_hash="beef"), before)
    assert "step 0" in seen.message
    assert sign("reference_changed", healthy(50), before) is None, "it is the one that the run began with"


@pytest.mark.parametrize(("synchronized", "then"), [(None, None), (15, 15)])
def test_a_reference_that_changed_stays_another_one(synchronized: int | None, then: int | None) -> None:
    """Compared with the oldest audit since the synchronization: the one before has the wrong reference, too."""

    def at(step: int, reference: str) -> AuditRecord:
        record = with_part(healthy(step), "provenance", reference_hash=reference)
        return with_part(record, "reference_check", last_sync_step=then if step > 15 else None, verdict="not_run")

    begin = "A" if synchronized is None else "B"
    made = judged([at(10, "A"), at(20, begin), at(25, begin), *(at(step, "C") for step in (30, 35, 40, 45))])
    assert [[alert.rule for alert in record.alerts] for record in made[:3]] == [[], [], []]
    assert [[alert.event for alert in record.alerts] for record in made[3:]] == [["opened"], *[["open"]] * 3]


@pytest.mark.parametrize("rule", ["reference_mismatch", "reference_changed"])
def test_other_probe_pairs_do_not_clear_the_reference(rule: str) -> None:
    def at(step: int, reference: str, pairs: str, verdict: str) -> AuditRecord:
        record = with_part(healthy(step), "provenance", reference_hash=reference, probe_hash=pairs)
        return with_part(record, "reference_check", verdict=verdict, reason="its margins differ")

    first = at(0, "A", "p", "failed") if rule == "reference_mismatch" else at(0, "B", "p", "passed")
    made = judged([first, at(20, "A", "p", "not_run"), *(at(step, "A", "q", "not_run") for step in (30, 40, 50, 60))])
    assert [[alert.rule for alert in record.alerts] for record in made[1:]] == [[rule]] * 5
    assert all(alert.event != "resolved" for record in made for alert in record.alerts)
