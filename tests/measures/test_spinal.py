"""SPINAL's scores against plain loops and closed forms."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_audit.measures import spinal


def paths(L: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return tuple(generator.gamma(2.0, size=n) for n in (L, L, L - 1, L - 1))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("L", "fraction", "first"),
    [
        (30, None, 20),
        (1, None, 0),
        (3, None, 0),
        (4, None, 0),
        (5, None, 1),
        (12, None, 8),
        (13, None, 8),
        (32, None, 21),
        (30, 1 / 3, 20),
        (100, 0.07, 93),
        (10, 0.3, 7),
        (10, 0.31, 6),
        (5, 0.01, 4),
        (5, 1.0, 0),
        (1, 0.5, 0),
    ],
)
def test_terminal_layers(L: int, fraction: float | None, first: int) -> None:
    assert spinal.terminal_layers(L, fraction) == tuple(range(first, L))


def test_delta_align_equals_a_plain_loop() -> None:
    alpha_pi, alpha_rho, transport_pi, transport_rho = paths(12, seed=1)
    terminal = spinal.terminal_layers(12)
    assert terminal == (8, 9, 10, 11)
    gained = sum(alpha_pi[ell] - alpha_rho[ell] for ell in (8, 9, 10, 11)) / 4
    moved = sum(transport_pi[ell] - transport_rho[ell] for ell in (8, 9, 10)) / 3
    value, reason = spinal.delta_align(alpha_pi, alpha_rho, transport_pi, transport_rho, terminal)
    assert value == pytest.approx(gained - moved, rel=1e-12)
    assert reason is None


def test_delta_align_of_identical_models_is_exactly_zero() -> None:
    alpha, _, transport, _ = paths(9, seed=2)
    assert spinal.delta_align(alpha, alpha, transport, transport, (6, 7, 8)) == (0.0, None)


def test_delta_align_rises_with_contraction_and_falls_with_transport() -> None:
    alpha, transport = np.ones(6), np.ones(5)
    terminal = (2, 3, 4, 5)
    assert spinal.delta_align(alpha + 0.5, alpha, transport, transport, terminal).value == pytest.approx(0.5)
    assert spinal.delta_align(alpha, alpha, transport + 0.5, transport, terminal).value == pytest.approx(-0.5)


def test_delta_align_ignores_unknowns_outside_the_block_only() -> None:
    alpha_pi, alpha_rho, transport_pi, transport_rho = paths(8, seed=3)
    alpha_pi[1] = np.nan
    assert math.isfinite(spinal.delta_align(alpha_pi, alpha_rho, transport_pi, transport_rho, (5, 6, 7)).value)
    alpha_pi[6] = np.nan
    value, reason = spinal.delta_align(alpha_pi, alpha_rho, transport_pi, transport_rho, (5, 6, 7))
    assert math.isnan(value)
    assert reason == "contraction is unknown at layers [6] of the terminal block"
    alpha_pi[6] = 1.0
    transport_rho[5] = np.nan
    reason = spinal.delta_align(alpha_pi, alpha_rho, transport_pi, transport_rho, (5, 6, 7)).reason
    assert reason == "transport is unknown at layers [5] of the terminal block"


@pytest.mark.parametrize(("L", "terminal"), [(1, (0,)), (6, (5,))])
def test_delta_align_needs_a_layer_below_the_last(L: int, terminal: tuple[int, ...]) -> None:
    value, reason = spinal.delta_align(np.ones(L), np.ones(L), np.ones(L - 1), np.ones(L - 1), terminal)
    assert math.isnan(value)
    assert reason == "the terminal block has no layer below the last, hence no transport"


def test_coherence_equals_a_plain_loop() -> None:
    alpha, alpha_ref, transport, transport_ref = paths(13, seed=4)
    scale = []
    for values in (alpha_ref, transport_ref):
        mean = sum(values) / len(values)
        scale.append(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)))
    path = [(alpha[ell] / scale[0], transport[ell] / scale[1]) for ell in range(8, 12)]
    turns = []
    for before, here, after in zip(path, path[1:], path[2:], strict=False):
        turns.append(math.hypot(*(a - 2 * h + b for b, h, a in zip(before, here, after, strict=True))))
    expected = 1 / (1 + sum(turns) / len(turns))
    value, reason = spinal.coherence(alpha, transport, alpha_ref, transport_ref, spinal.terminal_layers(13))
    assert value == pytest.approx(expected, rel=1e-12)
    assert reason is None


def test_coherence_of_a_straight_path_is_one() -> None:
    line = np.linspace(1.0, 2.0, 9)
    assert spinal.coherence(line, line[:8], line, line[:8], (4, 5, 6, 7, 8)).value == pytest.approx(1.0, abs=1e-12)
    assert spinal.coherence(np.full(9, 0.3), np.full(8, 0.7), line, line[:8], (4, 5, 6, 7, 8)) == (1.0, None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-5, 5))
def test_coherence_is_bounded_and_free_of_units(seed: int, scale: float, shift: float) -> None:
    alpha, alpha_ref, transport, transport_ref = paths(9, seed)
    terminal = (4, 5, 6, 7, 8)
    value = spinal.coherence(alpha, transport, alpha_ref, transport_ref, terminal).value
    assert 0.0 < value < 1.0
    rescaled = spinal.coherence(scale * alpha + shift, transport, scale * alpha_ref + shift, transport_ref, terminal)
    assert rescaled.value == pytest.approx(value, rel=1e-9)
    rougher = spinal.coherence(2 * alpha, 2 * transport, alpha_ref, transport_ref, terminal).value
    assert 1 / rougher - 1 == pytest.approx(2 * (1 / value - 1), rel=1e-9)


def test_coherence_says_why_it_is_unknown() -> None:
    alpha, alpha_ref, transport, transport_ref = paths(9, seed=5)

    def reason(
        alpha: np.ndarray = alpha,
        transport: np.ndarray = transport,
        alpha_ref: np.ndarray = alpha_ref,
        transport_ref: np.ndarray = transport_ref,
        terminal: tuple[int, ...] = (5, 6, 7, 8),
    ) -> str | None:
        value, why = spinal.coherence(alpha, transport, alpha_ref, transport_ref, terminal)
        assert math.isnan(value) == (why is not None)
        return why

    assert reason() is None
    assert "has 2 layers" in str(reason(terminal=(6, 7, 8)))
    assert reason(alpha_ref=np.full(9, 0.1)) == (
        "the reference's contraction is the same at every layer, so it gives no scale"
    )
    assert "transport is the same" in str(reason(transport_ref=np.full(8, 0.1)))
    assert "transport is the same" in str(reason(transport_ref=np.zeros(8)))
    rounding = np.array([0.3] * 8 + [0.1 + 0.2])
    assert rounding.std() > 0
    assert "contraction is the same" in str(reason(alpha_ref=rounding))
    missing = alpha.copy()
    missing[8] = np.nan
    assert reason(alpha=missing) is None  # the last layer has no transport and is no point of the path
    missing[5] = np.nan
    assert reason(alpha=missing) == "contraction is unknown at layers [5] of the terminal block"
    missing = transport_ref.copy()
    missing[0] = np.nan
    assert reason(transport_ref=missing) == "the reference's transport is unknown at layers [0], hence its spread too"


def test_gradient_share() -> None:
    norms = np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 5.0], [7.0, 0.0, 0.0, 0.0], [1e308, 1e308, 1e308, 1e308]])
    assert spinal.gradient_share(norms, (2, 3)).tolist() == pytest.approx([0.7, 1.0, 0.0, 0.5])
    unknown = np.array([[0.0, 0.0], [1.0, np.nan], [np.inf, 1.0], [1.0, 3.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = spinal.gradient_share(unknown, (1,))
    assert shares.tolist() == pytest.approx([np.nan, np.nan, np.nan, 0.75], nan_ok=True)
    # A factor per pair cancels, as β and the loss type do.
    np.testing.assert_allclose(spinal.gradient_share(1e-320 * 1e20 * norms[:3], (2, 3)), [0.7, 1.0, 0.0], rtol=1e-9)
    assert spinal.gradient_share(np.zeros((0, 3)), (2,)).shape == (0,)


def test_spinal_score() -> None:
    assert spinal.spinal_score(0.5, 0.25, 0.125, (2.0, 4.0, 8.0)) == (3.0, None)
    assert spinal.spinal_score(0.5, 0.25, 0.125) == (0.875, None)
    value, reason = spinal.spinal_score(math.nan, 0.25, math.nan)
    assert math.isnan(value)
    assert reason == "unknown: delta_align, gradient_concentration"
    assert spinal.spinal_score(0.5, 0.25, math.nan, (1.0, 1.0, 0.0)) == (0.75, None)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: spinal.terminal_layers(0), "L=0"),
        (lambda: spinal.terminal_layers(5, 0.0), r"found 0\.0"),
        (lambda: spinal.terminal_layers(5, 1.5), r"found 1\.5"),
        (
            lambda: spinal.delta_align(np.ones(4), np.ones(4), np.ones(4), np.ones(3), (3,)),
            r"policy: .* found \[4\] and \[4\]",
        ),
        (lambda: spinal.delta_align(np.ones(4), np.ones(5), np.ones(3), np.ones(4), (3,)), "found 4 and 5"),
        (lambda: spinal.delta_align(np.ones(4), np.ones(4), np.ones(3), np.ones(3), (1, 3)), r"found \[1, 3\]"),
        (lambda: spinal.delta_align(np.ones(4), np.ones(4), np.ones(3), np.ones(3), (3, 4)), r"found \[3, 4\]"),
        (lambda: spinal.delta_align(np.ones(4), np.ones(4), np.ones(3), np.ones(3), ()), r"found \[\]"),
        (lambda: spinal.gradient_share(np.ones(4), (3,)), r"found shape \[4\]"),
        (lambda: spinal.gradient_share(-np.ones((2, 4)), (3,)), r"found -1\.0"),
        (lambda: spinal.spinal_score(1.0, 1.0, 1.0, (1.0, 1.0)), r"found \(1\.0, 1\.0\)"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(call: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()  # type: ignore[operator]
