"""Policies of a few steps, and benches that audit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align_audit.auditing.request import AuditRequest
from align_audit.monitoring import monitor as module
from tests.helpers.monitor_bench import Bench
from tests.helpers.tiny import perturbed, tiny_model


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def policies(reference: nn.Module) -> list[nn.Module]:
    """Of steps 0 to 3; the first has not moved."""
    return [perturbed(reference, scale=0.02 * step, seed=step) for step in range(4)]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[AuditRequest]:
    """What is asked of each audit that is made."""
    made: list[AuditRequest] = []
    real = module.run_audit

    def watched(models: Any, request: AuditRequest, *more: Any) -> Any:
        made.append(request)
        return real(models, request, *more)

    monkeypatch.setattr(module, "run_audit", watched)
    return made


@pytest.fixture
def bench(reference: nn.Module, policies: list[nn.Module], tmp_path: Path) -> Any:
    """Makes benches; all in one folder, so that a second one goes on with the log of the first."""
    return lambda config=None, **options: Bench(reference, policies, tmp_path / "run", config, **options)
