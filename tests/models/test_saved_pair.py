"""A policy and a reference that cannot be compared are refused by their names and configurations, before either is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align_audit import AuditConfig, audit, transfer
from align_audit.errors import ReferenceUnavailableError
from align_audit.models import loading
from align_audit.models.saved_pair import check_saved
from align_audit.monitoring.checkpoints import audit_saved, transfer_saved
from align_audit.monitoring.doctor import Plan, examine
from align_audit.monitoring.watch import watch_checkpoints
from tests.helpers.dpo import ROWS, saved_model
from tests.helpers.tiny import tiny_model

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a full checkpoint and an adapter of it; the adapter says ``base-model`` of its base."""
    folder = tmp_path_factory.mktemp("models")
    saved_model(folder / "base-model")
    shutil.copytree(folder / "base-model", folder / "run" / "checkpoint-4")
    adapter = folder / "lora" / "checkpoint-4"
    get_peft_model(loading.load_model(folder / "base-model"), LORA).save_pretrained(adapter)
    name_base(adapter, "base-model")
    return folder


def name_base(adapter: Path, base: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with those models and pairs in it."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is loaded."""
    paths: list[Any] = []
    real = loading._load_whole
    monkeypatch.setattr(loading, "_load_whole", lambda path, options: paths.append(path) or real(path, options))
    return paths


def smaller(name: str, **changes: int) -> str:
    tiny_model("llama", **changes).save_pretrained(name)
    return name


def without_weights() -> str:
    shutil.copytree("base-model", "bare")
    Path("bare/model.safetensors").unlink()
    return "bare"


def of_a_lost_base() -> str:
    shutil.copytree("lora/checkpoint-4", "other")
    name_base(Path("other"), "lost")
    return "other"


WRONG: dict[str, tuple[Callable[[], str | None], str]] = {
    "mistyped": (lambda: "base-modle", r"base-modle \(did you mean base-model\?\): there is no such folder, and no model"),
    "mistyped, in a folder": (lambda: "./run/checkpoint-5", r"did you mean run/checkpoint-4\?\): there is no such folder"),
    "no name of a hub": (lambda: "a/long/way", "a/long/way: there is no such folder"),
    "a file": (lambda: "pairs.jsonl", "is a file"),
    "a folder without a model": (lambda: "run", "holds no config.json .* checkpoint-4: name one of them"),
    "no weights": (without_weights, "holds a configuration, and no weights"),
    "an adapter whose base is nowhere": (of_a_lost_base, "the base model of other, lost, is not there"),
    "fewer layers": (lambda: smaller("thin", num_hidden_layers=2), "decoder layers 2 against the policy's [0-9]"),
    "narrower": (lambda: smaller("narrow", hidden_size=16, num_hidden_layers=3), "width 16 against the policy's 32"),
}  # fmt: skip
CONFIG = AuditConfig.from_dict({"progress": False})
DOORS: dict[str, Callable[[Path, str | None], Any]] = {
    "audit": lambda policy, reference: audit(policy, reference, "pairs.jsonl", CONFIG),
    "transfer": lambda policy, reference: transfer(policy, reference, dict.fromkeys("ab", "pairs.jsonl"), CONFIG),
    "run": lambda policy, reference: audit_saved({policy: 4}, reference, "pairs.jsonl", CONFIG, Path("out")),
    "several checkpoints": lambda policy, reference: audit_saved(
        {policy: 4, policy.parent.parent / "lora" / policy.name: 5}, reference, "pairs.jsonl", CONFIG, Path("out")
    ),
    "a saved transfer": lambda policy, reference: transfer_saved(
        policy, reference, dict.fromkeys("ab", "pairs.jsonl"), CONFIG
    ),
    "watch": lambda policy, reference: watch_checkpoints(
        policy.parent, reference, "pairs.jsonl", CONFIG, Path("out"), every=0.0, idle=0.0, settled=0.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("policy", ["run", "lora"])
def test_a_reference_that_cannot_be_is_refused_before_anything_is_loaded(
    policy: str, kind: str, here: Path, loaded: list[Any]
) -> None:
    make, words = WRONG[kind]
    reference = make()
    loaded.clear()
    for enter in DOORS.values():
        with pytest.raises(ReferenceUnavailableError, match=words):
            enter(Path(policy, "checkpoint-4"), reference)
    assert loaded == []


@pytest.mark.parametrize("kind", [kind for kind in WRONG if "layers" not in kind and kind != "narrower"])
def test_the_doctor_says_it_before_it_opens_the_model(kind: str, here: Path, loaded: list[Any]) -> None:
    make, _ = WRONG[kind]
    plan = Plan("base-model", "pairs.jsonl", reference=make())
    loaded.clear()
    *_, refused = examine(plan, CONFIG)
    assert (refused.name, refused.level, loaded) == ("reference", "red", [])


@pytest.mark.parametrize("door", DOORS)
def test_a_full_model_needs_a_reference_and_none_is_its_own(door: str, here: Path, loaded: list[Any]) -> None:
    if door != "several checkpoints":  # of which the adapter has one
        with pytest.raises(ReferenceUnavailableError, match="checkpoint-4 is a full model and does not say"):
            DOORS[door](Path("run/checkpoint-4"), None)
    for policy in (Path("run/checkpoint-4"), Path("lora/checkpoint-4")):
        for reference in (str(policy), f"{policy}/../checkpoint-4", str(policy.absolute())):
            with pytest.raises(ReferenceUnavailableError, match="the reference is checkpoint-4 itself"):
                DOORS["audit" if door == "several checkpoints" else door](policy, reference)
    assert loaded == []


def test_what_can_be_compared_passes(here: Path) -> None:
    """Configurations that say nothing, or of which the names may mean other things, are for the models to tell."""
    others = {"gpt2": tiny_model("gpt2"), "qwen3": tiny_model("qwen3", num_hidden_layers=2)}
    for name, model in others.items():
        model.save_pretrained(name)  # type: ignore[operator]
    torch.save({}, "gpt2/pytorch_model.bin")
    Path("gpt2/model.safetensors").unlink()
    for policy in ("run/checkpoint-4", "lora/checkpoint-4", "gpt2"):
        for reference in ("base-model", *others):
            if policy != reference:
                check_saved(policy, reference)
    check_saved("lora/checkpoint-4", None)
    check_saved("a/hub-name", None)
    check_saved("lora/checkpoint-4", "run/checkpoint-4")
