"""Trainers that are not ``DPOTrainer``: given pairs, the callback audits them, changes no bit, and says what it cannot know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from align_audit import AlignmentAuditCallback, AuditRun, ProbeSet, audit
from align_audit.errors import ProbeError
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, saved_model
from tests.helpers.probe_tokenizer import make_tokenizer

PAIRS = Dataset.from_list(ROWS[:16])
PROMPTS = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
JUDGED = Dataset.from_list(
    [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in ROWS[:8]
        for side in ("chosen", "rejected")
    ]
)


def lengths(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """A reward: something that differs."""
    return [float(len(completion)) for completion in completions]


def plain(model: Any, tokenizer: Any, common: dict[str, Any], callbacks: list[TrainerCallback]) -> Any:
    ids = [tokenizer(row["prompt"] + row["chosen"])["input_ids"][:8] for row in ROWS]
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    return Trainer(
        model, TrainingArguments(**common), train_dataset=rows, callbacks=callbacks, processing_class=tokenizer
    )


def of(kind: Any, config: Any, data: Dataset, **options: Any) -> Callable[..., Any]:
    def make(model: Any, tokenizer: Any, common: dict[str, Any], callbacks: list[TrainerCallback]) -> Any:
        rewards = {"reward_funcs": options["reward_funcs"]} if "reward_funcs" in options else {}
        rest = {name: value for name, value in options.items() if name != "reward_funcs"}
        return kind(
            model, args=config(bf16=False, **common, **rest), train_dataset=data, callbacks=callbacks,
            processing_class=tokenizer, **rewards,
        )  # fmt: skip

    return make


TEXTS = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": plain,
    "SFTTrainer": of(SFTTrainer, SFTConfig, TEXTS),
    "KTOTrainer": of(KTOTrainer, KTOConfig, JUDGED),
    "ORPOTrainer": of(ORPOTrainer, ORPOConfig, PAIRS, max_length=64),
    "CPOTrainer": of(CPOTrainer, CPOConfig, PAIRS, max_length=64),
    "OnlineDPOTrainer": of(OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, max_new_tokens=4, reward_funcs=lengths),
    "GRPOTrainer": of(
        GRPOTrainer, GRPOConfig, PROMPTS, max_completion_length=4, num_generations=2, reward_funcs=lengths
    ),
}
SCALED = ("KTOTrainer", "OnlineDPOTrainer")
"""Their rewards are β times log-probability ratios to the reference."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("other-trainers") / "base")


def trained(name: str, base: str, output: Path, callback: AlignmentAuditCallback | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # some of these ask for it
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    common = {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    with contextlib.redirect_stdout(None):
        trainer = TRAINERS[name](model, tokenizer, common, [callback] if callback is not None else [])
        if callback is not None:
            callback.attach(trainer)
        torch.manual_seed(2)
        trainer.train()
    return trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_it_is_audited_and_trains_the_same_bits(name: str, base: str, tmp_path: Path) -> None:
    probes = ProbeSet.from_dataset(ROWS[16:], make_tokenizer())
    config = quick(budget=None, alerts={"enabled": False}, schedule={"before_training": False})
    alone = trained(name, base, tmp_path / "alone", None).model.state_dict()
    watched = trained(name, base, tmp_path / "watched", AlignmentAuditCallback(probes, config, reference=base)).model
    for key, weight in watched.state_dict().items():
        assert torch.equal(weight, alone[key]), key
    run = AuditRun.load(tmp_path / "watched")
    assert run.failures == []
    (record,) = run.records
    expected = audit(watched, base, probes, config, step=2)
    assert record.margins.model_dump_json() == expected.margins.model_dump_json()
    assert record.patching is not None and expected.patching is not None
    assert record.patching.model_dump_json() == expected.patching.model_dump_json()
    assert record.provenance.policy_hash == expected.provenance.policy_hash
    assert record.provenance.beta == (0.1 if name in SCALED else None)


@pytest.mark.parametrize("name", ["SFTTrainer", "KTOTrainer", "GRPOTrainer"])
def test_a_trainer_without_pairs_is_refused_in_words(name: str, base: str, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="no held-out pairs"),
        pytest.raises(ProbeError, match=r"no preference pairs can be drawn from the training set: .* probes=\.\.\."),
    ):
        trained(name, base, tmp_path / "out", AlignmentAuditCallback(config=quick()))
