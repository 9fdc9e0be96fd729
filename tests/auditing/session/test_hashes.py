"""Weights are read for their hash once an audit, also those that policy and reference have in common; the reference's once a
run where nothing has written to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align_audit import audit, transfer
from align_audit.auditing.session.open_models import OpenModels
from align_audit.models.loading import load_model
from align_audit.models.reference import Reference, fingerprints, policy_fingerprint, resolve_reference
from align_audit.models.weights import fingerprint as module
from align_audit.models.weights.fingerprint import tensors
from align_audit.monitoring.checkpoints import audit_saved, transfer_saved
from align_audit.monitoring.monitor import Monitor
from align_audit.monitoring.outcome import Moment
from tests.helpers.callback_runs import quick
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each weight has that is read for a hash, in this order."""
    sizes: list[int] = []
    real = module.summed
    monkeypatch.setattr(module, "summed", lambda weight: sizes.append(weight.numel()) or real(weight))
    return sizes


def tensors_of(models: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """All weights of these models."""
    return (weight() for model in models for weight in tensors(model).values())


def streamed(folder: Path) -> tuple[nn.Module, Reference]:
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(folder)
    return perturbed(model), resolve_reference(model, folder)


def in_memory(folder: Path) -> tuple[nn.Module, Reference]:
    model = tiny_model("llama", dtype=torch.float32)
    policy = perturbed(model)
    return policy, resolve_reference(policy, model)


def adapted(**lora: Any) -> Any:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **lora}
    return get_peft_model(tiny_model("llama", dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **options))


def adapters_off(folder: Path) -> tuple[nn.Module, Reference]:
    policy = adapted()
    return policy, resolve_reference(policy)


def modules_saved(folder: Path) -> tuple[nn.Module, Reference]:
    policy = adapted(modules_to_save=["lm_head"])
    return policy, resolve_reference(policy)


def own_base(folder: Path) -> tuple[nn.Module, Reference]:
    policy = adapted()
    return policy, resolve_reference(policy, policy.get_base_model())


def frozen_copy(folder: Path) -> tuple[nn.Module, Reference]:
    policy = adapted(modules_to_save=["lm_head"])
    policy.add_adapter("ref", policy.peft_config["default"])
    return policy, resolve_reference(policy)


def merged(folder: Path) -> tuple[nn.Module, Reference]:
    policy = adapted()
    policy.merge_adapter()
    return policy, resolve_reference(policy)


MADE = [streamed, in_memory, adapters_off, modules_saved, own_base, frozen_copy]


def hashes(policy: nn.Module, reference: Reference, *, rehash: bool) -> tuple[str, str]:
    with OpenModels(policy, reference, rehash=rehash) as models:
        return models.open().hashes


@pytest.mark.parametrize("made", MADE)
def test_an_audit_reads_each_weight_once_and_a_look_the_reference_no_more(
    made: Callable[[Path], Any], tmp_path: Path, read: list[int]
) -> None:
    policy, reference = made(tmp_path / "base")
    apart = policy_fingerprint(policy), reference.fingerprint()
    models = {policy, reference.model()}
    every = sum(weight.numel() for weight in tensors_of(models))
    active = sum(weight().numel() for name, weight in tensors(policy).items() if ".ref." not in name)
    for rehash, values in ((False, every), (False, active), (True, every), (False, active)):
        read.clear()
        with OpenModels(policy, reference, rehash=rehash) as models:
            unopened = models.policy_hash
            assert models.open().hashes == apart == fingerprints(policy, reference)
            assert models.hashes[0] == unopened
        assert sum(read) == values + every, "the last ones are this test's"


def test_what_is_merged_is_read_with_the_sum_and_without(tmp_path: Path) -> None:
    policy, reference = merged(tmp_path)
    apart = policy_fingerprint(policy), reference.fingerprint()
    assert hashes(policy, reference, rehash=True) == apart == fingerprints(policy, reference)
    policy.unmerge_adapter()  # type: ignore[operator]
    assert policy_fingerprint(policy) != apart[0]


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


def test_the_monitor_reads_the_policy_once(tmp_path: Path, read: list[int]) -> None:
    policy, reference = in_memory(tmp_path)
    monitor = Monitor({"a": random_pairs(4), "b": random_pairs(4, seed=1)}, quick())
    assert monitor.audit(OpenModels(policy, reference), Moment(1)).failures == []
    assert sum(read) == sum(weight.numel() for weight in tensors_of({policy, reference.model()}))


def pairs_at(folder: Path) -> dict[str, Path]:
    """Two files of pairs that need no tokenizer."""
    files = {}
    for seed, name in enumerate(("a", "b")):
        rows = [
            {
                "prompt_ids": pair.chosen_ids[: pair.chosen_start],
                "chosen_ids": pair.chosen_ids[pair.chosen_start :],
                "rejected_ids": pair.rejected_ids[pair.rejected_start :],
            }
            for pair in random_pairs(12, seed)
        ]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


CONFIG = quick(max_pairs=12, low_rank={"layers": [1], "ranks": [1], "random_draws": 1})
DOORS: dict[str, Callable[[Path, dict[str, Path]], Any]] = {
    "audit": lambda folder, files: audit(folder, None, files["a"], CONFIG),
    "audits of several sets": lambda folder, files: audit(folder, None, files, CONFIG),
    "a saved checkpoint": lambda folder, files: audit_saved({folder: 1}, None, files["a"], CONFIG, folder / "out"),
    "transfer": lambda folder, files: transfer(folder, None, files, CONFIG),
    "a saved transfer": lambda folder, files: transfer_saved(folder, None, files, CONFIG),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_base_of_a_saved_adapter_is_read_once(
    door: str, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    policy = get_peft_model(load_model(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    policy.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("align_audit.auditing.probe_files.load_tokenizer", lambda *_, **__: None)
    DOORS[door](tmp_path / "adapter", pairs_at(tmp_path))
    assert sum(read) == sum(weight.numel() for weight in policy.parameters())
