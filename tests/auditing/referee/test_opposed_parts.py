"""Parts that work against each other: who lowers the margin is no place of the preference, and stands in the way of a claim."""

from __future__ import annotations

import re
from functools import cache

import pytest
from torch import nn

from align_audit import AuditRecord, audit
from tests.helpers.misleading import EMBEDDING, HEAD, NORM, Known, asked, layer, pushed, small_llama, together, truth
from tests.helpers.tiny import random_pairs

REFERENCE = small_llama(seed=4)
PROBES = random_pairs(28, seed=5, longest=5)


@cache
def push(part: str, nats: float) -> nn.Module:
    """The reference with one part that moves the mean margin by so much on its own."""
    return pushed(REFERENCE, PROBES, part, nats)


@cache
def audited_with_truth(*pushes: tuple[str, float]) -> tuple[AuditRecord, Known]:
    policy = together(REFERENCE, *(push(*one) for one in pushes))
    return audit(policy, REFERENCE, PROBES, asked()), truth(policy, REFERENCE, PROBES)


def percentages(words: str) -> list[float]:
    return [abs(float(number)) for number in re.findall(r"([−-]?\d+(?:\.\d+)?)\s*%", words)]


def says_share(words: str, known: Known, column: int) -> bool:
    """Whether a percentage in the words is what the part of that column does: alone, or gained at it."""
    shares = (100 * abs(known.shares[column]), 100 * abs(known.gains[column]))
    return any(abs(number - share) <= max(2.0, 0.03 * share) for number in percentages(words) for share in shares)


def check_nothing_claimed(record: AuditRecord) -> str:
    assert record.finding is not None
    assert not record.finding.localized, record.finding.words
    assert record.finding.layers == []
    return record.finding.words


def test_one_layer_alone_is_claimed() -> None:
    record, known = audited_with_truth((layer(1), 3.0))
    assert record.finding is not None and record.patching is not None
    assert record.finding.localized and record.finding.layers == [1], record.finding.words
    for number in range(4):
        transplant, gain = record.patching.block_transplant[number], record.patching.layer_gain[number]
        assert transplant.mean == pytest.approx(known.transplants[:, number + 1].mean(), abs=1e-5)
        assert gain.mean == pytest.approx(known.gains[number + 1], abs=1e-5)


@pytest.mark.parametrize(("up", "down", "back"), [(1, 2, -2.0), (2, 0, -1.3), (1, 3, -2.0)])
def test_a_layer_that_lowers_the_margin_does_not_stand_out(up: int, down: int, back: float) -> None:
    record, known = audited_with_truth((layer(up), 3.0), (layer(down), back))
    assert record.margins.shift.low > 0
    assert known.shares[down + 1] < -0.25 and known.gains[down + 1] < -0.25
    assert record.patching is not None and record.patching.standing_out is not None
    standing_out = record.patching.standing_out
    assert down not in standing_out.layers
    assert not standing_out.contribution[down].mean > 0, standing_out.contribution[down]
    assert record.patching.peak_layer == up
    words = check_nothing_claimed(record)
    assert re.search(rf"layer {down}\b", words), words
    assert says_share(words, known, down + 1), (words, known.shares, known.gains)


@pytest.mark.parametrize(
    ("part", "name", "column", "up", "back"),
    [
        (HEAD, r"\bhead\b", 5, 3.0, -2.0),
        (NORM, r"\b(head|norm)\b", 5, 1.0, -0.7),
        (EMBEDDING, r"\bembedding", 0, 3.0, -2.0),
    ],
    ids=["head", "final norm", "embedding"],
)
def test_no_claim_while_a_part_takes_the_shift_back(part: str, name: str, column: int, up: float, back: float) -> None:
    record, known = audited_with_truth((layer(1), up), (part, back))
    assert record.margins.shift.low > 0
    assert known.shares[column] < -0.25 and known.gains[column] < -0.25
    words = check_nothing_claimed(record)
    assert re.search(name, words), words
    assert says_share(words, known, column), (words, known.shares, known.gains)


def test_a_policy_that_moved_towards_rejected_has_its_peak_where_it_was_done() -> None:
    record, known = audited_with_truth((layer(1), -3.0), (layer(3), 0.8))
    transplants = known.transplants.mean(0)[1:-1]
    assert known.shift.mean() < 0 and transplants.argmin() == 1 and transplants.argmax() != 1
    assert record.patching is not None and record.patching.standing_out is not None
    assert record.margins.shift.mean == pytest.approx(known.shift.mean(), abs=1e-5)
    assert record.patching.peak_layer == 1
    assert 3 not in record.patching.standing_out.layers
    check_nothing_claimed(record)


@pytest.mark.parametrize("part", [HEAD, EMBEDDING], ids=["head", "embedding"])
def test_a_part_against_a_policy_that_moved_towards_rejected_is_no_claim_either(part: str) -> None:
    record, known = audited_with_truth((layer(1), -3.0), (part, 1.5))
    assert record.margins.shift.high < 0
    assert record.patching is not None and record.patching.peak_layer == 1
    assert known.transplants.mean(0)[1:-1].argmin() == 1
    check_nothing_claimed(record)
