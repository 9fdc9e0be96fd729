"""QLoRA and its like: training is the same bits with audits beside it, and margins are those of plain forwards.

``make test-quantized`` runs these with bitsandbytes and torchao; where they are not installed they skip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from trl import DPOConfig, DPOTrainer

from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.models.guard import untouched
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS, Losses, saved_model
from tests.helpers.probe_tokenizer import make_tokenizer

LIBRARY = {"4 bits": "bitsandbytes", "8 bits": "bitsandbytes", "int8 of torchao": "torchao"}
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(library) is None,
            reason=f"{library} is not installed; `make test-quantized` brings it",
        ),
    )
    for kind, library in LIBRARY.items()
]
pytestmark = pytest.mark.filterwarnings("ignore")
"""Of bitsandbytes and torchao about the CPU, of PEFT about merging: nobody here can mend what they speak of."""


def _quantization(kind: str) -> Any:
    if kind == "4 bits":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    if kind == "8 bits":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@dataclass
class _Run:
    trainer: DPOTrainer
    logs: list[Any]
    hash: str
    adapters: dict[str, torch.Tensor]


def _trained(kind: str, folder: Path, callback: AlignmentAuditCallback | None) -> _Run:
    """Three steps of LoRA on a quantized base whose width bitsandbytes' blocks fit."""
    base = saved_model(folder / "base", hidden_size=64, intermediate_size=128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=_quantization(kind))
    losses = Losses()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            str(folder / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=5e-3, report_to=[], use_cpu=True,
            bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=7,
        ),
        train_dataset=Dataset.from_list(ROWS[:16]),
        eval_dataset=Dataset.from_list(ROWS[16:]),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[losses, *([] if callback is None else [callback])],
    )  # fmt: skip
    if callback is not None:
        callback.attach(trainer)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        trainer.train()
    adapters = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return _Run(trainer, losses.seen, fingerprint(trainer.model), adapters)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[_Run, _Run]]:
    """By kind: a training without the callback, and with an audit at every step; made once."""
    made: dict[str, tuple[_Run, _Run]] = {}

    def of(kind: str) -> tuple[_Run, _Run]:
        if kind not in made:
            callback = AlignmentAuditCallback(config=quick(schedule={"every_n_steps": 1}, max_pairs=len(ROWS[16:])))
            made[kind] = (
                _trained(kind, tmp_path_factory.mktemp("plain"), None),
                _trained(kind, tmp_path_factory.mktemp("audited"), callback),
            )
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bits(kind: str, runs: Callable[[str], tuple[_Run, _Run]]) -> None:
    """The base is in shards of bits that a first forward may repack, and a hash of it tells."""
    plain, audited = runs(kind)
    assert audited.logs == plain.logs
    assert audited.hash == plain.hash
    assert audited.adapters.keys() == plain.adapters.keys()
    assert all(torch.equal(value, plain.adapters[name]) for name, value in audited.adapters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_margins_are_those_of_plain_forwards(kind: str, runs: Callable[[str], tuple[_Run, _Run]]) -> None:
    """Of each sequence by itself. With 8 bits a text's numbers depend on its batch, and plain forwards differ among them."""
    _, audited = runs(kind)
    stored = AuditRun.load(audited.trainer.args.output_dir)
    assert [record.step for record in stored.records] == [0, 1, 2, 3]
    with untouched(audited.trainer.model):  # by the kernels of training: those of inference may round otherwise
        plain = [_margin(audited.trainer.model, row) for row in audited.trainer.eval_dataset]
    assert stored.records[-1].margins.policy.mean == pytest.approx(
        sum(plain) / len(plain), abs=0.3 if kind == "8 bits" else 1e-3
    )
    assert stored.records[-1].margins.shift.mean > 1.0


def _margin(model: Any, row: dict[str, Any]) -> float:
    chosen, rejected = (_logp(model, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
    return chosen - rejected


@torch.no_grad()
def _logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([[*prompt, *completion]])
    predicted = model.eval()(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(predicted.gather(1, torch.tensor(completion)[:, None]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_depend_on_the_batch_are_said_to(kind: str, runs: Callable[[str], tuple[_Run, _Run]]) -> None:
    _, audited = runs(kind)
    record = AuditRun.load(audited.trainer.args.output_dir).records[-1]
    reason = record.provenance.layout_reason
    if kind == "8 bits":
        assert "depends on the texts in its batch" in reason
    else:
        assert reason is None or "depends on the texts" not in reason
