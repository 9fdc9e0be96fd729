"""What depends on the reference alone is measured once a run, and again when the reference is another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align_audit.auditing.measurements.spinal import Spinal
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.config import AuditConfig
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.tiny import perturbed, random_pairs, tiny_model

pytestmark = pytest.mark.device

CONFIG = AuditConfig.from_dict(
    {
        "low_rank": {"enabled": False},
        "patching": {"enabled": False},
        "spinal": {"gradient_concentration": False},
        "generations": QUICK_GENERATIONS,
    }
)


def run(reference: Any, cache: ReferenceCache, config: AuditConfig = CONFIG, pairs: int = 8) -> Any:
    policy = perturbed(reference)
    probes = random_pairs(pairs, longest=20)
    return audited(policy, reference, probes, config, cache=cache)[0].spinal


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Traces measured so far."""
    calls: list[int] = []
    real = Spinal.depth_trace

    def trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Spinal, "depth_trace", trace)
    return calls


def test_a_second_process_measures_the_policy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    reference = tiny_model("llama")
    first = run(reference, ReferenceCache(tmp_path))
    assert len(calls) == 2
    assert len(list(tmp_path.glob("reference-*.json"))) == 1
    again = run(reference, ReferenceCache(tmp_path))
    assert len(calls) == 3
    assert again == first


def test_what_it_depends_on_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    cache = ReferenceCache(tmp_path)
    first = run(tiny_model("llama"), cache)
    assert run(tiny_model("llama", seed=5), cache).reference != first.reference
    assert len(calls) == 4, "another reference"
    run(tiny_model("llama"), cache, pairs=9)
    assert len(calls) == 6, "other pairs"
    run(tiny_model("llama"), cache, config=AuditConfig.from_dict({**CONFIG.to_dict(), "seed": 4}))
    assert len(calls) == 8, "another seed"
    run(tiny_model("llama"), cache)
    assert len(calls) == 10, "of these pairs the trace of the other reference had taken its place"
    run(tiny_model("llama"), cache)
    assert len(calls) == 11


def test_another_version_measures_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume with other libraries: they may compute a little otherwise, and policy and reference are compared."""
    calls = counted(monkeypatch)
    run(tiny_model("llama"), ReferenceCache(tmp_path))
    monkeypatch.setattr(torch, "__version__", "another")
    run(tiny_model("llama"), ReferenceCache(tmp_path))
    assert len(calls) == 4
    run(tiny_model("llama"), ReferenceCache(tmp_path))
    assert len(calls) == 5


def test_a_model_of_one_layer_is_audited_again(tmp_path: Path) -> None:
    """It has no transport to the next layer, and so no distances to keep."""
    reference, cache = tiny_model("llama", num_hidden_layers=1), ReferenceCache(tmp_path)
    first, again, later = run(reference, cache), run(reference, cache), run(reference, ReferenceCache(tmp_path))
    assert first == again == later
    assert first.policy.transport == []


def test_a_reference_that_moves_leaves_one_trace(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    for seed in range(3):
        run(tiny_model("llama", seed=seed), cache)
    assert len(list(tmp_path.iterdir())) == len(cache._traces) == 1
    run(tiny_model("llama", seed=2), cache, pairs=9)
    assert len(list(tmp_path.iterdir())) == len(cache._traces) == 2, "each probe set has its own"


def test_a_damaged_file_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = counted(monkeypatch)
    reference = tiny_model("llama")
    first = run(reference, ReferenceCache(tmp_path))
    (path,) = tmp_path.iterdir()
    for damage in (b"", b"{}", path.read_bytes()[:-9]):
        path.write_bytes(damage)
        assert run(reference, ReferenceCache(tmp_path)) == first
        assert "the reference is measured again" in caplog.text
        caplog.clear()
    assert len(calls) == 8
    assert run(reference, ReferenceCache(tmp_path)) == first
    assert len(calls) == 9, "the damaged file was written anew"


def test_a_disk_that_refuses_breaks_no_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file, where the folder should be")
    assert run(tiny_model("llama"), ReferenceCache(tmp_path / "taken")) is not None
    assert "could not keep the reference's trace" in caplog.text
