"""LASSO over layers on planted signals and on noise; concentration of profiles against closed forms."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import linear_model
from sklearn.linear_model import Lasso

from align_audit.measures import localization as loc

INFORMATIVE = 4


def correlated(n: int, L: int, seed: int, rho: float = 0.8) -> np.ndarray:
    """Features of layers that follow each other, as activation distances do."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, L))
    for layer in range(1, L):
        X[:, layer] = rho * X[:, layer - 1] + math.sqrt(1 - rho**2) * X[:, layer]
    return X * np.linspace(0.5, 3.0, L) + 5.0


def planted(n: int = 64, L: int = 10, seed: int = 0, rho: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    X = correlated(n, L, seed, rho)
    noise = np.random.default_rng(seed + 1000).normal(size=n)
    return X, 2.0 * (X[:, INFORMATIVE] - 5.0) + 0.5 * noise


def folds_of(groups: list[int], folds: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups in random parts of about one size: what is fitted on, and what is predicted."""
    names = sorted(set(groups))
    order = np.random.default_rng([seed, 0xF0]).permutation(len(names)).tolist()
    parts, begin = [], 0
    for part in range(folds):
        end = begin + len(names) // folds + (part < len(names) % folds)
        inside = np.isin(groups, [names[place] for place in order[begin:end]])
        parts.append((np.flatnonzero(~inside), np.flatnonzero(inside)))
        begin = end
    return parts


@pytest.fixture(scope="module")
def fit() -> loc.LassoFit:
    return loc.lasso_localization(*planted(), seed=0)


def test_planted_layer_is_found_among_correlated_ones(fit: loc.LassoFit) -> None:
    assert int(np.argmax(np.abs(fit.coefficients))) == INFORMATIVE
    assert INFORMATIVE in fit.selected
    assert fit.selection_frequency[INFORMATIVE] == 1.0
    assert np.delete(fit.selection_frequency, INFORMATIVE).max() < 1.0
    assert fit.cv_r2 > 0.8
    assert fit.null_cv_r2.max() < 0.3
    assert fit.cv_r2 > fit.null_cv_r2.max()
    assert fit.reason is None


def test_noise_is_not_found() -> None:
    scores, nulls = [], []
    for seed in range(6):
        y = np.random.default_rng(seed + 77).normal(size=64)
        noise = loc.lasso_localization(correlated(64, 10, seed), y, resamples=5, permutations=10, seed=seed)
        scores.append(noise.cv_r2)
        nulls.extend(noise.null_cv_r2)
    assert abs(np.mean(nulls)) < 0.08
    assert abs(np.mean(scores)) < 0.12
    # A null that is fair: scores of noise look like their own null.
    assert np.quantile(nulls, 0.05) - 0.1 < np.mean(scores) < np.quantile(nulls, 0.95) + 0.1


def test_coefficients_satisfy_the_optimality_conditions(fit: loc.LassoFit) -> None:
    X, y = planted()
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    gradient = Z.T @ (y - y.mean() - Z @ fit.coefficients) / len(y)
    on = np.array(fit.selected)
    np.testing.assert_allclose(gradient[on], fit.alpha * np.sign(fit.coefficients[on]), rtol=1e-3)
    assert (np.abs(gradient) <= fit.alpha * (1 + 1e-3)).all()
    assert fit.selected == tuple(np.flatnonzero(fit.coefficients))
    assert 0 < len(fit.selected) < 10


def test_lambda_and_score_equal_a_plain_double_loop(fit: loc.LassoFit) -> None:
    X, y = planted()
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    largest = max(abs(sum(Z[i, layer] * (y[i] - y.mean()) for i in range(64))) / 64 for layer in range(10))
    grid = [largest * 1e-3 ** (step / 99) for step in range(100)]
    errors = []
    for alpha in grid:
        fold_errors = []
        for train, test in folds_of(list(range(64))):
            model = Lasso(alpha, max_iter=100_000).fit(Z[train], y[train])
            fold_errors.append(np.mean((model.predict(Z[test]) - y[test]) ** 2))
        errors.append(np.mean(fold_errors))
    best = int(np.argmin(errors))
    assert fit.alpha == pytest.approx(grid[best], rel=0.2)  # the valley is flat: its neighbours will do
    assert fit.cv_r2 == pytest.approx(1 - errors[best] / y.var(), abs=1e-3)


def test_frequencies_are_those_at_the_chosen_lambda(fit: loc.LassoFit) -> None:
    X, y = planted()
    generator = np.random.default_rng(0)

    def selected(X: np.ndarray, y: np.ndarray) -> np.ndarray:
        Z = (X - X.mean(axis=0)) / X.std(axis=0)
        return Lasso(fit.alpha, tol=1e-6, max_iter=10_000).fit(Z, y).coef_ != 0

    chosen = np.zeros(10)
    for _ in range(50):
        rows = generator.integers(0, 64, size=64)
        chosen += selected(X[rows], y[rows])
    np.testing.assert_array_equal(fit.selection_frequency, chosen / 50)
    by_chance = np.mean([selected(X, generator.permutation(y)) for _ in range(20)], axis=0)
    np.testing.assert_array_equal(fit.null_selection_frequency, by_chance)
    assert fit.null_cv_r2.shape == (20,)
    assert len(set(fit.null_cv_r2.tolist())) > 1


def test_folds_are_of_whole_groups() -> None:
    groups = np.random.default_rng(0).integers(0, 13, size=40)
    parts = loc._folds(loc.Groups.of(groups, 40), 5, 3)
    assert sorted(place for _, test in parts for place in test.tolist()) == list(range(40))
    for (train, test), (expected_train, expected_test) in zip(parts, folds_of(groups.tolist(), 5, 3), strict=True):
        assert not set(groups[train]) & set(groups[test])
        assert sorted(train.tolist()) == expected_train.tolist()
        assert sorted(test.tolist()) == expected_test.tolist()


def test_resamples_and_permutations_are_of_groups() -> None:
    X, y = planted(n=60, L=6)
    groups = np.random.default_rng(1).permutation(np.resize(np.arange(23), 60))
    fit = loc.lasso_localization(X, y, resamples=20, permutations=10, seed=4, groups=groups)
    members = [np.flatnonzero(groups == group) for group in range(23)]
    in_order = np.concatenate(members)
    generator = np.random.default_rng(4)

    def selected(X: np.ndarray, y: np.ndarray) -> np.ndarray:
        Z = (X - X.mean(axis=0)) / X.std(axis=0)
        return Lasso(fit.alpha, tol=1e-6, max_iter=10_000).fit(Z, y).coef_ != 0

    chosen = np.zeros(6)
    for _ in range(20):
        rows = np.concatenate([members[group] for group in generator.integers(0, 23, size=23)])
        chosen += selected(X[rows], y[rows])
    np.testing.assert_array_equal(fit.selection_frequency, chosen / 20)
    by_chance = np.zeros(6)
    for _ in range(10):
        permuted = np.empty(60)
        permuted[in_order] = y[np.concatenate([members[group] for group in generator.permutation(23)])]
        by_chance += selected(X, permuted)
    np.testing.assert_array_equal(fit.null_selection_frequency, by_chance / 10)


def test_copies_of_pairs_are_not_predicted_from_themselves() -> None:
    """Noise, each pair eight times: across folds of single pairs a copy would predict the others."""
    y = np.random.default_rng(2).normal(size=16)
    X = np.random.default_rng(3).normal(size=(16, 10))
    copies = np.repeat(X, 8, axis=0), np.repeat(y, 8)
    as_groups = loc.lasso_localization(*copies, resamples=1, permutations=1, groups=np.repeat(np.arange(16), 8))
    as_pairs = loc.lasso_localization(*copies, resamples=1, permutations=1)
    assert as_pairs.cv_r2 > 0.3
    assert as_groups.cv_r2 < 0.1
    few = loc.lasso_localization(*copies, groups=np.repeat(np.arange(16), 8) // 2)
    assert few.reason == "5-fold cross-validation needs at least 10 independent pairs, found 8"


def test_units_do_not_matter_and_the_seed_decides(fit: loc.LassoFit) -> None:
    X, y = planted()
    again = loc.lasso_localization(1e-6 * X, 1e3 * y, seed=0)
    np.testing.assert_allclose(again.coefficients, 1e3 * fit.coefficients, rtol=1e-4, atol=1e-6)
    assert again.cv_r2 == pytest.approx(fit.cv_r2, rel=1e-6)
    np.testing.assert_array_equal(again.selection_frequency, fit.selection_frequency)
    other = loc.lasso_localization(X, y, resamples=50, permutations=1, seed=1)
    assert not np.array_equal(other.selection_frequency, fit.selection_frequency)


def test_neighbours_share_the_selection_when_they_are_nearly_equal() -> None:
    X, y = planted(rho=0.999)
    fit = loc.lasso_localization(X, y, resamples=30, permutations=2)
    assert fit.cv_r2 > 0.8
    assert ((fit.selection_frequency > 0.05) & (fit.selection_frequency < 1.0)).sum() >= 2


def test_no_global_state_and_no_warnings_leak(capfd: pytest.CaptureFixture[str]) -> None:
    X, _ = planted(n=24, L=12, rho=0.9999)
    y = np.random.default_rng(3).normal(size=24)
    X[:, 3] = 7.0
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = loc.lasso_localization(X, y, resamples=3, permutations=2)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert fit.coefficients[3] == 0.0
    assert fit.selection_frequency[3] == 0.0
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_solver_iterates_longer_until_it_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = linear_model.Lasso

    def impatient(alpha: float, tol: float, max_iter: int, random_state: int) -> Lasso:
        tried.append(max_iter)
        return real(alpha, tol=tol, max_iter=1 if max_iter < limit else max_iter, random_state=random_state)

    X, y = planted(rho=0.99)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    monkeypatch.setattr(linear_model, "Lasso", impatient)
    limit = 100_000
    coefficients, converged = loc._solve(Z, y, 0.01)
    assert converged
    assert tried == [10_000, 100_000]
    limit = 10**9
    approximate, converged = loc._solve(Z, y, 0.01)
    assert not converged
    assert not np.array_equal(coefficients, approximate)
    fit = loc.lasso_localization(X, y, resamples=1, permutations=1)
    assert fit.reason == "coordinate descent stopped before its tolerance: the coefficients are approximate"
    assert np.isfinite(fit.coefficients).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda X, y: (X[:9], y[:9]), "5-fold cross-validation needs at least 10 independent pairs, found 9"),
        (lambda X, y: (X, np.full(len(y), 0.1)), "the target is the same for every pair"),
        (lambda X, y: (0 * X, 0 * y), "the target is the same for every pair"),
        (lambda X, y: (np.full_like(X, 0.1), y), "no feature varies over the pairs"),
        (
            lambda X, y: (np.where(np.arange(X.size).reshape(X.shape) == 32, np.nan, X), y),
            "1 of 640 features are not finite",
        ),
        (lambda X, y: (X, np.where(y == y[3], np.inf, y)), "1 of 64 targets are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(change: object, reason: str) -> None:
    X, y = change(*planted())  # type: ignore[operator]
    fit = loc.lasso_localization(X, y, permutations=7)
    assert fit.reason == reason
    for array in (fit.coefficients, fit.selection_frequency, fit.null_selection_frequency):
        assert array.shape == (10,)
        assert np.isnan(array).all()
    assert fit.null_cv_r2.shape == (7,)
    assert np.isnan(fit.null_cv_r2).all()
    assert math.isnan(fit.alpha)
    assert math.isnan(fit.cv_r2)
    assert fit.selected == ()


def test_ten_pairs_and_one_layer_are_enough() -> None:
    X, y = planted(n=10, L=5)
    fit = loc.lasso_localization(X[:, 4:], y, resamples=3, permutations=3)
    assert fit.reason is None
    assert fit.selected == (0,)


def test_center_of_mass() -> None:
    assert loc.center_of_mass(np.array([0.0, 0.0, 5.0])) == (1.0, None)
    assert loc.center_of_mass(np.array([5.0, -3.0, 0.0])) == (0.0, None)
    assert loc.center_of_mass(np.array([1.0, 0.0, 3.0])).value == pytest.approx(0.75)
    for extreme in (1e-320, 1e308):
        assert loc.center_of_mass(np.full(7, extreme)).value == pytest.approx(0.5, rel=1e-3)


def test_normalized_entropy() -> None:
    assert loc.normalized_entropy(np.array([0.0, 4.0, -9.0, 0.0])) == (0.0, None)
    assert loc.normalized_entropy(np.full(5, 0.3)).value == pytest.approx(1.0)
    p = np.array([0.5, 0.25, 0.25])
    assert loc.normalized_entropy(8 * p).value == pytest.approx(-sum(p * np.log(p)) / math.log(3))


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(-10, 10, width=32)), st.floats(1e-3, 1e3))
def test_concentration_is_bounded_and_free_of_units(w: np.ndarray, scale: float) -> None:
    for measure in (loc.center_of_mass, loc.normalized_entropy):
        value, reason = measure(w)
        if (w <= 0).all():
            assert math.isnan(value)
            assert reason == "no layer has a positive value"
            continue
        assert 0.0 <= value <= 1.0
        assert measure(scale * w).value == pytest.approx(value, abs=1e-9)
    if (w > 0).any():
        assert loc.center_of_mass(w[::-1]).value == pytest.approx(1 - loc.center_of_mass(w).value, abs=1e-9)
        assert loc.normalized_entropy(w[::-1]).value == pytest.approx(loc.normalized_entropy(w).value, abs=1e-9)


@pytest.mark.parametrize("measure", [loc.center_of_mass, loc.normalized_entropy])
def test_concentration_says_why_it_is_unknown(measure: object) -> None:
    for w, reason in (
        (np.zeros(4), "no layer has a positive value"),
        (np.array([2.0]), "a profile of one layer has no spread"),
        (np.array([2.0, np.nan]), "1 of 2 layers have a value that is not finite"),
    ):
        value, why = measure(w)  # type: ignore[operator]
        assert math.isnan(value)
        assert why == reason


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: loc.lasso_localization(np.ones((12, 2)), np.ones(11)), r"found \[12, 2\] and \[11\]"),
        (lambda: loc.lasso_localization(np.ones(12), np.ones(12)), r"found \[12\] and \[12\]"),
        (lambda: loc.lasso_localization(np.ones((12, 2)), np.ones(12), folds=1), "folds=1"),
        (lambda: loc.lasso_localization(np.ones((12, 2)), np.ones(12), resamples=0), "resamples=0"),
        (lambda: loc.lasso_localization(np.ones((12, 2)), np.ones(12), permutations=0), "permutations=0"),
        (lambda: loc.center_of_mass(np.zeros((2, 2))), r"found shape \[2, 2\]"),
        (lambda: loc.normalized_entropy(np.zeros(0)), r"found shape \[0\]"),
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]


def test_features_that_have_nothing_to_do_with_the_target_to_the_bit() -> None:
    """The largest λ is 0 then, and a path of λ has nowhere to begin."""
    X = np.array([[1.0], [1.0], [-1.0], [-1.0]] * 8)
    y = np.array([1.0, -1.0, 1.0, -1.0] * 8)
    fit = loc.lasso_localization(X, y, folds=4, resamples=2, permutations=2)
    assert list(fit.coefficients) == [0.0]
    assert fit.cv_r2 <= 0.0
