"""Log-probabilities, entropy, KL and margins against closed forms, SciPy and plain loops."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy

from align_audit.measures import margin
from align_audit.measures.margin import (
    compare_readouts,
    kl_divergence,
    preference_margin,
    sum_by_pair,
    token_logp,
    token_logp_gradient,
    token_readout,
)

LOGITS = hnp.arrays(np.float64, (4, 6), elements=st.floats(-50, 50))
NAN, INF = math.nan, math.inf


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_docstring_examples() -> None:
    results = doctest.testmod(margin)
    assert results.failed == 0
    assert results.attempted >= 2


def test_known_distributions() -> None:
    half = math.log(0.5)
    wide = logits(
        [0.0, 0.0, -INF, -INF], [math.log(0.5), math.log(0.25), math.log(0.25), -INF], [0.0, -INF, -INF, -INF]
    )
    readout = token_readout(wide, torch.tensor([1, 2, 0]))
    assert readout.logp.tolist() == pytest.approx([half, 2 * half, 0.0], rel=1e-15)
    assert readout.entropy.tolist() == pytest.approx([math.log(2), 1.5 * math.log(2), 0.0], rel=1e-15)
    assert readout.correct.tolist() == [0.0, 0.0, 1.0]
    assert token_readout(wide, torch.tensor([0, 0, 1])).correct.tolist() == [1.0, 1.0, 0.0]
    assert kl_divergence(wide, torch.zeros(3, 4, dtype=torch.float64)).tolist() == pytest.approx(
        [math.log(2), 0.5 * math.log(2), math.log(4)], rel=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_log_probabilities_is_that_of_autograd_to_the_bit(dtype: torch.dtype) -> None:
    wide = (10 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    target = torch.arange(40) % 7
    wide[3], wide[5, 0] = 0.0, -INF  # rows alike everywhere, and a token that cannot come
    leaf = wide.clone().requires_grad_()
    (expected,) = torch.autograd.grad(token_logp(leaf, target).sum(), leaf)
    assert torch.equal(token_logp_gradient(wide, target), expected)
    assert expected.abs().max() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_taken_in_chunks_are_the_formulas_written_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, also where one row of a chunk is masked, is no distribution, or has several largest logits."""
    generator = torch.Generator().manual_seed(1)
    policy, reference = (4 * torch.randn(40, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    policy[7, :100], policy[12, 3], policy[20], policy[33, 5] = -INF, NAN, 0.0, INF
    policy[25, 100:], reference[26, 50:90] = -2000.0, -INF
    policy, reference = policy.to(dtype), reference.to(dtype)
    target = torch.where(torch.arange(40) % 2 == 0, policy.argmax(-1), torch.arange(40))
    target[20:22] = 0
    wide, other = (each if dtype == torch.float64 else each.float() for each in (policy, reference))
    logp, logq = (each - torch.logsumexp(each, -1, keepdim=True) for each in (wide, other))
    known = ~torch.logsumexp(wide, -1).isnan() & ~torch.logsumexp(wide, -1).isinf()
    p = logp.exp()
    expected = {
        "logp": logp.gather(-1, target[:, None])[:, 0].double(),
        "entropy": torch.where(known, -(p * logp).masked_fill(p == 0, 0.0).sum(-1).double(), NAN),
        "correct": torch.where(known, (wide.argmax(-1) == target).double(), NAN),
    }
    kl = (p * (logp - logq)).masked_fill((p == 0) & ~logq.isnan(), 0.0).double().sum(-1).clamp_min(0.0)
    for size in (1, 300 * 8, 300 * 8 * 7, 2**21):
        monkeypatch.setattr(margin, "_CHUNK_BYTES", size)
        compared, _, found = compare_readouts(policy, reference, target)
        for readout in (compared, token_readout(policy, target)):
            for name, values in expected.items():
                torch.testing.assert_close(getattr(readout, name), values, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, kl, rtol=0, atol=0, equal_nan=True)
        before = token_readout(reference, target)
        assert compare_readouts(policy, reference, target, before)[2].allclose(found, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(token_logp(policy, target), expected["logp"], rtol=0, atol=0, equal_nan=True)
    assert expected["correct"][[20, 21]].tolist() == [1.0, 0.0]


def test_no_rows_at_all() -> None:
    nothing, target = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    policy, reference, kl = compare_readouts(nothing, nothing, target)
    for found in (policy.logp, reference.entropy, policy.correct, kl, token_logp(nothing, target)):
        assert found.shape == (0,)


@settings(max_examples=100, deadline=None)
@given(LOGITS, LOGITS)
def test_against_scipy(one: np.ndarray, other: np.ndarray) -> None:
    target = np.array([0, 5, 2, 2])
    readout = token_readout(torch.from_numpy(one), torch.from_numpy(target))
    logp = log_softmax(one, axis=-1)
    assert readout.logp.numpy() == pytest.approx(logp[np.arange(4), target], rel=1e-12, abs=1e-12)
    assert torch.equal(token_logp(torch.from_numpy(one), torch.from_numpy(target)), readout.logp)
    assert readout.entropy.numpy() == pytest.approx(entropy(np.exp(logp), axis=-1), rel=1e-9, abs=1e-12)
    assert readout.correct.tolist() == (one.argmax(-1) == target).astype(float).tolist()
    p, q = np.exp(logp), np.exp(log_softmax(other, axis=-1))
    divergence = kl_divergence(torch.from_numpy(one), torch.from_numpy(other))
    assert divergence.numpy() == pytest.approx(rel_entr(p, q).sum(-1), rel=1e-7, abs=1e-9)
    assert bool((divergence >= 0).all())
    assert kl_divergence(torch.from_numpy(one), torch.from_numpy(one)).tolist() == [0.0] * 4


def test_float64_is_kept_and_half_precision_computes_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = 10 * torch.randn(5, 300, generator=generator, dtype=torch.float64)
    target = torch.arange(5)
    expected = log_softmax(exact.numpy(), axis=-1)[np.arange(5), np.arange(5)]
    assert np.abs(token_logp(exact, target).numpy() - expected).max() < 1e-13
    assert np.abs(token_logp(exact.float(), target).numpy() - expected).max() > 1e-9  # so the first line could fail
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = exact.to(dtype)
        wanted = log_softmax(rounded.double().numpy(), axis=-1)[np.arange(5), np.arange(5)]
        for found in (token_logp(rounded, target), token_readout(rounded, target).logp):
            assert found.dtype == torch.float64
            assert np.abs(found.numpy() - wanted).max() < 1e-5
        readout = token_readout(rounded, target)
        assert (readout.entropy.dtype, readout.correct.dtype) == (torch.float64, torch.float64)
        assert kl_divergence(rounded, rounded.flip(-1)).dtype == torch.float64


def test_masked_tokens() -> None:
    """−inf logits are probabilities of 0: nothing for the entropy, −inf as a target, infinite KL where only ρ masks."""
    wide = logits([1.0, 2.0, -INF])
    assert token_logp(wide, torch.tensor([2])).tolist() == [-INF]
    readout = token_readout(wide, torch.tensor([1]))
    assert readout.entropy.item() == pytest.approx(token_readout(wide[:, :2], torch.tensor([1])).entropy.item())
    assert readout.correct.item() == 1.0
    both = logits([2.0, 1.0, -INF])
    assert kl_divergence(wide, both).item() == pytest.approx(kl_divergence(wide[:, :2], both[:, :2]).item())
    assert kl_divergence(wide, logits([1.0, 2.0, 3.0])).item() > 0
    assert kl_divergence(logits([1.0, 2.0, 3.0]), wide).item() == INF


@pytest.mark.parametrize("bad", [[NAN, 1.0, 2.0], [0.0, NAN, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_what_is_not_a_distribution_is_nan_in_its_row_only(bad: list[float]) -> None:
    good = [0.0, 1.0, 2.0]
    wide, plain = logits(good, bad, good), logits(good, good, good)
    target = torch.tensor([2, 2, 2])
    readout, clean = token_readout(wide, target), token_readout(plain, target)
    for found, expected in (
        (readout.entropy, clean.entropy),
        (readout.correct, clean.correct),
        (kl_divergence(wide, plain), kl_divergence(plain, plain)),
        (kl_divergence(plain, wide), kl_divergence(plain, plain)),
    ):
        assert found.isnan().tolist() == [False, True, False]
        assert torch.equal(found[::2], expected[::2])
    logp = token_logp(wide, target)
    assert not math.isfinite(logp[1].item())
    assert torch.equal(logp[::2], clean.logp[::2])


def test_infinite_logits_on_the_target_are_nan() -> None:
    assert token_logp(logits([INF, 0.0]), torch.tensor([0])).isnan().item()
    assert token_logp(logits([NAN, 0.0]), torch.tensor([1])).isnan().item()
    assert token_logp(logits([INF, 0.0]), torch.tensor([1])).item() == -INF


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sums_and_margins_against_a_loop(data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(0, 30))
    owner = data.draw(st.lists(st.integers(0, pairs - 1), min_size=count, max_size=count))
    side = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    values = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=count, max_size=count))
    arguments = (
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(owner, dtype=torch.long),
        torch.tensor(side, dtype=torch.long),
        pairs,
    )
    expected = [[0.0] * pairs for _ in range(2)]
    for value, one, which in zip(values, owner, side, strict=True):
        expected[which][one] += value
    sums = sum_by_pair(*arguments)
    assert sums.dtype == torch.float64
    assert sums.tolist() == expected
    assert preference_margin(*arguments).tolist() == [a - b for a, b in zip(*expected, strict=True)]


def test_long_sums_are_taken_in_float64() -> None:
    values = torch.full((100_000,), 0.1, dtype=torch.float32)
    zeros = torch.zeros(100_000, dtype=torch.long)
    assert sum_by_pair(values, zeros, zeros, 1)[0, 0].item() == pytest.approx(float(values[0]) * 1e5, rel=1e-12)


def test_nan_stays_with_its_pair() -> None:
    logp = torch.tensor([-1.0, NAN, -2.0, -3.0], dtype=torch.float64)
    found = preference_margin(logp, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), 2)
    assert found[0].item() == 1.0
    assert found[1].isnan()


def test_gradients_pass_through_the_margin() -> None:
    """∂ log p(target) / ∂ logits = onehot − softmax, with the sign of the side."""
    wide = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    target, side = torch.tensor([0, 3, 1]), torch.tensor([0, 1, 0])
    preference_margin(token_logp(wide, target), torch.tensor([0, 0, 1]), side, 2).sum().backward()
    expected = torch.nn.functional.one_hot(target, 4) - wide.detach().softmax(-1)
    torch.testing.assert_close(wide.grad, expected * torch.tensor([[1.0], [-1.0], [1.0]]), rtol=1e-12, atol=1e-12)
