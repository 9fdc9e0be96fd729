"""Sums into places: each place its own, and the same bits every time."""

from __future__ import annotations

import math

import pytest
import torch

from align_audit.measures.sums import sum_into
from tests.helpers.tiny import DEVICE

pytestmark = pytest.mark.device


def test_places_are_summed_apart_and_alike_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 7, (20_000,), generator=generator)
    values = torch.randn(20_000, generator=generator) * 10.0 ** torch.randint(-6, 6, (20_000,), generator=generator)
    first = sum_into(places.to(DEVICE), values.to(DEVICE), 8)
    assert first.dtype == torch.float64
    expected = [math.fsum(values[places == place].tolist()) for place in range(8)]
    torch.testing.assert_close(first.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-9)
    for _ in range(20):
        assert torch.equal(sum_into(places.to(DEVICE), values.to(DEVICE), 8), first)


def test_what_is_not_finite_stays_in_its_place() -> None:
    places = torch.tensor([0, 1, 2, 2], device=DEVICE)
    sums = sum_into(places, torch.tensor([math.nan, 1.5, math.inf, 1.0], device=DEVICE), 4).tolist()
    assert math.isnan(sums[0])
    assert sums[1:] == [1.5, math.inf, 0.0]


def test_gradients_go_back_to_each_value() -> None:
    values = torch.arange(4.0, device=DEVICE, requires_grad=True)
    sums = sum_into(torch.tensor([0, 1, 0, 1], device=DEVICE), values, 2)
    (sums * torch.tensor([2.0, -3.0], dtype=torch.float64, device=DEVICE)).sum().backward()
    assert values.grad.tolist() == [2.0, -3.0, 2.0, -3.0]  # type: ignore[union-attr]
