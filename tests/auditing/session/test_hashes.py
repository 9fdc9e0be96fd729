"""Weights are read for their hash once an audit; the reference's once a run where nothing has written to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit.auditing.session.open_models import OpenModels
from align_audit.models import reference as module
from align_audit.models.reference import Reference, resolve_reference
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import Moment
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are read for a hash, in this order."""
    models: list[nn.Module] = []
    real = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda model, **options: models.append(model) or real(model, **options))
    return models


def streamed(folder: Path) -> tuple[nn.Module, Reference]:
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(folder)
    return perturbed(model), resolve_reference(model, folder)


def in_memory(folder: Path) -> tuple[nn.Module, Reference]:
    model = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(model)
    return policy, resolve_reference(policy, model)


def adapters_off(folder: Path) -> tuple[nn.Module, Reference]:
    policy: Any = get_peft_model(
        tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    return policy, resolve_reference(policy)


MADE = [streamed, in_memory, adapters_off]


def hashes(policy: nn.Module, reference: Reference, *, rehash: bool) -> tuple[str, str]:
    with OpenModels(policy, reference, rehash=rehash) as models:
        return models.open().hashes


@pytest.mark.parametrize("made", MADE)
def test_an_audit_reads_each_model_once_and_a_look_the_reference_no_more(
    made: Callable[[Path], Any], tmp_path: Path, read: list[nn.Module]
) -> None:
    policy, reference = made(tmp_path / "base")
    for rehash, times in ((False, 2), (False, 1), (True, 2), (False, 1)):
        read.clear()
        with OpenModels(policy, reference, rehash=rehash) as models:
            unopened = models.policy_hash
            assert models.open().hashes[0] == unopened
            assert models.hashes[1] == reference.fingerprint()
        assert len(read) == times + 1, "the last one is this test's"


def written_in_place(policy: nn.Module, reference: Reference, folder: Path) -> None:
    model = reference.model()
    weight = next(weight for name, weight in model.named_parameters() if "embed_tokens" in name)
    with torch.no_grad():
        weight[0, 0] += 1


def replaced(policy: nn.Module, reference: Reference, folder: Path) -> None:
    module = reference.model().get_submodule("model.norm")
    module.weight = nn.Parameter(module.weight.detach() + 1)


def saved_over(policy: nn.Module, reference: Reference, folder: Path) -> None:
    tiny_model("llama", seed=3, dtype=torch.float32).save_pretrained(folder)


@pytest.mark.parametrize(
    ("made", "move"),
    [
        (in_memory, written_in_place),
        (in_memory, replaced),
        (adapters_off, written_in_place),
        (streamed, saved_over),
    ],
)
def test_a_reference_that_was_written_to_is_noticed_at_a_look(
    made: Callable[[Path], Any], move: Callable[..., None], tmp_path: Path
) -> None:
    policy, reference = made(tmp_path / "base")
    first = hashes(policy, reference, rehash=False)[1]
    assert hashes(policy, reference, rehash=False)[1] == first
    move(policy, reference, tmp_path / "base")
    moved = hashes(policy, reference, rehash=False)[1]
    assert moved != first
    assert moved == hashes(policy, reference, rehash=True)[1]


def test_one_that_moved_unseen_is_noticed_by_a_full_audit(tmp_path: Path) -> None:
    """Trainers write through ``.data``, of which a parameter keeps no count."""
    policy, reference = in_memory(tmp_path)
    first = hashes(policy, reference, rehash=False)[1]
    next(reference.model().parameters()).data[0, 0] += 1
    assert hashes(policy, reference, rehash=True)[1] != first


def test_the_monitor_reads_the_policy_once(tmp_path: Path, read: list[nn.Module]) -> None:
    policy, reference = in_memory(tmp_path)
    monitor = Monitor({"a": random_pairs(4), "b": random_pairs(4, seed=1)}, quick())
    assert monitor.audit(OpenModels(policy, reference), Moment(1)).failures == []
    assert read == [policy, reference.model()]
