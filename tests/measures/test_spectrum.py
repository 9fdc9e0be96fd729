"""Contraction against closed forms and SciPy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align_audit.measures import spectrum as sp

EPS = np.finfo(np.float64).eps


def with_spectrum(sigma: np.ndarray, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    U = np.linalg.qr(generator.normal(size=(rows, len(sigma))))[0]
    V = np.linalg.qr(generator.normal(size=(columns, len(sigma))))[0]
    return torch.from_numpy((U * sigma) @ V.T)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1.0, 4.0).filter(lambda a: abs(a) > 1e-6), st.integers(20, 300), st.floats(1e-6, 1e6))
def test_power_laws_give_their_exponent(exponent: float, n: int, scale: float) -> None:
    fit = sp.contraction(scale * np.arange(1, n + 1) ** -abs(exponent), rows=n, columns=2 * n)
    assert fit.alpha == pytest.approx(abs(exponent), rel=1e-9)
    assert fit.r2 == pytest.approx(1.0, abs=1e-9)
    assert fit.stderr < 1e-9
    assert fit.n == n
    assert fit.reason is None


def test_fit_equals_scipy_on_a_noisy_spectrum() -> None:
    generator = np.random.default_rng(1)
    sigma = np.sort(np.arange(1, 61) ** -0.8 * np.exp(0.3 * generator.normal(size=60)))[::-1]
    fit = sp.contraction(generator.permutation(sigma), rows=60, columns=200, window=(0.2, 0.8))
    assert (fit.n, fit.first, fit.last) == (60, 12, 48)
    line = stats.linregress(np.log(np.arange(12, 49)), np.log(sigma[11:48]))
    assert (fit.alpha, fit.r2, fit.stderr) == pytest.approx((-line.slope, line.rvalue**2, line.stderr), rel=1e-10)
    assert 0.5 < fit.r2 < 1.0


@pytest.mark.parametrize(("n", "first", "last"), [(70, 7, 63), (30, 3, 27), (100, 10, 90), (55, 6, 49), (21, 3, 18)])
def test_window_is_exact_in_decimals(n: int, first: int, last: int) -> None:
    fit = sp.contraction(np.arange(1, n + 1) ** -1.0, rows=n, columns=n)
    assert (fit.first, fit.last) == (first, last)
    # In binary, 0.07 * 100 is above 7 and 0.57 * 100 below 57.
    fit = sp.contraction(np.arange(1, 101) ** -1.0, rows=100, columns=100, window=(0.07, 0.57))
    assert (fit.first, fit.last) == (7, 57)


def test_what_lies_outside_the_window_does_not_matter() -> None:
    sigma = np.arange(1, 101) ** -1.0
    sigma[:9] *= 1000  # massive activations
    sigma[90:] *= 1e-6
    assert sp.contraction(sigma, 100, 100).alpha == pytest.approx(1.0, rel=1e-9)
    sigma[9] *= 10
    assert sp.contraction(sigma, 100, 100).alpha > 1.01


def test_numerical_rank_bounds_the_window() -> None:
    n, rows = 100, 1000
    sigma = np.concatenate([np.arange(1, 51) ** -1.0, np.full(50, 0.9 * rows * EPS)])
    fit = sp.contraction(sigma, rows=rows, columns=n)
    assert (fit.n, fit.first, fit.last) == (50, 5, 45)
    assert fit.alpha == pytest.approx(1.0)
    sigma[50:] = 1.1 * rows * EPS
    assert sp.contraction(sigma, rows=rows, columns=n).n == 100


def test_a_rank_that_is_given_bounds_the_window() -> None:
    sigma = np.concatenate([np.arange(1, 51) ** -1.0, np.full(50, 1e-3)])
    assert sp.contraction(sigma, 100, 200).n == 100
    fit = sp.contraction(sigma, 100, 200, rank=50)
    assert (fit.n, fit.first, fit.last) == (50, 5, 45)
    assert fit.alpha == pytest.approx(1.0)
    sigma[60:] = 0.0  # the exact rank is a bound, too
    assert sp.contraction(sigma, 100, 200, rank=80).n == 60
    assert "0 singular values (of 0 above rounding)" in (sp.contraction(sigma, 100, 200, rank=0).reason or "")


ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "columns"), [(300, 64), (40, 200)])
@pytest.mark.parametrize("massive", [False, True])
def test_numerical_rank_does_not_count_what_rounding_adds(
    dtype: torch.dtype, rows: int, columns: int, massive: bool
) -> None:
    """Rows of rank 10, computed in float64 and rounded: the rounding errors have full rank, and are not counted."""
    generator = np.random.default_rng(0)
    scale = np.ones(columns)
    if massive:  # as the massive activations of a language model, in two of its columns
        scale[[3, 7]] = 300.0, 100.0
    exact = torch.from_numpy(generator.normal(size=(rows, 10)) @ generator.normal(size=(10, columns)) * scale)
    rounded = exact.to(dtype)
    assert np.linalg.matrix_rank(rounded.double().numpy()) == min(rows, columns)
    assert sp.numerical_rank(rounded, ROUNDING[dtype]) == 10
    assert sp.numerical_rank(exact, ROUNDING[dtype]) == 10
    # What is no rounding error is counted, small as it is beside a massive column.
    full = torch.from_numpy(generator.normal(size=(rows, columns)) * scale).to(dtype)
    assert sp.numerical_rank(full, ROUNDING[dtype]) == min(rows, columns)


def test_numerical_rank_of_rows_that_occur_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 100, generator=generator)
    rows[:, 5] *= 200
    twice = torch.cat([rows, rows * (1 + 2.0**-22 * torch.randn(30, 100, generator=generator))])
    assert np.linalg.matrix_rank(twice.double().numpy()) == 60
    assert sp.numerical_rank(twice, 2.0**-23) == 30
    assert sp.numerical_rank(twice[torch.randperm(60, generator=generator)], 2.0**-23) == 30
    assert sp.numerical_rank(torch.cat([rows, rows]).bfloat16(), 2.0**-7) == 30
    # A real difference of a hundredth is one.
    other = torch.cat([rows, rows * (1 + 0.01 * torch.randn(30, 100, generator=generator))])
    assert sp.numerical_rank(other, 2.0**-23) == 60


def test_numerical_rank_of_nothing() -> None:
    assert sp.numerical_rank(torch.zeros(0, 5), 2.0**-23) == 0
    assert sp.numerical_rank(torch.zeros(4, 5), 2.0**-23) == 0
    assert sp.numerical_rank(torch.eye(3), 2.0**-23) == 3
    for bad in (math.nan, math.inf):
        assert sp.numerical_rank(torch.eye(3) * bad, 2.0**-23) == 0


@pytest.mark.parametrize("n", [1, 5, 18])
def test_too_few_singular_values_are_said(n: int) -> None:
    fit = sp.contraction(np.arange(1, n + 1) ** -1.0, rows=n, columns=50)
    in_window = sum(0.1 * n <= k <= 0.9 * n for k in range(1, n + 1))
    assert math.isnan(fit.alpha)
    assert math.isnan(fit.r2)
    assert math.isnan(fit.stderr)
    assert fit.reason == f"the window has {in_window} singular values (of {n} above rounding); 16 are needed"


def test_sixteen_values_are_enough_and_the_limit_moves() -> None:
    assert sp.contraction(np.arange(1, 19) ** -1.0, 18, 50).reason is not None
    assert sp.contraction(np.arange(1, 20) ** -1.0, 19, 50).reason is None  # ranks 2 … 17 of 19
    assert sp.contraction(np.arange(1, 19) ** -1.0, 18, 50, min_values=15).alpha == pytest.approx(1.0)


def test_zero_unknown_and_flat_spectra() -> None:
    assert sp.contraction(np.zeros(40), 40, 50).reason == (
        "the window has 0 singular values (of 0 above rounding); 16 are needed"
    )
    assert sp.contraction(np.zeros(0), 0, 50).n == 0
    broken = np.ones(40)
    broken[3] = np.nan
    fit = sp.contraction(broken, 40, 50)
    assert fit.reason == "1 of 40 singular values are not finite"
    assert math.isnan(fit.alpha)
    flat = sp.contraction(np.full(40, 2.0), 40, 50)
    assert flat.alpha == 0.0
    assert math.isnan(flat.r2)
    assert flat.reason == "the spectrum is flat: R² is 0/0"


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
def test_contraction_of_a_matrix_with_a_power_law(shape: tuple[int, int]) -> None:
    H = with_spectrum(5 * np.arange(1, 61) ** -1.3, *shape)
    fit = sp.contraction(sp.singular_values(H), *shape)
    assert fit.alpha == pytest.approx(1.3, rel=1e-9)
    assert fit.n == 60


def test_singular_values_are_accurate_in_the_tail() -> None:
    sigma = np.geomspace(1.0, 1e-8, 40)
    H = with_spectrum(sigma, 120, 40)
    ours = sp.singular_values(H)
    np.testing.assert_allclose(ours, sigma, rtol=1e-6)
    np.testing.assert_allclose(ours, np.linalg.svd(H.numpy(), compute_uv=False), rtol=1e-7)
    gram = np.sqrt(np.abs(np.linalg.eigvalsh((H.T @ H).numpy())))[::-1]
    assert abs(gram[-1] / sigma[-1] - 1) > 1e-3  # the cheap way, for which this test must fail
    single = torch.linalg.svdvals(H.float()).numpy()
    double = sp.singular_values(H.float())
    assert abs(single[-1] / double[-1] - 1) > 1e-3  # so must an SVD in the dtype of the rows
    np.testing.assert_allclose(double, np.linalg.svd(H.float().double().numpy(), compute_uv=False), rtol=1e-7)


@pytest.mark.parametrize(("rows", "columns"), [(900, 128), (128, 900), (200, 200)])
def test_window_is_right_at_condition_1e8_in_any_order_of_rows(rows: int, columns: int) -> None:
    n = min(rows, columns)
    H = with_spectrum(np.geomspace(1.0, 1e-8, n), rows, columns)
    exact = np.linalg.svd(H.numpy(), compute_uv=False)
    window = slice(math.ceil(0.1 * n) - 1, math.floor(0.9 * n))
    ours = sp.singular_values(H)
    np.testing.assert_allclose(ours[window], exact[window], rtol=1e-8)
    shuffled = sp.singular_values(H[torch.randperm(rows, generator=torch.Generator().manual_seed(0))])
    # The order of rows changes rounding: 1e-14 of the largest σ, which at σ_1·1e-8 is 1e-6 relative. So the conductor
    # sorts rows by key: then batches cannot change a bit of the rows' order.
    np.testing.assert_allclose(shuffled, ours, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_singular_values_take_any_float_and_are_not_centred(dtype: torch.dtype) -> None:
    H = (torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    sigma = sp.singular_values(H)
    assert sigma.dtype == np.float64
    np.testing.assert_allclose(sigma, np.linalg.svd(H.double().numpy(), compute_uv=False), rtol=1e-12)
    assert sp.singular_values(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_said(bad: float) -> None:
    H = torch.randn(40, 30)
    H[7, 3] = bad
    sigma = sp.singular_values(H)
    assert np.isnan(sigma).all()
    assert sigma.shape == (30,)
    assert sp.contraction(sigma, 40, 30).reason == "30 of 30 singular values are not finite"
    assert sp.below_rounding_floor(sigma, 2**-7) == 30


def test_svd_that_does_not_converge_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(H: torch.Tensor, **options: object) -> torch.Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    assert np.isnan(sp.singular_values(torch.ones(3, 2))).tolist() == [True, True]


def test_below_rounding_floor() -> None:
    sigma = np.array([0.5, 8.0, 8 * 2.0**-7, 8 * 2.0**-7 * 1.001, 1e-9])
    assert sp.below_rounding_floor(sigma, 2**-7) == 2
    assert sp.below_rounding_floor(sigma, EPS) == 0
    assert sp.below_rounding_floor(np.zeros(3), EPS) == 3
    assert sp.below_rounding_floor(np.zeros(0), EPS) == 0


def test_results_are_frozen() -> None:
    fit = sp.contraction(np.arange(1, 41) ** -1.0, 40, 40)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.alpha = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: sp.singular_values(torch.zeros(3)), r"found \[3\]"),
        (lambda: sp.singular_values(torch.zeros(3, 2, dtype=torch.long)), "int64"),
        (lambda: sp.numerical_rank(torch.zeros(3), 0.1), r"found \[3\]"),
        (lambda: sp.numerical_rank(torch.zeros(3, 2, dtype=torch.long), 0.1), "int64"),
        (lambda: sp.numerical_rank(torch.zeros(3, 2), 0.0), r"torch\.float32, 0\.0"),
        (lambda: sp.contraction(np.ones(5), 6, 7), r"\[6, 7\] matrix; found \[5\]"),
        (lambda: sp.contraction(-np.ones(6), 6, 7), r"found -1\.0"),
        (lambda: sp.contraction(np.ones(6), 6, 7, window=(0.9, 0.1)), r"found \(0\.9, 0\.1\)"),
        (lambda: sp.contraction(np.ones(6), 6, 7, window=(0.0, 0.1)), r"found \(0\.0, 0\.1\)"),
        (lambda: sp.contraction(np.ones(6), 6, 7, min_values=2), "found 2"),
        (lambda: sp.below_rounding_floor(np.ones((2, 2)), 0.1), r"found \[2, 2\]"),
        (lambda: sp.below_rounding_floor(np.ones(2), 0.0), r"and 0\.0"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


def test_known_singular_values_change_no_rank() -> None:
    """Full and not, wide and tall, with massive columns and one of zeros: told from them or counted anew, the same."""
    generator = np.random.default_rng(4)
    for rows, columns, rank in ((60, 20, 20), (20, 60, 20), (60, 20, 7), (20, 60, 9)):
        for scale in (np.ones(columns), np.where(np.arange(columns) == 3, 300.0, 1.0), np.arange(columns) > 0):
            left, right = generator.normal(size=(rows, rank)), generator.normal(size=(rank, columns))
            H = torch.from_numpy(left @ right * scale).float()
            for eps in (2.0**-23, 2.0**-7):
                assert sp.numerical_rank(H, eps, sp.singular_values(H)) == sp.numerical_rank(H, eps)
