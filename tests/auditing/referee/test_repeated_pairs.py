"""Pairs that repeat each other or share a prompt are not independent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from align_audit import AuditRecord, ProbeSet, audit
from align_audit.probes.pairs import ProbePair
from tests.helpers import oracle
from tests.helpers.misleading import (
    Floats,
    asked,
    differences,
    grouped_pairs,
    layer,
    pair_of,
    probe_set,
    prompt_of,
    pushed,
    renumbered,
    small_llama,
    truth,
)
from tests.helpers.tiny import perturbed, random_pairs

REFERENCE = small_llama(layers=3, width=16, seed=2)
ALL = asked(
    localization={"selection_resamples": 10, "permutations": 5},
    low_rank={"ranks": (1, 2, 4), "layers": (1,)},
    spinal={},
)
FLAT = ("provenance.pairs",)


@cache
def probes() -> ProbeSet:
    return random_pairs(24, seed=6, longest=5)


@cache
def policy() -> nn.Module:
    return pushed(perturbed(REFERENCE, 0.02), probes(), layer(1), 2.0)


@cache
def given_once() -> AuditRecord:
    return audit(policy(), REFERENCE, probes(), ALL)


# -- each pair three times ---------------------------------------------------------------------------------------------


def thrice_in_turn() -> ProbeSet:
    return renumbered([*probes().pairs, *probes().pairs, *probes().pairs])


def thrice_one_after_the_other() -> ProbeSet:
    return renumbered(pair for pair in probes().pairs for _ in range(3))


def thrice_under_one_index() -> ProbeSet:
    return probe_set([*probes().pairs, *probes().pairs, *probes().pairs])


@pytest.mark.parametrize(
    "thrice", [thrice_in_turn, thrice_under_one_index, thrice_one_after_the_other], ids=lambda make: make.__name__
)
def test_each_pair_three_times_is_each_pair_once(thrice: object) -> None:
    assert callable(thrice)
    record = audit(policy(), REFERENCE, thrice(), ALL)
    assert record.provenance.pairs == 24
    assert sum(record.provenance.pairs_dropped.values()) == 48
    assert differences(record, given_once(), 1e-9) == []


def test_a_data_set_that_repeats_its_rows_gives_what_its_rows_give() -> None:
    rows = [
        {
            "prompt_ids": list(prompt_of(pair)),
            "chosen_ids": list(pair.chosen_ids[pair.chosen_start :]),
            "rejected_ids": list(pair.rejected_ids[pair.rejected_start :]),
        }
        for pair in probes()
    ]
    repeated = ProbeSet.from_dataset(rows * 3, tokenizer=None, max_pairs=200)
    record = audit(policy(), REFERENCE, repeated, ALL)
    assert record.provenance.pairs == 24 and sum(record.provenance.pairs_dropped.values()) == 48
    once = audit(policy(), REFERENCE, ProbeSet.from_dataset(rows, tokenizer=None, max_pairs=200), ALL)
    assert record.margins.shift.high - record.margins.shift.low == pytest.approx(
        once.margins.shift.high - once.margins.shift.low, rel=1e-9
    )
    assert differences(record, once, 1e-9) == []


def test_a_pair_with_the_sides_swapped_is_another_pair() -> None:
    swapped = [
        replace(pair, index=100 + pair.index, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
        for pair in probes().pairs[:8]
    ]
    record = audit(policy(), REFERENCE, probe_set([*probes().pairs[8:], *swapped]), asked())
    assert record.provenance.pairs == 24 and not record.provenance.pairs_dropped


# -- pairs that share a prompt -----------------------------------------------------------------------------------------


def grouped(values: Floats, pairs: Iterable[ProbePair]) -> Floats:
    """Mean of each prompt's pairs."""
    by_prompt: dict[tuple[int, ...], list[float]] = {}
    for value, pair in zip(values, pairs, strict=True):
        by_prompt.setdefault(prompt_of(pair), []).append(float(value))
    return np.asarray([np.mean(of_prompt) for of_prompt in by_prompt.values()])


def width(values: Floats) -> float:
    """Of a 95 % interval of the mean by the normal distribution."""
    return float(2 * 1.96 * values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("groups", [12, 40])
def test_intervals_are_those_of_prompts(groups: int) -> None:
    pairs = grouped_pairs(groups, per_prompt=4, seed=groups)
    moved = perturbed(REFERENCE, 0.1)
    known = truth(moved, REFERENCE, pairs)
    record = audit(moved, REFERENCE, pairs, asked(patching={"noise_draws": 0, "reverse": False}))
    assert record.patching is not None
    measured = {"shift": (record.margins.shift, known.shift)}
    for number in range(3):
        measured[f"effect {number}"] = (record.patching.effect[number], known.effects[:, number + 1])
        measured[f"transplant {number}"] = (record.patching.block_transplant[number], known.transplants[:, number + 1])
    for name, (estimate, values) in measured.items():
        clustered, naive = width(grouped(values, pairs)), width(values)
        assert naive < 0.7 * clustered, f"{name}: the pairs of a prompt are to be alike"
        assert estimate.mean == pytest.approx(values.mean(), abs=1e-5), name
        # A percentile bootstrap of 12 or 40 groups is narrower than this by up to √(11/12), and has its own noise.
        assert estimate.high - estimate.low > 0.85 * clustered, name


def explained(rows: Floats, held_out: Floats, rank: int) -> tuple[float, float]:
    """Held-out variance inside the span of the first right singular vectors of the rows, and all of it."""
    basis = np.linalg.svd(rows, full_matrices=False)[2][:rank]
    return float(((held_out @ basis.T) ** 2).sum()), float((held_out**2).sum())


def test_cross_fit_halves_hold_whole_prompts() -> None:
    """With one row a prompt, a half that split a prompt would find every held-out row in its own span."""
    generator = np.random.default_rng(8)
    groups, each, rank = 8, 4, 3
    pairs = probe_set(
        pair_of(4 * group + i, prompt, [int(chosen)], [int(rejected)])
        for group, prompt in enumerate(generator.integers(3, 61, size=(groups, 3)).tolist())
        for i, (chosen, rejected) in enumerate(generator.choice(np.arange(3, 61), size=(each, 2), replace=False))
    )
    reference = small_llama(layers=2, width=32, seed=5)
    moved = perturbed(reference, 0.1)
    config = asked(
        patching={"positions": "last_prompt_token"},
        low_rank={"layers": (0,), "ranks": (rank,), "bases": ("shift",), "random_draws": 0},
    )
    record = audit(moved, reference, pairs, config)
    rows = np.stack(
        [
            (oracle.forward(moved, ids).h(0) - oracle.forward(reference, ids).h(0))[-1].double().numpy()
            for ids in dict.fromkeys(prompt_of(pair) for pair in pairs)
        ]
    )
    possible = []
    for size in range(1, groups):
        for half in combinations(range(groups), size):
            rest = [group for group in range(groups) if group not in half]
            (one, all_one), (two, all_two) = (
                explained(rows[list(half)], rows[rest], rank),
                explained(rows[rest], rows[list(half)], rank),
            )
            possible += [(one + two) / (all_one + all_two), (one / all_one + two / all_two) / 2]
    split, everything = explained(rows, rows, rank)
    assert split / everything > max(possible) + 0.03, "halves that share prompts are to be told from those that do not"
    curve = record.low_rank["shift"][0]
    assert curve.explained_variance_ratio[0] <= max(possible) + 1e-6
    assert np.abs(np.asarray(possible) - curve.explained_variance_ratio[0]).min() < 1e-6


def agreement(transplants: Floats, units: list[int], seed: int = 0) -> float:
    """Share of random half splits of the units whose halves have their largest mean at the same layer."""
    generator, names = np.random.default_rng(seed), np.unique(units)
    same = []
    for _ in range(2000):
        half = np.isin(units, generator.permutation(names)[: len(names) // 2])
        same.append(transplants[half].mean(0).argmax() == transplants[~half].mean(0).argmax())
    return float(np.mean(same))


def test_split_halves_hold_whole_prompts() -> None:
    """Prompts disagree on the peak and pairs of a prompt do not: halves that split prompts would agree far more."""
    pairs = grouped_pairs(groups=24, per_prompt=4, seed=2)
    units = [place // 4 for place in range(len(pairs))]
    moved = together_for_disagreement(pairs)
    transplants = truth(moved, REFERENCE, pairs).transplants[:, 1:-1]
    by_prompt, by_pair = agreement(transplants, units), agreement(transplants, list(range(len(pairs))))
    assert by_pair - by_prompt > 0.15, (by_pair, by_prompt)
    record = audit(moved, REFERENCE, pairs, asked(patching={"split_half_repeats": 400}))
    assert record.margins.shift.low > 0
    value = record.controls.split_half.value
    assert value is not None and abs(value - by_prompt) < min(0.1, (by_pair - by_prompt) / 2), (
        value,
        by_prompt,
        by_pair,
    )


def together_for_disagreement(pairs: ProbeSet) -> nn.Module:
    """Layers 0 and 2 are pushed alike, and noise over the prompts decides which of them is the larger."""
    moved = perturbed(REFERENCE, 0.03, seed=3)
    moved = pushed(moved, pairs, layer(0), 0.6)
    share = truth(moved, REFERENCE, pairs).transplants.mean(0)
    assert torch.isfinite(torch.tensor(share)).all()
    return pushed(moved, pairs, layer(2), max(float(share[1] - share[3]), 0.1))
