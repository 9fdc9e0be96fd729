"""Subspaces against NumPy's SVD, closed forms and planted signals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align_audit.measures import subspace as sub


def rows_of(n: int, d: int, seed: int, scale: np.ndarray | None = None) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(n, d)) + 0.5  # not centred
    return torch.from_numpy(rows * (np.geomspace(4.0, 0.1, d) if scale is None else scale))


def gram_of(rows: torch.Tensor) -> sub.Gram:
    accumulator = sub.GramAccumulator(rows.shape[1])
    accumulator.update(rows)
    return accumulator.freeze()


def test_gram_is_the_sum_over_rows_whatever_the_batches() -> None:
    rows = rows_of(23, 5, seed=0)
    accumulator = sub.GramAccumulator(5)
    for batch in rows.split(4):
        accumulator.update(batch)
    gram = accumulator.freeze()
    expected = sum(np.outer(h, h) for h in rows.numpy())
    np.testing.assert_allclose(gram.matrix.numpy(), expected, rtol=1e-12)
    assert torch.equal(gram.matrix, gram.matrix.T)
    assert gram.rows == 23


def test_gram_is_float64_also_for_half_rows() -> None:
    rows = torch.full((3000, 2), 0.1, dtype=torch.bfloat16)
    gram = gram_of(rows)
    assert gram.matrix.dtype == torch.float64
    assert gram.matrix[0, 1].item() == pytest.approx(3000 * rows[0, 0].double().item() ** 2, rel=1e-12)


def test_frozen_gram_stays_and_halves_add() -> None:
    accumulator = sub.GramAccumulator(3)
    assert accumulator.freeze().matrix.tolist() == [[0.0] * 3] * 3
    accumulator.update(rows_of(4, 3, seed=1))
    frozen = accumulator.freeze()
    before = frozen.matrix.clone()
    accumulator.update(rows_of(5, 3, seed=2))
    assert torch.equal(frozen.matrix, before)
    total = frozen + gram_of(rows_of(5, 3, seed=2))
    torch.testing.assert_close(total.matrix, accumulator.freeze().matrix)
    assert total.rows == 9


def test_top_basis_equals_right_singular_vectors() -> None:
    rows = rows_of(40, 8, seed=3)
    V = sub.top_basis(gram_of(rows), 3)
    expected = np.linalg.svd(rows.numpy())[2][:3].T
    overlap = (V.numpy() * expected).sum(axis=0)
    np.testing.assert_allclose(abs(overlap), 1.0, atol=1e-10)  # in this order
    np.testing.assert_allclose((V.T @ V).numpy(), np.eye(3), atol=1e-12)
    assert V.dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_bases_have_one_sign_and_do_not_depend_on_the_rows_order(seed: int, k: int) -> None:
    rows = rows_of(12, 6, seed)
    V = sub.top_basis(gram_of(rows), k)
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(sub.top_basis(gram_of(-rows.flip(0)), k), V, rtol=1e-6, atol=1e-8)


def test_planted_subspace_is_found_and_noise_is_not() -> None:
    generator = np.random.default_rng(4)
    truth = np.linalg.qr(generator.normal(size=(30, 2)))[0]
    planted = torch.from_numpy(generator.normal(size=(200, 2)) @ truth.T * 5 + 0.1 * generator.normal(size=(200, 30)))
    V = sub.top_basis(gram_of(planted), 2)
    assert sub.principal_angles(V, torch.from_numpy(truth)).max() < 0.02
    assert sub.principal_angles(sub.random_basis(30, 2, seed=0), torch.from_numpy(truth)).max() > 0.5


def test_rows_that_are_not_finite_give_an_unknown_basis() -> None:
    rows = rows_of(4, 3, seed=0)
    rows[1, 1] = math.inf
    gram = gram_of(rows)
    V = sub.top_basis(gram, 2)
    assert V.shape == (3, 2)
    assert V.isnan().all()
    assert np.isnan(sub.explained_variance_ratio(gram, V, [1, 2])).all()
    assert np.isnan(sub.explained_variance_ratio(gram_of(rows_of(4, 3, seed=0)), V, [1, 2])).all()
    assert np.isnan(sub.principal_angles(V, sub.random_basis(3, 1, seed=0))).tolist() == [True]


def test_top_basis_beyond_the_rank_is_still_orthonormal() -> None:
    V = sub.top_basis(gram_of(rows_of(2, 6, seed=0)), 6)
    torch.testing.assert_close(V.T @ V, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    zero = sub.top_basis(gram_of(torch.zeros(3, 4)), 2)
    torch.testing.assert_close(zero.T @ zero, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_random_basis_is_orthonormal_seeded_and_isotropic() -> None:
    V = sub.random_basis(9, 4, seed=1)
    torch.testing.assert_close(V.T @ V, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(V, sub.random_basis(9, 4, seed=1))
    assert not torch.equal(V, sub.random_basis(9, 4, seed=2))
    energy = sum(sub.random_basis(6, 2, seed=seed).square().sum(dim=1) for seed in range(600)) / 600
    np.testing.assert_allclose(energy, 2 / 6, atol=0.05)


def test_explained_variance_equals_projected_energy_of_held_out_rows() -> None:
    fitted, held_out = rows_of(30, 6, seed=7), rows_of(20, 6, seed=8)
    V = sub.top_basis(gram_of(fitted), 6)
    ranks = [1, 2, 4, 6]
    ratios = sub.explained_variance_ratio(gram_of(held_out), V, ranks)
    energy = held_out.square().sum()
    for k, ratio in zip(ranks, ratios, strict=True):
        assert ratio == pytest.approx(((held_out @ V[:, :k] @ V[:, :k].T).square().sum() / energy).item(), rel=1e-10)
    assert ratios == sorted(ratios)
    assert ratios[-1] <= 1.0
    singular = np.linalg.svd(fitted.numpy(), compute_uv=False) ** 2
    own = sub.explained_variance_ratio(gram_of(fitted), V, [2])[0]
    assert own == pytest.approx(singular[:2].sum() / singular.sum(), rel=1e-10)


def test_explained_variance_of_everything_is_one_and_not_more() -> None:
    for seed in range(40):
        gram = gram_of(rows_of(9, 6, seed))
        ratio = sub.explained_variance_ratio(gram, sub.random_basis(6, 6, seed), [6])[0]
        assert 1 - 1e-12 < ratio <= 1.0


def test_explained_variance_of_nothing_is_unknown() -> None:
    assert np.isnan(sub.explained_variance_ratio(gram_of(torch.zeros(3, 4)), sub.random_basis(4, 2, 0), [1, 2])).all()


def test_principal_angles() -> None:
    e = torch.eye(4, dtype=torch.float64)
    turned = torch.stack([e[0], math.cos(0.3) * e[1] + math.sin(0.3) * e[2]], dim=1)
    assert sub.principal_angles(e[:, :2], turned).tolist() == pytest.approx([0.0, 0.3], abs=1e-12)
    assert sub.principal_angles(e[:, :1], turned).tolist() == pytest.approx([0.0], abs=1e-12)
    assert sub.principal_angles(e[:, :2], e[:, 2:]).tolist() == pytest.approx([math.pi / 2] * 2)
    V = sub.random_basis(4, 2, seed=1)
    mixed = V @ torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    assert sub.principal_angles(V, mixed).max() < 1e-7  # the subspace counts, not the basis
    assert np.isnan(sub.principal_angles(V, torch.zeros(4, 2))).tolist() == [True, True]


@pytest.mark.parametrize(
    ("fractions", "least"),
    [
        ([0.2, 0.96, 0.97, 1.0], 2),
        ([0.97, 0.90, 0.96, 1.02], 4),
        ([0.95, 0.95, 0.95, 0.95], 1),
        ([0.99, math.nan, 0.99, 0.99], 4),
        ([0.1, 0.2, 0.3, 0.96], 8),
    ],
)
def test_rank_95(fractions: list[float], least: int) -> None:
    assert sub.rank_95([1, 2, 4, 8], fractions) == (float(least), None)


def test_rank_95_none_reaches_it() -> None:
    value, reason = sub.rank_95([1, 2], [0.99, 0.94])
    assert math.isnan(value)
    assert reason == "at the largest rank, 2, the fraction is 0.94 < 0.95"
    assert math.isnan(sub.rank_95([1, 2], [0.99, math.nan]).value)
    assert sub.rank_95([1, 2], [0.99, 0.94], threshold=0.9).value == 1.0


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_gram_rank_is_the_rows_own(rank: int) -> None:
    generator = np.random.default_rng(rank)
    rows = torch.from_numpy(generator.normal(size=(40, rank)) @ generator.normal(size=(rank, 6)))
    assert sub.gram_rank(gram_of(rows)) == np.linalg.matrix_rank(rows.numpy()) == rank
    assert sub.gram_rank(gram_of(torch.full((3, 6), math.nan))) == 0


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: sub.GramAccumulator(0), "d=0"),
        (lambda: sub.GramAccumulator(3).update(torch.zeros(2, 4)), r"\[n, 3\]; found \[2, 4\]"),
        (lambda: sub.GramAccumulator(3).update(torch.zeros(2, 3, dtype=torch.long)), "int64"),
        (lambda: sub.Gram(torch.zeros(2, 3, dtype=torch.float64), 1), r"found shape \[2, 3\]"),
        (lambda: sub.Gram(torch.zeros(2, 2), 1), "float32"),
        (lambda: gram_of(torch.zeros(1, 2)) + gram_of(torch.zeros(1, 3)), r"found \[2, 2\] and \[3, 3\]"),
        (lambda: sub.top_basis(gram_of(torch.zeros(1, 2)), 3), "found 3"),
        (lambda: sub.random_basis(3, 0, seed=0), "found 0"),
        (lambda: sub.explained_variance_ratio(gram_of(torch.zeros(1, 2)), torch.eye(3), [1]), r"found shape \[3, 3\]"),
        (lambda: sub.explained_variance_ratio(gram_of(torch.zeros(1, 2)), torch.eye(2), [3]), "found 3"),
        (lambda: sub.principal_angles(torch.eye(3), torch.eye(2)), r"found \[3, 3\] and \[2, 2\]"),
        (lambda: sub.rank_95([2, 1], [1.0, 1.0]), r"ranks \[2, 1\]"),
        (lambda: sub.rank_95([1, 2], [1.0]), r"fractions \[1\.0\]"),
        (lambda: sub.rank_95([], []), r"ranks \[\]"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("grouped", [False, True])
def test_rank_95_interval_is_the_percentile_of_resampled_ranks(grouped: bool) -> None:
    generator = np.random.default_rng(0)
    full = generator.normal(3.0, 1.0, size=24)
    # Rank 2 is about enough: some resamples of the pairs say so and some do not.
    fitted = np.column_stack([0.5 * full, 0.95 * full + generator.normal(0.0, 0.4, size=24), full])
    groups = generator.permutation(np.resize(np.arange(10), 24)) if grouped else np.arange(24)
    count = 10 if grouped else 24
    low, high = sub.rank_95_interval([1, 2, 4], fitted, full, resamples=300, seed=3, groups=groups if grouped else None)
    found = []
    for row in np.random.default_rng(3).integers(0, count, size=(300, count)):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in row])
        shares = fitted[rows].sum(axis=0) / full[rows].sum()
        found.append(sub.rank_95([1, 2, 4], shares.tolist()).value)
    assert set(found) == {2.0, 4.0}
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1)))
    assert (low, high) == (
        np.percentile(found, tail, method="inverted_cdf"),
        np.percentile(found, 100 - tail, method="inverted_cdf"),
    )


def test_rank_95_interval_is_open_where_no_rank_is_enough_and_unknown_where_an_effect_is() -> None:
    full = np.arange(1.0, 9.0)
    assert sub.rank_95_interval([1, 2], np.column_stack([full, 0.5 * full]), full) == (math.inf, math.inf)
    assert sub.rank_95_interval([1, 2], np.column_stack([0.9 * full, full]), full) == (2.0, 2.0)
    for fitted, whole in ((full[:1], full[:1]), (full[:7], full[:7]), (np.where(full > 2, full, np.nan), full)):
        assert all(map(math.isnan, sub.rank_95_interval([1], fitted[:, None], whole)))
    assert all(map(math.isnan, sub.rank_95_interval([1], full[:, None], full, groups=np.arange(8) // 2)))
    with pytest.raises(ValueError, match=r"\[N, 2\] and \[N\]; found \[8, 1\]"):
        sub.rank_95_interval([1, 2], full[:, None], full)
