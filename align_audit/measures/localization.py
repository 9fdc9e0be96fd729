"""Sparse localization: which layers' activation shifts predict the target, and how spread a profile is (METHODS §3).

Source: *Alignment is Localized* (arXiv 2510.16167, §4.1), with selection frequencies and a permutation null added: the
shifts of neighbouring layers are strongly collinear, so a single fit is unstable.

Choosing λ anew for every resample is costly, so selection frequencies are those of the LASSO *at the λ of the original
fit*: over bootstrap resamples of the groups (features standardized again), and over permutations of the target as what
that λ selects by chance. Targets are permuted by group: laid out one group behind the other, in another order of the
groups, so that what the pairs of a group have in common stays together. The null of ``cv_r2`` does choose λ anew for each
permutation (from 20 values of the same range, by the same folds): the choice is part of what it is the null of, and at the
fixed λ the permuted targets would be overfitted and look worse than chance.

scikit-learn is imported where it fits: it takes longer to load than everything else of a start.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from align_audit.measures.interval import Value
from align_audit.measures.resampling import Groups

Array = np.ndarray
Folds = list[tuple[Array, Array]]
"""Places of the pairs that are fitted on, and of those that are predicted, for each fold."""

_LAMBDAS = 100
_NULL_LAMBDAS = 20
_LAMBDA_RANGE = 1e-3
"""Smallest λ tried, as a share of the least λ at which every coefficient is zero."""
_UNUSED_SEED = 0
"""Cyclic coordinate descent uses no random numbers, yet without a seed scikit-learn draws from NumPy's global state."""


@dataclass(frozen=True, eq=False)
class LassoFit:
    """A cross-validated LASSO over layers, its stability and its null. NaN (``selected`` empty) with a ``reason``."""

    coefficients: Array
    """``[L]``, in the target's unit per standard deviation of the feature."""
    alpha: float
    """The chosen λ, as scikit-learn scales it: ‖y − Xw‖² / (2N) + λ‖w‖₁."""
    cv_r2: float
    """1 − (mean squared error of cross-validation at λ) / (variance of y); at or below 0 nothing is predicted."""
    selected: tuple[int, ...]
    """Layers with a coefficient that is not zero."""
    selection_frequency: Array
    """``[L]``, in [0, 1]: share of bootstrap resamples of the pairs in which the layer is selected at λ."""
    null_selection_frequency: Array
    """``[L]``, in [0, 1]: share of permutations of the target in which the layer is selected at λ."""
    null_cv_r2: Array
    """``[permutations]``: ``cv_r2`` of the permuted targets, each at its own best λ."""
    reason: str | None = None


def lasso_localization(
    X: Array,
    y: Array,
    folds: int = 5,
    resamples: int = 50,
    permutations: int = 20,
    seed: int = 0,
    groups: Array | None = None,
) -> LassoFit:
    """LASSO of the target on standardized layer features, λ by cross-validation, with stability and null.

    w = argmin ‖y − ȳ − Xw‖² / (2N) + λ‖w‖₁, X standardized to mean 0 and population standard deviation 1. λ is chosen
    by scikit-learn's ``LassoCV`` from 100 values, geometric from max_ℓ |X_ℓᵀ(y − ȳ)| / N down to a thousandth of that,
    over ``folds`` folds of groups of pairs, shuffled with ``seed``; w is then solved for at that λ to a tighter tolerance.
    What selection frequencies and nulls are of is at the head of this module.

    Args:
        X: ``[N, L]``, RMS activation distances.
        y: ``[N]``, margin shifts or patched effects (nats).
        groups: ``[N]``, which pairs belong together; None: none do.

    Returns:
        See :class:`LassoFit`. A feature that is the same for every pair gets coefficient 0. NaN with a reason: fewer
        than 2·folds groups, a value that is not finite, a constant target, or no feature that varies. ``reason`` with
        numbers beside it: the solver had not fully converged.

    Raises:
        ValueError: wrong shapes, ``folds`` below 2, or ``resamples`` or ``permutations`` below 1.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(60, 4))
        >>> fit = lasso_localization(X, 2.0 * X[:, 2], resamples=5, permutations=5)
        >>> int(np.argmax(np.abs(fit.coefficients))), round(fit.cv_r2, 2), float(fit.selection_frequency[2])
        (2, 1.0, 1.0)
    """
    X, y = _checked(X, y, folds, resamples, permutations)
    together = Groups.of(groups, len(y))
    reason = _unfit(X, y, folds, together.count)
    if reason is not None:
        return _no_fit(X.shape[1], permutations, reason)

    standard = _standardize(X)
    cv = _folds(together, folds, seed)
    alpha, cv_r2 = _cross_validated(standard, y, cv, _LAMBDAS, max_iter=10_000)
    coefficients, converged = _solve(standard, y, alpha)
    generator = np.random.default_rng(seed)
    chosen = _selection_frequency(X, y, alpha, together, resamples, generator)
    by_chance, null_cv_r2 = _null(standard, y, alpha, together, cv, permutations, generator)
    selected = tuple(np.flatnonzero(coefficients).tolist())
    loose = "coordinate descent stopped before its tolerance: the coefficients are approximate"
    return LassoFit(coefficients, alpha, cv_r2, selected, chosen, by_chance, null_cv_r2, None if converged else loose)


def center_of_mass(w: Array) -> Value:
    """Mean relative depth of a layer profile: Σ_ℓ ℓ·w_ℓ / Σ_ℓ w_ℓ / (L − 1).

    Args:
        w: ``[L]``, mean block transplants; negative entries count as 0.

    Returns:
        In [0, 1], 0 the first layer and 1 the last. NaN with a reason: no positive entry, one layer, or an entry that
        is not finite.

    Raises:
        ValueError: not one-dimensional or empty.

    Example:
        >>> center_of_mass(np.array([0.0, 1.0, -5.0, 0.0, 1.0])).value
        0.625
    """
    shares, reason = _shares(w)
    if reason is not None:
        return Value.unknown(reason)
    return Value(min(1.0, float(np.arange(len(shares)) @ shares) / (len(shares) - 1)))


def normalized_entropy(w: Array) -> Value:
    """How evenly a layer profile is spread: − Σ_ℓ p_ℓ log p_ℓ / log L, p = w / Σ w.

    Args:
        w: ``[L]``, mean block transplants; negative entries count as 0.

    Returns:
        In [0, 1]: 0 for one layer, 1 for an even spread. NaN with a reason, as :func:`center_of_mass`.

    Raises:
        ValueError: not one-dimensional or empty.

    Example:
        >>> normalized_entropy(np.array([1.0, 1.0, 0.0, 0.0])).value
        0.5
    """
    shares, reason = _shares(w)
    if reason is not None:
        return Value.unknown(reason)
    positive = shares[shares > 0]
    return Value(min(1.0, max(0.0, float(-(positive @ np.log(positive))) / math.log(len(shares)))))


def _shares(w: Array) -> tuple[Array, str | None]:
    w = np.asarray(w, dtype=np.float64)
    if w.ndim != 1 or not len(w):
        raise ValueError(f"expected a layer profile [L]; found shape {list(w.shape)}")
    bad = int((~np.isfinite(w)).sum())
    if bad:
        return w, f"{bad} of {len(w)} layers have a value that is not finite"
    if len(w) == 1:
        return w, "a profile of one layer has no spread"
    w = np.maximum(w, 0.0)
    if not w.max() > 0.0:
        return w, "no layer has a positive value"
    w = w / w.max()
    return w / w.sum(), None


def _folds(groups: Groups, folds: int, seed: int) -> Folds:
    """Groups of pairs in ``folds`` random parts, each of which is predicted from all others."""
    parts = np.array_split(np.random.default_rng([seed, 0xF0]).permutation(groups.count), folds)
    everything = np.arange(groups.count)
    return [(groups.rows(np.setdiff1d(everything, part)), groups.rows(np.sort(part))) for part in parts]


def _checked(X: Array, y: Array, folds: int, resamples: int, permutations: int) -> tuple[Array, Array]:
    """Features and target as float64, where :func:`lasso_localization` can be asked for with these arguments."""
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if X.ndim != 2 or X.shape[1] < 1 or y.shape != (len(X),):
        raise ValueError(f"expected X [N, L] and y [N]; found {list(X.shape)} and {list(y.shape)}")
    if folds < 2 or resamples < 1 or permutations < 1:
        raise ValueError(
            f"expected at least 2 folds, 1 resample and 1 permutation; "
            f"found folds={folds}, resamples={resamples}, permutations={permutations}"
        )
    return X, y


def _no_fit(layers: int, permutations: int, reason: str) -> LassoFit:
    """Every number NaN, for that reason."""
    coefficients, chosen, by_chance = np.full((3, layers), np.nan)
    return LassoFit(coefficients, math.nan, math.nan, (), chosen, by_chance, np.full(permutations, np.nan), reason)


def _unfit(X: Array, y: Array, folds: int, groups: int) -> str | None:
    """Why no fit can be made, if so."""
    if groups < 2 * folds:
        return f"{folds}-fold cross-validation needs at least {2 * folds} independent pairs, found {groups}"
    for name, values in (("features", X), ("targets", y)):
        bad = int((~np.isfinite(values)).sum())
        if bad:
            return f"{bad} of {values.size} {name} are not finite"
    if _constant(y):
        return "the target is the same for every pair"
    if _constant(X).all():
        return "no feature varies over the pairs"
    return None


def _constant(values: Array) -> Array:
    """Columns that do not vary beyond rounding."""
    constant: Array = values.std(axis=0) <= 1e-12 * np.abs(values).max(axis=0)
    return constant


def _standardize(X: Array) -> Array:
    centred = X - X.mean(axis=0)
    constant = _constant(X)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, X.std(axis=0)))


def _cross_validated(X: Array, y: Array, cv: Folds, lambdas: int, max_iter: int) -> tuple[float, float]:
    """The best λ and its cross-validated R². Fits at far smaller λ may stop early: they lose the comparison anyway."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV

    largest = float(np.abs(X.T @ (y - y.mean())).max()) / len(y)
    largest = max(largest, 1e-9 * float(y.std()))  # features that have nothing to do with the target, to the bit
    grid = np.geomspace(largest, largest * _LAMBDA_RANGE, lambdas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LassoCV(alphas=grid, cv=cv, max_iter=max_iter, random_state=_UNUSED_SEED).fit(X, y)
    error = model.mse_path_.mean(axis=1).min()
    return float(model.alpha_), float(1.0 - error / y.var())


def _solve(X: Array, y: Array, alpha: float) -> tuple[Array, bool]:
    """Coefficients at λ, iterating longer until they converge; and whether they did."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    for max_iter in (10_000, 100_000, 1_000_000):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = Lasso(alpha, tol=1e-8, max_iter=max_iter, random_state=_UNUSED_SEED).fit(X, y)
        if not any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            return model.coef_, True
    return model.coef_, False


def _selection_frequency(
    X: Array, y: Array, alpha: float, groups: Groups, resamples: int, generator: np.random.Generator
) -> Array:
    """``[L]``: share of bootstrap resamples of the groups in which λ selects a layer."""
    times = np.zeros(X.shape[1])
    for _ in range(resamples):
        rows = groups.rows(generator.integers(0, groups.count, size=groups.count))
        times += _selected_at(_standardize(X[rows]), y[rows], alpha)
    return times / resamples


def _null(
    X: Array, y: Array, alpha: float, groups: Groups, cv: Folds, permutations: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Share of permutations of the target in which λ selects a layer, ``[L]``, and the R² of each, ``[permutations]``."""
    in_order = groups.rows(np.arange(groups.count))
    times, cv_r2 = np.zeros(X.shape[1]), np.empty(permutations)
    for index in range(permutations):
        permuted = np.empty_like(y)
        permuted[in_order] = y[groups.rows(generator.permutation(groups.count))]
        times += _selected_at(X, permuted, alpha)
        cv_r2[index] = _cross_validated(X, permuted, cv, _NULL_LAMBDAS, max_iter=1_000)[1]
    return times / permutations, cv_r2


def _selected_at(X: Array, y: Array, alpha: float) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = Lasso(alpha, tol=1e-6, max_iter=10_000, random_state=_UNUSED_SEED).fit(X, y)
    selected: Array = model.coef_ != 0.0
    return selected
