"""Fisher–Rao distance against closed forms and 60-digit arithmetic."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from align_audit.measures import transport
from align_audit.measures.transport import (
    TransportAccumulator,
    fisher_rao_distance,
    transport_distances,
)

LOGITS = hnp.arrays(np.float64, (3, 7), elements=st.floats(-40, 40))


def reference(p: torch.Tensor, q: torch.Tensor) -> float:
    """2·arccos Σ√(pq) of two logit rows in 60 digits."""
    with mpmath.workdps(60):

        def softmax(row: torch.Tensor) -> list[mpmath.mpf]:
            weights = [mpmath.exp(mpmath.mpf(x)) if x > -math.inf else mpmath.mpf(0) for x in row.double().tolist()]
            return [weight / sum(weights) for weight in weights]

        coefficient = sum(mpmath.sqrt(a * b) for a, b in zip(softmax(p), softmax(q), strict=True))
        return float(2 * mpmath.acos(min(coefficient, mpmath.mpf(1))))


def test_known_distributions() -> None:
    p, q = (
        torch.tensor(rows, dtype=torch.float64).log()
        for rows in ([[0.5, 0.5], [0.36, 0.64], [1.0, 0.0]], [[1.0, 0.0], [0.64, 0.36], [0.0, 1.0]])
    )
    expected = [math.pi / 2, 2 * math.acos(0.96), math.pi]
    assert fisher_rao_distance(p, q).tolist() == pytest.approx(expected, rel=1e-13)
    # Uniform over V against uniform over the first half: BC = √½.
    whole, half = torch.zeros(1, 8), torch.zeros(1, 8)
    half[:, 4:] = -math.inf
    assert fisher_rao_distance(whole, half).item() == pytest.approx(math.pi / 2, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1e-2, 0.5, 5.0])
def test_relative_accuracy_at_every_size(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = (4 * torch.randn(3, 50, generator=generator, dtype=torch.float64)).to(dtype)
    p = (q.double() + scale * torch.randn(3, 50, generator=generator, dtype=torch.float64)).to(dtype)
    distances = fisher_rao_distance(p, q)
    assert distances.dtype == torch.float64
    for row in range(3):
        exact = reference(p[row], q[row])
        assert distances[row].item() == pytest.approx(exact, rel=1e-11, abs=1e-24)


def test_arccos_would_not_do() -> None:
    q = torch.linspace(-2, 2, 50, dtype=torch.float64)[None]
    p = q + 1e-9 * torch.sin(torch.arange(50.0, dtype=torch.float64))[None]
    exact = reference(p[0], q[0])
    coefficient = (p.softmax(-1) * q.softmax(-1)).sqrt().sum().clamp(max=1.0)
    assert abs(2 * torch.acos(coefficient).item() - exact) > 0.5 * exact
    assert fisher_rao_distance(p, q).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("shift", "masked"), [(8.0, 0), (-64.0, 0), (0.0, 9), (8.0, 9)])
def test_relative_accuracy_survives_a_shift_and_masked_tokens(shift: float, masked: int) -> None:
    generator = torch.Generator().manual_seed(2)
    # On grids, so that adding shift and perturbation does not round.
    q = torch.randint(-(2**22), 2**22, (1, 50), generator=generator).double() / 2**20
    p = q + shift + torch.randint(-8, 9, (1, 50), generator=generator).double() / 2**42
    p[:, :masked] = q[:, :masked] = -math.inf
    assert fisher_rao_distance(p, q).item() == pytest.approx(reference(p[0], q[0]), rel=1e-9, abs=0.0)


def test_many_entries_and_one_large_difference() -> None:
    q = torch.zeros(1, 20, dtype=torch.float64)
    q[0, 3] = -30.0
    p = q.clone()
    p[0, 3] = -25.0  # beyond the region of small differences, at a tiny probability
    assert fisher_rao_distance(p, q).item() == pytest.approx(reference(p[0], q[0]), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_identical_logits_are_exactly_zero(dtype: torch.dtype) -> None:
    logits = (10 * torch.randn(4, 33, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[0, :5] = -math.inf
    assert fisher_rao_distance(logits, logits.clone()).tolist() == [0.0] * 4


@settings(max_examples=40, deadline=None)
@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_metric_properties(a: np.ndarray, b: np.ndarray, shift: float) -> None:
    p, q = torch.from_numpy(a), torch.from_numpy(b)
    d = fisher_rao_distance(p, q)
    assert ((d >= 0) & (d <= math.pi)).all()
    torch.testing.assert_close(d, fisher_rao_distance(q, p), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(d, fisher_rao_distance(p + shift, q), rtol=1e-9, atol=1e-13)
    order = torch.from_numpy(np.random.default_rng(0).permutation(7))
    torch.testing.assert_close(d, fisher_rao_distance(p[:, order], q[:, order]), rtol=1e-9, atol=1e-13)
    middle = torch.zeros(3, 7, dtype=torch.float64)
    assert (d <= fisher_rao_distance(p, middle) + fisher_rao_distance(middle, q) + 1e-12).all()


def test_disjoint_supports_do_not_exceed_pi() -> None:
    p, q = torch.full((1, 6), -math.inf), torch.full((1, 6), -math.inf)
    p[0, :3], q[0, 3:] = torch.tensor([0.1, 0.7, -3.0]), torch.tensor([2.0, 0.3, 1.0])
    assert fisher_rao_distance(p, q).item() == pytest.approx(math.pi, rel=1e-15)
    assert fisher_rao_distance(p, q).item() <= math.pi


def test_rows_that_are_no_distribution_are_unknown_and_alone() -> None:
    p = torch.zeros(5, 3)
    q = torch.ones(5, 3) * torch.tensor([0.0, 1.0, 2.0])
    p[0, 1], p[1, 1], p[2] = math.nan, math.inf, -math.inf
    d = fisher_rao_distance(p, q)
    assert d[:3].isnan().all()
    assert d[3:].tolist() == pytest.approx([reference(p[3], q[3])] * 2)
    assert fisher_rao_distance(p[2:3], p[2:3]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(11, 9, generator=generator, dtype=dtype)
    p = q + torch.tensor([2.0, 1e-2] * 5 + [2.0])[:, None] * torch.randn(11, 9, generator=generator, dtype=dtype)
    whole, walk = fisher_rao_distance(p, q), transport_distances([p, q])
    sizes, roots = [], []
    real, real_root = transport._distance, transport._root
    monkeypatch.setattr(transport, "_CHUNK_BYTES", {"cpu": 4 * 9 * dtype.itemsize})
    monkeypatch.setattr(transport, "_distance", lambda p, *rest: (sizes.append(len(p.top)), real(p, *rest))[1])
    monkeypatch.setattr(transport, "_root", lambda x, *rest: (roots.append(len(x)), real_root(x, *rest))[1])
    torch.testing.assert_close(
        transport_distances([p, q]), walk, rtol=1e-7 if dtype == torch.float32 else 1e-14, atol=0
    )
    assert sizes == [4, 4, 3]
    assert roots == [4, 4, 3, 4, 4, 4, 4, 3, 3]  # the lower layer's; then the upper one's and the lower one's again
    torch.testing.assert_close(fisher_rao_distance(p, q), whole, rtol=1e-14, atol=0.0)


def test_logits_of_a_narrow_dtype_are_widened_before_they_are_subtracted() -> None:
    """The difference of two bfloat16 is seldom one itself: rounded to it, it would change the distance by 4e-4 here."""
    p = torch.tensor([[0.01, -0.3, 0.7, 1.1]], dtype=torch.bfloat16)
    q = torch.tensor([[0.5, -0.29, 0.71, 1.4]], dtype=torch.bfloat16)
    assert reference(p[0], q[0]) < 2 * transport._NEAR
    assert transport_distances([p, q]).item() == pytest.approx(reference(p[0], q[0]), rel=1e-6)


def test_one_accumulator_takes_walks_of_other_sizes() -> None:
    generator = torch.Generator().manual_seed(11)
    gathered, expected = TransportAccumulator(), []
    single, double = torch.float32, torch.float64
    for rows, vocabulary, dtype in ((0, 9, single), (3, 9, single), (7, 9, single), (2, 31, double), (5, 9, single)):
        layers = [torch.randn(rows, vocabulary, generator=generator).to(dtype) for _ in range(3)]
        gathered.update(layers)
        expected.append(transport_distances(layers))
    torch.testing.assert_close(gathered.freeze(), torch.cat(expected), rtol=5e-7, atol=0.0)


def test_float32_walk_in_a_tail() -> None:
    """The worst that is known: one token has most of the probability, and a tail of tokens that all round alike moves."""
    worst = 0.0
    for vocabulary in (2_000, 20_000, 150_000):
        for depth in torch.linspace(14.0, 18.0, 9).tolist():
            top = 0.37 * (depth - 15.0)  # logits and their distance from the largest one then round differently
            p = torch.full((1, vocabulary), top - depth)
            p[0, 0] = top
            for step in (0.3, 1.0, 1.7, 2.5):
                q = p.clone()
                q[0, 1:] += step
                exact = fisher_rao_distance(p, q).item()
                worst = max(worst, abs(transport_distances([p, q]).item() / exact - 1))
    assert 1e-7 < worst < 2e-6


def plain(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The defining formula in float64; good to 1e-15/d²."""
    return 2 * torch.acos((p.double().softmax(-1) * q.double().softmax(-1)).sqrt().sum(-1).clamp(max=1.0))


def tiny(q: torch.Tensor, direction: torch.Tensor, size: float) -> torch.Tensor:
    """d(q, q + size·direction) to second order in the size: size·std, corrected by the third central moment.

    With K the cumulant generating function of the direction under q, BC = exp(K(½s) − ½K(s)) and BC = cos(½d), so
    d² = s²κ₂ + ½s³κ₃ + O(s⁴).
    """
    weights = q.double().softmax(-1)
    centred = direction.double() - (weights * direction.double()).sum(-1, keepdim=True)
    second, third = (weights * centred**2).sum(-1), (weights * centred**3).sum(-1)
    return (size**2 * second + size**3 * third / 2).sqrt()


@pytest.mark.parametrize("vocabulary", [2, 5, 50, 3000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_float32_walk_meets_one_millionth(vocabulary: int, spread: float) -> None:
    """Against float64 on the same float32 logits: every size of step, shifts common to all tokens, peaked rows."""
    generator = torch.Generator().manual_seed(vocabulary)
    worst = 0.0
    for scale in (1e-6, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 8.0):
        for shift in (0.0, 0.5, 8.0, -60.0):
            p = spread * torch.randn(40, vocabulary, generator=generator)
            q = p + scale * torch.randn(40, vocabulary, generator=generator) + shift
            walked, exact = transport_distances([p, q])[:, 0], fisher_rao_distance(p, q)
            real = exact > 1e-25  # below is the rounding of float64 itself: the rows differ by a shift
            assert (walked[~real] < 1e-25).all()
            if real.any():
                worst = max(worst, float(((walked - exact).abs() / exact)[real].max()))
    assert 1e-9 < worst < 5e-7


def test_walk_equals_the_defining_formula_at_moderate_distances() -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [2 * torch.randn(6, 700, generator=generator, dtype=torch.float64) for _ in range(4)]
    expected = torch.stack([plain(a, b) for a, b in itertools.pairwise(layers)], dim=1)
    assert (expected > 1.0).all()
    torch.testing.assert_close(transport_distances(iter(layers)), expected, rtol=1e-12, atol=0.0)
    narrow = [logits.float() for logits in layers]
    expected = torch.stack([plain(a, b) for a, b in itertools.pairwise(narrow)], dim=1)
    torch.testing.assert_close(transport_distances(narrow), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_walk_equals_the_series_at_tiny_distances(size: float) -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(5, 300, generator=generator, dtype=torch.float64)
    direction = torch.randn(5, 300, generator=generator, dtype=torch.float64)
    p = q + size * direction
    found = transport_distances([q, p])[:, 0]
    torch.testing.assert_close(found, tiny(q, (p - q) / size, size), rtol=max(1e-9, 2 * size**2), atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_walk_of_what_is_special(dtype: torch.dtype) -> None:
    """Identical, disjoint, masked on both sides, and broken rows, all beside an ordinary one."""
    inf, nan = math.inf, math.nan
    p = torch.tensor(
        [[1, 2, 3, 4], [0, 1, -inf, -inf], [1, 2, 3, -inf], [1, 2, 3, -inf], [nan, 0, 0, 0], [inf, 0, 0, 0],
         [-inf] * 4, [0, 1, 2, 3]], dtype=dtype
    )  # fmt: skip
    q = torch.tensor(
        [[1, 2, 3, 4], [-inf, -inf, 0, 1], [1, 2, 3, -inf], [1, 2, 3.0625, -inf], [0, 0, 0, 0], [0, 0, 0, 0],
         [0, 0, 0, 0], [3, 2, 1, 0]], dtype=dtype
    )  # fmt: skip
    found = transport_distances([p, q, q])
    assert found[[0, 2], 0].tolist() == [0.0, 0.0]
    assert found[1, 0].item() == pytest.approx(math.pi, rel=1e-6) and found[1, 0] <= math.pi
    assert found[3, 0].item() == pytest.approx(reference(p[3], q[3]), rel=1e-6)
    assert found[4:7, 0].isnan().all()
    assert found[7, 0].item() == pytest.approx(reference(p[7], q[7]), rel=1e-6)
    assert found[:, 1].tolist() == [0.0] * 8


def test_walk_holds_two_layers_and_blocks_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(7)
    layers = [torch.randn(7, 40, generator=generator) for _ in range(5)]
    held: list[weakref.ref] = []

    def made(rows: slice) -> Iterator[torch.Tensor]:
        for logits in layers:
            assert sum(reference() is not None for reference in held) <= 2
            block = logits[rows].clone()
            held.append(weakref.ref(block))
            yield block
            del block

    gathered = TransportAccumulator()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        gathered.update(made(rows))
    assert len(held) == 15
    assert gathered.freeze().shape == (7, 4)
    torch.testing.assert_close(gathered.freeze(), transport_distances(layers), rtol=1e-6, atol=0.0)
    assert transport_distances(layers[:1]).shape == (7, 0)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: transport_distances([]), "found none"),
        (lambda: transport_distances([torch.zeros(2, 3), torch.zeros(2, 4)]), r"found \[2, 4\]"),
        (lambda: transport_distances([torch.zeros(2, 3, dtype=torch.long)]), "int64"),
        (lambda: transport_distances([torch.zeros(3)]), r"found \[3\]"),
        (lambda: transport_distances([torch.zeros(2, 3), torch.zeros(2, 3).double()]), "float64"),
        (lambda: TransportAccumulator().freeze(), "found none"),
    ],
)
def test_wrong_walks_are_refused(call: Callable[[], object], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        call()


def test_no_rows_and_no_gradient() -> None:
    assert fisher_rao_distance(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    logits = torch.randn(2, 4, requires_grad=True)
    assert not fisher_rao_distance(logits, torch.zeros(2, 4)).requires_grad


@pytest.mark.parametrize(
    ("p", "q", "found"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"found \[2, 3\] and \[2, 4\]"),
        (torch.zeros(3), torch.zeros(3), r"found \[3\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), r"found \[2, 0\]"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), "int64"),
    ],
)
def test_wrong_arguments_are_refused(p: torch.Tensor, q: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        fisher_rao_distance(p, q)
