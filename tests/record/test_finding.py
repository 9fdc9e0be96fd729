"""The verdict in words: what a record must hold for a claim, and that one missing piece takes it away."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align_audit.record.audit_record import GUARDED, Attribution, AuditRecord, Control, Controls, Finding
from align_audit.record.estimate import Estimate
from align_audit.record.finding import find
from tests.helpers.make_record import make_record


def estimate(mean: float, half: float = 0.1) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


@pytest.fixture
def record() -> AuditRecord:
    """Layers 3 and 4 of six stand out and all controls hold."""
    made = make_record(100, layers=6)
    assert made.patching is not None
    assert made.patching.standing_out is not None
    standing = made.patching.standing_out.model_copy(
        update={
            "layers": [3, 4], "gain": Estimate(mean=0.92, low=0.854, high=0.97), "separation": estimate(4.0),
            "stability": 0.9,
        }
    )  # fmt: skip
    patching = made.patching.model_copy(
        update={
            "standing_out": standing,
            "block_transplant": [estimate(2.5 if layer in (3, 4) else 0.2) for layer in range(6)],
            "effect": [estimate(1.0 + layer) for layer in range(6)],
        }
    )
    noise = made.controls.noise.model_copy(update={"effect": [estimate(0.0)] * 6})
    curve = next(iter(made.low_rank["shift"].values()))
    curve = curve.model_copy(update={"rank_95": 2.0, "rank_95_low": 2.0, "rank_95_high": 4.0})
    return made.model_copy(
        update={
            "patching": patching,
            "controls": made.controls.model_copy(update={"noise": noise}),
            "low_rank": {"shift": {3: curve, 4: curve}},
        }
    )


def changed(record: AuditRecord, path: str, value: Any) -> AuditRecord:
    head, _, rest = path.partition(".")
    part = getattr(record, head)
    return record.model_copy(update={head: changed(part, rest, value) if rest else value})


def test_a_claim_says_where_how_much_of_what_rank_and_what_controls(record: AuditRecord) -> None:
    assert find(record) == Finding(
        words="localized in layers 3–4 (92 % of the gain, 95 % CI 85–97 %), rank ≤ 4; controls passed: noise, reverse, "
        "identity, random subspace, split half, permuted targets",
        localized=True,
        layers=[3, 4],
    )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("margins.shift", Estimate(mean=0.2, low=-0.1, high=0.5), "the interval of the mean margin shift, [-0.1, 0.5] nats"),
        ("margins.shift", estimate(-2.0), "moved towards the rejected completions (mean margin shift -2 nats)"),
        ("margins.shift", Estimate(mean=0, low=0, high=0), "policy and reference give the same margins"),
        ("margins.shift", Estimate.unknown("1 of 9 values is not finite"), "not known (1 of 9 values is not finite)"),
        ("patching", None, "patching was not measured"),
        ("patching.standing_out", None, "which layers stand out was not measured"),
        (
            "patching.standing_out.gain", Estimate(mean=0.55, low=0.45, high=0.6),
            "layers 3–4 stand out most and carry 55 % of the gain, 95 % CI 45–60 %",
        ),
        (
            "patching.standing_out.gain", Estimate(mean=0.3, low=0.2, high=0.4),
            "carry only 30 % of the gain, 95 % CI 20–40 %",
        ),
        ("patching.standing_out.gain", Estimate.unknown("why"), "what layers 3–4 carry of the gain is not known (why)"),
        (
            "patching.standing_out.separation", Estimate(mean=3, low=0.9, high=4),
            "layers 3–4 do not stand clear of the others (3 times as much, 95 % CI 0.9 to 4)",
        ),
        ("patching.standing_out.stability", 0.79, "depends on the pairs: 79% of resamples agree on layers 3–4"),
        ("patching.block_transplant", [estimate(0.05)] * 6, "the block transplant includes 0 at layers 3–4"),
        ("controls.noise.effect", [estimate(0.0)] * 4 + [estimate(4.95)] * 2, "noise control failed at layer 4"),
        ("controls.noise.effect", [Estimate.unknown("no")] * 6, "noise control failed at layers 3–4"),
        ("controls.noise", Control(verdict="not_run", reason="no draws"), "the noise control was not run (no draws)"),
        ("controls.reverse", Control(verdict="failed", reason="it rose"), "the reverse control failed (it rose)"),
        ("controls.identity", Control(verdict="failed", reason="moved"), "the identity control failed (moved)"),
    ],
)  # fmt: skip
def test_one_missing_piece_takes_the_claim_away(record: AuditRecord, path: str, value: Any, words: str) -> None:
    finding = find(changed(record, path, value))
    assert (finding.localized, finding.layers) == (False, [])
    assert finding.words.startswith("no localization claimed: ")
    assert words in finding.words


@pytest.mark.parametrize("path", ["embedding_gain", "head_gain", "embedding_transplant", "head_transplant"])
def test_what_takes_back_more_than_a_quarter_takes_the_claim_away(record: AuditRecord, path: str) -> None:
    """A share on top of what is below, or the nats that a part moves alone over those of the shift."""
    unit = record.margins.shift.mean if path.endswith("transplant") else 1.0
    finding = find(changed(record, f"patching.{path}", estimate(-0.26 * unit)))
    part = "the embedding" if path.startswith("embedding") else "the head"
    assert finding.words == (
        f"no localization claimed: layers 3–4 push up by 92 % of the shift, {part} takes 26 % back"
    )
    assert find(changed(record, f"patching.{path}", estimate(-0.24 * unit))).localized


def test_a_part_that_was_not_measured_takes_the_claim_away(record: AuditRecord) -> None:
    """The embedding may take back what the layers seem to do: switched off, nobody knows."""
    off = Estimate.unknown("switched off (patching.embedding)")
    without = changed(changed(record, "patching.embedding_gain", off), "patching.embedding_transplant", off)
    finding = find(without)
    assert not finding.localized
    assert "whether the embedding takes it back is not known (switched off (patching.embedding))" in finding.words


def test_shares_are_of_the_shift_of_the_pairs_that_were_patched(record: AuditRecord) -> None:
    """With a control variate effects of some pairs are compared, and margins are of all."""
    patching = record.patching
    assert patching is not None
    attribution = Attribution(
        exact_pairs=16, patched_pairs=[16] * 6, pairs=64, correlation=[0.9] * 6, joint_correlation=[0.9] * 6,
        equivalent_pairs=[40.0] * 6, points=[0.0], path="joint", mean=[estimate(1.0)] * 6,
    )  # fmt: skip
    parts = (patching.embedding_transplant, *patching.block_transplant, patching.head_transplant)
    there = sum(part.mean for part in parts) / patching.additivity.mean
    few = changed(record, "patching.attribution", attribution)
    few = changed(few, "patching.head_transplant", estimate(-0.26 * there))
    # Of all pairs the shift is twice that: the head would seem to take 13 % back.
    few = changed(few, "margins.shift", estimate(2 * there))
    additivity = (sum(part.mean for part in parts[:-1]) - 0.26 * there) / there
    few = changed(few, "patching.additivity", estimate(additivity))
    assert "the head takes 26 % back" in find(few).words


def test_a_layer_outside_that_takes_back_is_named(record: AuditRecord) -> None:
    assert record.patching is not None
    gains = list(record.patching.layer_gain)
    gains[0] = estimate(-0.3)
    gains[3] = estimate(-0.9)  # of the claim itself: what it is worth is its gain's matter
    alone = list(record.patching.block_transplant)
    alone[5] = estimate(-1.5 * record.margins.shift.mean)
    poor = changed(changed(record, "patching.layer_gain", gains), "patching.block_transplant", alone)
    assert find(poor).words == (
        "no localization claimed: layers 3–4 push up by 92 % of the shift, layer 5 takes 150 % back, "
        "layer 0 takes 30 % back"
    )
    unknown = [Estimate.unknown("no"), *record.patching.layer_gain[1:]]
    assert find(changed(record, "patching.layer_gain", unknown)).localized


def test_too_few_independent_pairs_take_the_claim_away(record: AuditRecord) -> None:
    assert find(changed(record, "patching.groups", 24)).localized
    assert find(changed(record, "patching.groups", None)).localized  # older records did not count them
    assert find(changed(record, "patching.groups", 23)).words == (
        "no localization claimed: a localization is claimed from 24 independent patched pairs, found 23"
    )


def test_noise_must_do_less_and_not_only_something_else(record: AuditRecord) -> None:
    """An effect that lies below the noise's is no evidence: a random shift does more."""
    noise = [estimate(0.0)] * 3 + [estimate(9.0)] + [estimate(0.0)] * 2
    assert "noise control failed at layer 3: a random shift of the same length does as much" in (
        find(changed(record, "controls.noise.effect", noise)).words
    )


def test_equal_weights_of_few_pairs_are_the_same_model(record: AuditRecord) -> None:
    unknown = Estimate(mean=0.0, low=math.nan, high=math.nan, reason="an interval needs at least 8, found 4")
    few = changed(record, "margins.shift", unknown)
    assert "the mean margin shift is not known (an interval needs at least 8, found 4)" in find(few).words
    same = changed(few, "reference_check.same_weights", True)
    assert find(same).words == "no localization claimed: policy and reference give the same margins"


def test_all_that_speaks_against_a_claim_is_said(record: AuditRecord) -> None:
    poor = changed(record, "patching.standing_out.stability", 0.5)
    poor = changed(poor, "controls.reverse", Control(verdict="failed", reason="it rose"))
    assert find(poor).words.count(";") == 1


def test_rank_is_claimed_only_where_it_was_shown(record: AuditRecord) -> None:
    assert "rank not measured there" in find(changed(record, "low_rank", {})).words
    curve = record.low_rank["shift"][3]
    wide = curve.model_copy(update={"rank_95_high": math.inf})
    assert "rank not shown to be ≤ 16" in find(changed(record, "low_rank", {"shift": {3: wide}})).words
    one = {"shift": {3: curve}}
    assert "rank ≤ 4 at layer 3, the others not measured;" in find(changed(record, "low_rank", one)).words
    fitted = record.low_rank["shift"][3]
    unknown = fitted.model_copy(update={
        "rank_95": math.nan, "rank_95_low": math.nan, "rank_95_high": math.nan,
        "effect_fraction": [Estimate.unknown("no rows")] * len(fitted.ranks),
    })  # fmt: skip
    for curves in ({3: fitted, 4: unknown}, {3: unknown, 4: fitted}):
        assert "rank not known" in find(changed(record, "low_rank", {"shift": curves})).words, "whichever comes first"
    failed = Control(verdict="failed", reason="as well")
    assert (
        "rank not claimed (random subspaces do as well)"
        in find(changed(record, "controls.random_subspace", failed)).words
    )
    assert "failed: random subspace" in find(changed(record, "controls.random_subspace", failed)).words


def test_positions_are_named(record: AuditRecord) -> None:
    assert (
        "CI 85–97 %, patched at last prompt token positions)"
        in find(changed(record, "patching.positions", "last_prompt_token")).words
    )


def test_it_stands_at_the_top_of_the_stored_record(record: AuditRecord) -> None:
    stored = record.model_copy(update={"finding": find(record)})
    assert stored.to_json().startswith('{"finding":{"words":"localized in layers 3–4 (92 % of the gain')
    again = AuditRecord.from_json(stored.to_json())
    assert find(again) == again.finding


def test_every_control_says_what_it_guards() -> None:
    assert set(GUARDED) == set(Controls.model_fields)
