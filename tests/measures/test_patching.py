"""Patched streams, and summaries against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from align_audit.measures.draws import noise_directions
from align_audit.measures.patching import noised, patched, peak_layer, summarize_patching
from tests.helpers.oracle import summary as oracle_summary
from tests.helpers.small_samples import hull, p_value, without_each

OPTIONS = {"resamples": 200, "confidence": 0.9, "method": "percentile", "seed": 3}


# -- streams -------------------------------------------------------------------------------------------------------------


def test_patched_takes_the_source_where_the_mask_says() -> None:
    base, source = torch.zeros(2, 3, 4), torch.full((2, 3, 4), math.nan)
    source[0, 1] = 7.0
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = True
    found = patched(base, source.double(), mask)
    assert found.dtype == base.dtype
    assert found[0, 1].tolist() == [7.0] * 4
    assert found.sum().item() == 28.0  # what is not replaced does not touch the result, NaN or not
    assert base.sum().item() == 0.0


def test_noised_streams_lie_as_far_away_as_the_source() -> None:
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    directions = noise_directions(0, [3, 4, 5, 6], layer=2, draw=0, length=5, width=8)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    found = noised(base, source, mask, directions)
    assert torch.equal(found[~mask], base[~mask])
    moved, wanted = found - base, source - base
    torch.testing.assert_close(moved[mask].norm(dim=-1), wanted[mask].norm(dim=-1), rtol=1e-6, atol=0.0)
    cosine = torch.nn.functional.cosine_similarity(moved[mask], directions[mask].double(), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-6, atol=0.0)
    assert torch.equal(noised(base, base, mask, directions), base)


# -- summaries -----------------------------------------------------------------------------------------------------------


def numbers(pairs: int = 12, layers: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shift = 3.0 + generator.normal(size=pairs)
    effects = shift[:, None] * np.linspace(0.05, 0.95, layers + 1) + 0.2 * generator.normal(size=(pairs, layers + 1))
    transplants = 0.2 * shift[:, None] + 0.3 * generator.normal(size=(pairs, layers + 2))
    return effects, transplants, shift


def test_point_estimates_against_plain_loops() -> None:
    effects, transplants, shift = numbers()
    pairs, layers = len(shift), 4
    found = summarize_patching(effects, transplants, shift, **OPTIONS)

    def mean(values: np.ndarray) -> float:
        total = 0.0
        for value in values:
            total += float(value)
        return total / pairs

    recovery = [sum(effects[i, c] for i in range(pairs)) / sum(shift) for c in range(layers + 1)]
    assert [e.mean for e in found.effect] == pytest.approx([mean(effects[:, c + 1]) for c in range(layers)])
    assert [r.mean for r in found.recovery] == pytest.approx(recovery[1:])
    assert found.embedding_gain.mean == pytest.approx(recovery[0])
    assert [g.mean for g in found.layer_gain] == pytest.approx([recovery[c + 1] - recovery[c] for c in range(layers)])
    assert found.head_gain.mean == pytest.approx(1 - recovery[-1])
    assert found.embedding_gain.mean + sum(g.mean for g in found.layer_gain) + found.head_gain.mean == pytest.approx(
        1.0
    )
    assert found.embedding_transplant.mean == pytest.approx(mean(transplants[:, 0]))
    assert [t.mean for t in found.block_transplant] == pytest.approx(
        [mean(transplants[:, c + 1]) for c in range(layers)]
    )
    assert found.head_transplant.mean == pytest.approx(mean(transplants[:, -1]))
    assert found.additivity.mean == pytest.approx(transplants.sum() / shift.sum())
    blocks = [t.mean for t in found.block_transplant]
    assert found.peak_layer == blocks.index(max(blocks))
    assert found.peak_reason is None

    oracle = oracle_summary(effects, transplants, shift)
    assert [r.mean for r in found.recovery] == pytest.approx(list(oracle["recovery"])[1:])
    assert found.additivity.mean == pytest.approx(oracle["additivity"])
    assert found.peak_layer == oracle["peak_layer"]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_intervals_against_plain_loops(few: bool, grouped: bool) -> None:
    """A bootstrap of 34 groups; of 12 the wider of Student's and the studentized one."""
    count = 12 if few else 34
    effects, transplants, shift = numbers(pairs=2 * count if grouped else count)
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(count), 2)) if grouped else np.arange(count)
    found = summarize_patching(effects, transplants, shift, **OPTIONS, groups=groups if grouped else None)
    members = [np.flatnonzero(groups == group) for group in range(count)]
    drawn = np.random.default_rng(OPTIONS["seed"]).integers(0, count, size=(200, count))
    tail = stats.norm.cdf(-stats.t.ppf(0.95, count - 1) * np.sqrt(count / (count - 1)))

    def interval(statistic: object) -> list[float]:
        if few:
            without = [statistic(np.flatnonzero(groups != group)) for group in range(count)]  # type: ignore[operator]
            return hull(statistic(np.arange(len(groups))), without, 0.9, 200, 3)  # type: ignore[operator]
        values = [statistic(np.concatenate([members[group] for group in draw])) for draw in drawn]  # type: ignore[operator]
        return [float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))]

    def share(columns: np.ndarray) -> list[float]:
        return interval(lambda draw: columns[draw].sum() / shift[draw].sum())

    for layer in range(4):
        gain = effects[:, layer + 1] - effects[:, layer]
        for estimate, expected in (
            (found.effect[layer], interval(lambda draw, c=layer + 1: effects[draw, c].mean())),
            (found.block_transplant[layer], interval(lambda draw, c=layer + 1: transplants[draw, c].mean())),
            (found.recovery[layer], share(effects[:, layer + 1])),
            (found.layer_gain[layer], share(gain)),
        ):
            assert [estimate.low, estimate.high] == pytest.approx(expected)
    for estimate, columns in (
        (found.embedding_gain, effects[:, 0]),
        (found.head_gain, shift - effects[:, -1]),
        (found.additivity, transplants.sum(1)),
    ):
        assert [estimate.low, estimate.high] == pytest.approx(share(columns))
        assert estimate.low < estimate.high


def test_p_values_are_adjusted_over_layers_and_leave_the_embedding_out() -> None:
    effects, transplants, shift = numbers()
    effects[:, 1] = np.resize([1.0, -1.0], 12)  # no effect at layer 0
    found = summarize_patching(effects, transplants, shift, **OPTIONS)
    alone = [p_value(column.mean(), without_each(column), 200, 3) for column in effects[:, 1:].T]
    expected = stats.false_discovery_control(alone)
    assert found.effect_p_adjusted == pytest.approx(expected.tolist(), rel=1e-9)
    assert found.effect_p_adjusted[0] == pytest.approx(1.0)
    effects, transplants, shift = numbers(pairs=40)
    effects[:, 1] = np.resize([1.0, -1.0], 40)
    found = summarize_patching(effects, transplants, shift, **OPTIONS)
    assert len(found.effect_p_adjusted) == 4
    assert found.effect_p_adjusted[0] > 0.5
    least = 2 / 201
    assert found.effect_p_adjusted[1:] == pytest.approx([least * 4 / 3] * 3)  # the largest of three equal ranks


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_shares_are_unknown_where_there_is_no_shift(mean: float) -> None:
    effects, transplants, shift = numbers()
    shift = shift - shift.mean() + mean
    found = summarize_patching(effects, transplants, shift, **OPTIONS)
    for estimate in (*found.recovery, *found.layer_gain, found.embedding_gain, found.head_gain, found.additivity):
        assert math.isnan(estimate.mean)
        assert "includes 0" in estimate.reason
    assert all(math.isfinite(estimate.mean) for estimate in (*found.effect, *found.block_transplant))
    assert found.peak_layer is not None


def test_a_falling_margin_has_shares_too() -> None:
    effects, transplants, shift = numbers()
    up, down = (summarize_patching(s * effects, s * transplants, s * shift, **OPTIONS) for s in (1, -1))
    assert [r.mean for r in down.recovery] == pytest.approx([r.mean for r in up.recovery])
    assert down.additivity.mean == pytest.approx(up.additivity.mean)
    assert down.effect[0].mean == pytest.approx(-up.effect[0].mean)
    assert up.peak_layer == down.peak_layer is not None  # what moved the margin, whichever way


def test_identical_models_give_exactly_zero_and_no_peak() -> None:
    found = summarize_patching(np.zeros((8, 5)), np.zeros((8, 6)), np.zeros(8), **OPTIONS)
    for estimate in (*found.effect, *found.block_transplant, found.embedding_transplant, found.head_transplant):
        assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert math.isnan(found.recovery[0].mean)
    assert found.effect_p_adjusted == [1.0] * 4
    assert found.peak_layer is None
    assert "no layer stands out" in found.peak_reason


def test_what_is_not_finite_stays_where_it_is() -> None:
    effects, transplants, shift = numbers()
    effects[3, 2] = math.nan
    transplants[0, 2] = math.inf
    found = summarize_patching(effects, transplants, shift, **OPTIONS)
    assert [math.isnan(e.mean) for e in found.effect] == [False, True, False, False]
    assert [math.isnan(r.mean) for r in found.recovery] == [False, True, False, False]
    assert [math.isnan(g.mean) for g in found.layer_gain] == [False, True, True, False]
    assert [math.isnan(p) for p in found.effect_p_adjusted] == [False, True, False, False]
    assert [math.isnan(t.mean) for t in found.block_transplant] == [False, True, False, False]
    assert math.isnan(found.additivity.mean)
    assert all(e.reason for e in (found.effect[1], found.recovery[1], found.additivity, found.block_transplant[1]))
    assert found.peak_layer is None
    assert "not finite" in found.peak_reason

    _, transplants, _ = numbers()
    found = summarize_patching(*numbers()[:2], np.where(np.arange(12) == 5, np.nan, shift), **OPTIONS)
    assert math.isnan(found.recovery[0].mean)
    assert "1 of 12 values are not finite" in found.recovery[0].reason
    assert math.isfinite(found.effect[0].mean)


@pytest.mark.parametrize("pairs", [1, 7])
def test_few_pairs_have_no_interval(pairs: int) -> None:
    effects, transplants, shift = numbers(pairs=pairs)
    found = summarize_patching(effects, transplants, shift, **OPTIONS)
    assert found.effect[0].mean == pytest.approx(effects[:, 1].mean())
    assert math.isnan(found.effect[0].low)
    assert math.isnan(found.recovery[0].mean)
    assert f"at least 8 independent pairs, found {pairs}" in found.recovery[0].reason
    assert all(math.isnan(p) for p in found.effect_p_adjusted)


def test_wrong_shapes_are_refused() -> None:
    effects, transplants, shift = numbers()
    for wrong in (
        (effects[:, 1:], transplants, shift),
        (effects, transplants[:5], shift),
        (effects, transplants, shift[:5]),
    ):
        with pytest.raises(ValueError, match=r"expected effects \[N, L\+1\], transplants \[N, L\+2\], shift \[N\]"):
            summarize_patching(*wrong, **OPTIONS)


def test_the_peak_is_the_largest_block_transplant_in_the_direction_of_the_shift() -> None:
    assert peak_layer(np.array([0.1, -3.0, 0.4, 0.2]), 1.5) == (2, None)
    assert peak_layer(np.array([0.1, -3.0, 0.4, 0.2]), -1.5) == (1, None)
    assert peak_layer(np.array([-0.3, -0.1]), -1.0) == (0, None)
    assert peak_layer(np.array([0.5]), 1.0) == (0, None)
    assert peak_layer(np.array([0.0, 0.0]), 1.0, "unit") == (
        None, "every mean sufficiency of a unit is 0: no unit stands out",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("transplants", "shift", "reason"),
    [
        ([-0.3, -0.1], 1.0, "no block alone moves the margin in the direction of the mean shift, 1 nats"),
        ([0.3, 0.0], -2.0, "no block alone moves the margin in the direction of the mean shift, -2 nats"),
        ([0.5, 0.5], 1.0, "every block transplant is 0.5: no layer stands out"),
        ([0.0, 0.0], 0.0, "every block transplant is 0: no layer stands out"),
        ([0.5, 0.1, 0.5], 1.0, "several block transplants share the largest value"),
        ([0.5, -0.1], 0.0, "the mean margin shift is 0: it has no direction"),
        ([0.5, math.nan], 1.0, "a block transplant or the mean margin shift is not finite"),
        ([0.5, 0.1], math.nan, "a block transplant or the mean margin shift is not finite"),
    ],
)
def test_there_is_no_peak_without_one_layer_that_works_along_the_shift(
    transplants: list[float], shift: float, reason: str
) -> None:
    assert peak_layer(np.array(transplants), shift) == (None, reason)
