"""Contraction of rows that repeat: each prefix counts once, whatever the batches, at the precision of the rows."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from align_audit import AuditConfig, ProbeSet, audit
from align_audit.errors import AlignAuditError
from align_audit.record.audit_record import Spinal
from tests.helpers import oracle
from tests.helpers.misleading import Floats, asked, pair_of, probe_set, small_llama
from tests.helpers.tiny import perturbed

WIDTH = 48


@cache
def probes() -> ProbeSet:
    """Prompts and beginnings of completions that occur again and again, also across the border between the two."""
    generator = np.random.default_rng(3)
    pairs = []
    for _ in range(3):
        prompt = generator.integers(3, 61, size=4).tolist()
        start = generator.integers(3, 61, size=2).tolist()
        for _ in range(4):
            chosen, rejected = generator.integers(3, 61, size=(2, 3)).tolist()
            pairs.append(pair_of(len(pairs), prompt, [*start, *chosen], [*start, *rejected]))
        # The same prefixes, read as a longer prompt.
        chosen, rejected = generator.integers(3, 61, size=(2, 2)).tolist()
        pairs.append(pair_of(len(pairs), [*prompt, start[0]], [start[1], *chosen], [start[1], *rejected]))
    return probe_set(pairs)


def prefixes(pairs: ProbeSet) -> list[tuple[int, ...]]:
    """Each prefix that is read, once."""
    seen: dict[tuple[int, ...], None] = {}
    for pair in pairs:
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            for end in range(start, len(ids)):
                seen.setdefault(ids[:end], None)
    return list(seen)


def rows_of(model: nn.Module, pairs: ProbeSet) -> list[Floats]:
    """By layer, [rows, width] of the stream after it: one plain forward a prefix."""
    runs = [oracle.forward(model, ids) for ids in prefixes(pairs)]
    depth = len(runs[0].streams) - 1
    return [np.stack([run.h(number)[-1].double().numpy() for run in runs]) for number in range(depth)]


@torch.no_grad()
def steps_of(model: nn.Module, rows: list[Floats]) -> list[float]:
    """𝓛: by layer, the mean angle between what the logit lens reads there and one layer up."""
    like = next(model.parameters())
    read = [
        model.lm_head(model.model.norm(torch.as_tensor(one).to(like))).double().softmax(-1).sqrt()  # type: ignore[union-attr, operator]
        for one in rows
    ]
    return [float((4 * torch.arcsin((one - two).norm(dim=-1) / 2)).mean()) for one, two in pairwise(read)]


def slope(rows: Floats, precision: float) -> tuple[float, int]:
    """α over ranks ⌈0.1 n⌉ … ⌊0.9 n⌋, and n."""
    sizes = np.linalg.svd(rows, compute_uv=False)
    n = int((sizes > sizes[0] * max(rows.shape) * precision).sum())
    ranks = np.arange(math.ceil(0.1 * n - 1e-9), math.floor(0.9 * n + 1e-9) + 1)
    return -float(np.polyfit(np.log(ranks), np.log(sizes[ranks - 1]), 1)[0]), n


def spinal_of(policy: nn.Module, reference: nn.Module, pairs: ProbeSet, config: AuditConfig) -> Spinal:
    spinal = audit(policy, reference, pairs, config).spinal
    assert spinal is not None
    return spinal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_contraction_is_the_fit_of_rows_that_differ(dtype: torch.dtype) -> None:
    reference = small_llama(layers=2, width=WIDTH, seed=7, dtype=dtype)
    policy = perturbed(reference, 0.1)
    rows = {"policy": rows_of(policy, probes()), "reference": rows_of(reference, probes())}
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for batch_tokens in (1, 100_000):
        config = asked(spinal={}, patching={"enabled": False}, batch_tokens=batch_tokens)
        spinal = spinal_of(policy, reference, probes(), config)
        assert spinal.rows == spinal.rows_available == len(prefixes(probes()))
        for name, model, trace in (
            ("policy", policy, spinal.policy),
            ("reference", reference, spinal.reference),
        ):
            expected = [slope(one, torch.finfo(dtype).eps) for one in rows[name]]
            assert trace.singular_values == [n for _, n in expected], (name, batch_tokens)
            assert trace.contraction == pytest.approx([alpha for alpha, _ in expected], abs=tolerance)
            # A mean over fewer of the rows may do, if its error is a small share of it.
            assert trace.transport == pytest.approx(steps_of(model, rows[name]), rel=0.1)


def test_contraction_is_the_same_however_it_is_batched() -> None:
    """In float32, where a row computed in another batch differs in its last bits: with fewer rows than columns, what
    rounding makes of repeats would be singular values."""
    reference = small_llama(layers=2, width=WIDTH, seed=8, dtype=torch.float32)
    policy = perturbed(reference, 0.1)
    traces = []
    for order, batch_tokens in ((1, 1), (1, 50), (-1, 100_000)):
        pairs = probe_set(probes().pairs[:10][::order])
        assert len(prefixes(pairs)) < WIDTH
        config = asked(spinal={}, patching={"enabled": False}, batch_tokens=batch_tokens)
        spinal = spinal_of(policy, reference, pairs, config)
        traces.append([*spinal.policy.contraction, *spinal.reference.contraction])
    for trace in traces[1:]:
        assert trace == pytest.approx(traces[0], abs=1e-5)


def test_a_prompt_that_only_repeats_adds_no_row() -> None:
    """Four more pairs of a prompt bring the rows of their completions, and not their prompt's last token again."""
    pairs = probes().pairs
    reference = small_llama(layers=2, width=WIDTH, seed=7)
    policy = perturbed(reference, 0.1)
    config = asked(spinal={}, patching={"enabled": False})
    more = probe_set([*pairs, pair_of(99, pairs[0].chosen_ids[:4], [5], [6])])
    assert spinal_of(policy, reference, more, config).rows == len(prefixes(probes()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_that_rounding_makes_are_no_rank(dtype: torch.dtype) -> None:
    """Streams of rank four and the rounding of their dtype: only four singular values are there to count."""
    reference = low_rank_embedding(dtype)
    policy = perturbed(reference, 0.0)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.0625)  # type: ignore[union-attr, operator]
    spinal = spinal_of(policy, reference, probes(), asked(spinal={}, patching={"enabled": False}))
    for trace in (spinal.policy, spinal.reference):
        assert trace.singular_values == [4, 4]
        assert all(math.isnan(alpha) for alpha in trace.contraction)


def low_rank_embedding(dtype: torch.dtype) -> nn.Module:
    """Tokens in four dimensions, turned by a rotation that rounds; the layers write nothing."""
    model = small_llama(layers=2, width=WIDTH, seed=9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
            if "embed_tokens" in name:
                left = torch.randn(weight.shape[0], 4, generator=generator, dtype=torch.float64)
                weight.copy_(left @ torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float64))
    return model.to(dtype)


def test_each_model_counts_at_its_own_floor() -> None:
    """A policy in bfloat16 and a reference in float32, where one audit takes both."""
    reference = small_llama(layers=2, width=WIDTH, seed=9, dtype=torch.float32)
    policy = perturbed(reference, 0.1).to(torch.bfloat16)
    try:
        spinal = spinal_of(policy, reference, probes(), asked(spinal={}, patching={"enabled": False}))
    except AlignAuditError as refusal:
        if "dtype" not in str(refusal):
            raise
        pytest.skip(f"two dtypes in one audit are refused: {refusal}")
    assert spinal.reference.below_rounding_floor == [0, 0]
    rows = rows_of(policy, probes())[0]
    sizes = np.linalg.svd(rows, compute_uv=False)
    assert spinal.policy.below_rounding_floor[0] > 0 or (sizes > sizes[0] * 2**-8).all()
