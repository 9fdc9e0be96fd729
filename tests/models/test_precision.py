"""Audits where a trainer has products of float32 rounded: what transformers sets for ``tf32=True``, and what torch offers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from align_audit.auditing.session.reference_cache import computed_by
from align_audit.config import AuditConfig
from align_audit.models import precision
from align_audit.models.precision import float32_products, product_unit, rounding
from tests.helpers.audits import QUICK, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

CPU = torch.device("cpu")
QUICK_AUDIT = AuditConfig.from_dict({**QUICK, "spinal": {}})


def _everywhere(mode: str) -> None:
    torch.backends.fp32_precision = mode  # type: ignore[attr-defined]


def _on_the_host(mode: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = mode  # type: ignore[attr-defined]


SETTINGS: dict[str, tuple[Callable[[], None], str, str]] = {
    "as it is": (lambda: None, "ieee", "ieee"),
    "tf32=True of transformers": (lambda: _everywhere("tf32"), "ieee", "tf32"),
    "tf32=False of transformers": (lambda: _everywhere("ieee"), "ieee", "ieee"),
    "bfloat16 on the host": (lambda: _on_the_host("bf16"), "bf16", "ieee"),
}
"""What is set, and what products of float32 are computed in on a CPU and on a CUDA device."""


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    set_it, host, device = SETTINGS[request.param]
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has the old switches alone")
    set_it()
    yield host, device
    _on_the_host("none")
    _everywhere("none")
    torch.backends.cuda.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


def test_an_audit_works_and_says_what_it_was_computed_in(
    setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = setting
    monkeypatch.setattr(precision, "_bfloat16_products", lambda: True)
    assert (float32_products("cpu"), float32_products("cuda")) == (host, device)
    assert float32_products("mps") == "ieee"
    assert json.loads(computed_by(CPU))["precision"] == host
    reference = tiny_model("llama", dtype=torch.float32)
    record, _ = audited(perturbed(reference), reference, random_pairs(4), QUICK_AUDIT)
    words = "float32" if host == "ieee" else f"float32 ({host} products)"
    assert record.provenance.compute_dtype == words
    assert record.spinal is not None
    assert record.controls.identity.verdict == "passed"
    wide = tiny_model("llama")
    assert audited(perturbed(wide), wide, random_pairs(2), QUICK_AUDIT)[0].provenance.compute_dtype == "float64"


def test_tolerances_grow_with_what_products_are_rounded_to(
    setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_bfloat16_products", lambda: True)
    units = {"ieee": torch.finfo(torch.float32).eps, "tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}
    for device, products in zip(("cpu", "cuda"), setting, strict=True):
        unit = units[products]
        assert product_unit(torch.float32, device) == unit
        assert product_unit(torch.float64, device) == torch.finfo(torch.float64).eps
        assert rounding(1, device, torch.float32) == 8 * unit


def test_a_cpu_without_bfloat16_products_rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "backends", SimpleNamespace(cuda=SimpleNamespace(), mkldnn=SimpleNamespace()))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(precision, "_bfloat16_products", lambda: False)
    assert (float32_products("cpu"), float32_products("cuda")) == ("ieee", "tf32")


def test_the_old_switches_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no others."""
    monkeypatch.setattr(precision, "_bfloat16_products", lambda: True)
    monkeypatch.setattr(torch, "backends", SimpleNamespace(cuda=SimpleNamespace(), mkldnn=SimpleNamespace()))
    for legacy, host, device in (("highest", "ieee", "ieee"), ("high", "ieee", "tf32"), ("medium", "bf16", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda legacy=legacy: legacy)
        assert (float32_products("cpu"), float32_products("cuda")) == (host, device)
