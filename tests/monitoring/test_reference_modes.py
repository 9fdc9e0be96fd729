"""Which reference an audit takes, whether it is the right one, and what is said when it is not or cannot be had."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import align_audit.models.reference
from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.errors import ConfigurationError, ReferenceUnavailableError
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.callback_runs import At, quick, run, steps
from tests.helpers.dpo import ROWS, build, saved_model
from tests.helpers.probe_tokenizer import make_tokenizer
from tests.helpers.tiny import DEVICE, perturbed, tiny_model

pytestmark = pytest.mark.device

TARGETS = ["q_proj", "v_proj", "down_proj"]


def begin(trained: Any, callback: AlignmentAuditCallback, *, attach: bool = True) -> AuditRun:
    """What happens before the first step of a trainer built with ``callback``: set-up and the audit of step 0."""
    trainer = getattr(trained, "trainer", trained)
    if attach:
        callback.attach(trainer)
    callback.on_train_begin(
        trainer.args,
        trainer.state,
        trainer.control,
        model=trainer.model,
        processing_class=trainer.processing_class,
        train_dataloader=SimpleNamespace(dataset=trainer.train_dataset),
    )
    return AuditRun.load(trainer.args.output_dir)


def lora_trainer(output: Path, lora: LoraConfig, callback: AlignmentAuditCallback, **options: Any) -> DPOTrainer:
    """A trainer that makes the adapter itself, on a base with biases in its attention."""
    base = saved_model(output.parent / "base", attention_bias=True)
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": [],
        "use_cpu": DEVICE.type == "cpu",
        "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(str(output), **{**settings, **options}),
        train_dataset=Dataset.from_list(ROWS[:16]),
        eval_dataset=Dataset.from_list(ROWS[16:]),
        processing_class=make_tokenizer(),
        peft_config=lora,
        callbacks=[callback],
    )


def mismatches(run: AuditRun) -> list[Any]:
    return [alert for alert in run.alerts if alert.rule == "reference_mismatch"]


# -- precomputed reference log-probabilities: no reference in memory ---------------------------------------------------


@pytest.mark.parametrize("given", ["own source", "path", "model"])
def test_precomputed_the_reference_is_found_and_compared(given: str, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    saved_model(tmp_path / "base")
    reference = {"own source": None, "path": base, "model": None}[given]
    if given == "model":
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    callback = AlignmentAuditCallback(config=quick(), reference=reference)
    stored = begin(build(tmp_path / "out", "precompute", [callback]), callback)
    (record,) = stored.records
    words = {
        "own source": "streamed from the policy's own source, base",
        "path": "streamed from base",
        "model": "a model that was passed",
    }
    check = record.reference_check
    assert check.source == words[given]
    assert check.verdict == "passed"
    assert check.same_weights
    assert check.precomputed_margin_difference == pytest.approx(0.0, abs=1e-3)
    assert record.margins.shift.mean == 0.0
    assert not stored.alerts


@pytest.mark.filterwarnings("ignore:.*found no held-out pairs")
def test_precomputed_the_margins_are_compared_at_later_steps_too(tmp_path: Path) -> None:
    run(tmp_path / "out", mode="precompute", attach=False, max_steps=1)
    first, last = AuditRun.load(tmp_path / "out").records
    assert last.step == 1
    assert last.reference_check.verdict == "passed"
    assert "precomputed" in last.reference_check.reason
    assert last.provenance.policy_hash != first.provenance.policy_hash
    assert last.provenance.reference_hash == first.provenance.reference_hash


@pytest.mark.parametrize("kind", ["path", "model"])
def test_precomputed_a_wrong_reference_is_reported_at_step_0(kind: str, tmp_path: Path) -> None:
    other = perturbed(AutoModelForCausalLM.from_pretrained(saved_model(tmp_path / "base")), scale=0.1)
    other.save_pretrained(tmp_path / "other")
    callback = AlignmentAuditCallback(config=quick(), reference=other if kind == "model" else tmp_path / "other")
    stored = begin(build(tmp_path / "out", "precompute", [callback]), callback)
    (record,) = stored.records
    assert record.reference_check.verdict == "failed"
    assert not record.reference_check.same_weights
    assert record.reference_check.precomputed_margin_difference > 0.1
    (alert,) = mismatches(stored)
    assert (alert.level, alert.step) == ("error", 0)
    assert alert.value == record.reference_check.precomputed_margin_difference
    assert "not the reference the trainer uses" in alert.message
    assert "reference=" in alert.suggestion


def test_precomputed_without_any_source_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = tiny_model(
        "llama", dtype=torch.float32, vocab_size=len(tokenizer), bos_token_id=None, num_hidden_layers=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    callback = AlignmentAuditCallback(config=quick())
    before = fingerprint(model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            str(tmp_path / "out"),
            max_steps=1,
            report_to=[],
            use_cpu=DEVICE.type == "cpu",
            bf16=False,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(ROWS[:4]),
        eval_dataset=Dataset.from_list(ROWS[4:8]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.attach(trainer)
    with pytest.raises(ReferenceUnavailableError, match=r"no reference model can be had.*Pass `reference=`"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert fingerprint(model) == before
    assert not (tmp_path / "out" / "align_audit").exists()


@pytest.mark.parametrize("audited", [True, False])
def test_a_reference_that_was_loaded_is_let_go_of(
    audited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = align_audit.models.reference.open_streamed

    def watched(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(align_audit.models.reference, "open_streamed", watched)
    callback = AlignmentAuditCallback(config=quick(schedule={"before_training": audited}))
    begin(build(tmp_path / "out", "precompute", [callback]), callback)
    gc.collect()
    assert loaded
    assert [model() for model in loaded] == [None] * len(loaded)


# -- a reference beside the policy -------------------------------------------------------------------------------------


def test_attached_the_trainers_own_reference_is_taken_and_a_wrong_one_reported(tmp_path: Path) -> None:
    """TRL trains against whatever ``ref_model`` is passed; without attach only the policy's own source is in reach."""
    base = saved_model(tmp_path / "base")
    other = perturbed(AutoModelForCausalLM.from_pretrained(base), scale=0.1)

    def begun(name: str, attach: bool) -> AuditRun:
        callback = AlignmentAuditCallback(config=quick())
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            ref_model=other,
            args=DPOConfig(str(tmp_path / name), max_steps=1, report_to=[], use_cpu=DEVICE.type == "cpu", bf16=False),
            train_dataset=Dataset.from_list(ROWS[:8]),
            eval_dataset=Dataset.from_list(ROWS[8:16]),
            processing_class=make_tokenizer(),
            callbacks=[callback],
        )
        return begin(trainer, callback, attach=attach)

    attached = begun("attached", True)
    assert attached.records[0].reference_check.source == "the trainer's ref_model"
    assert attached.records[0].provenance.reference_hash == fingerprint(other)
    (alert,) = mismatches(attached)
    assert (alert.level, alert.step) == ("error", 0)
    assert "already differ" in alert.message

    with pytest.warns(UserWarning, match="from the training set"):
        alone = begun("alone", False)
    assert alone.records[0].reference_check.source == "streamed from the policy's own source, base"
    assert alone.records[0].reference_check.verdict == "passed"


def test_the_policy_as_its_own_reference_is_refused(tmp_path: Path) -> None:
    trained = build(tmp_path / "out", "precompute", [])
    callback = AlignmentAuditCallback(config=quick(), reference=trained.model)
    trained.trainer.add_callback(callback)
    with pytest.raises(ReferenceUnavailableError, match="is the policy itself"):
        begin(trained, callback)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 2}, "decoder layers 2 against the policy's 3"),
        ({"hidden_size": 48, "head_dim": 8}, "width 48 against the policy's 32"),
        ({"vocab_size": 501}, "vocabulary size 501 against the policy's "),
    ],
)
def test_a_reference_of_another_shape_is_refused_before_training(
    change: dict[str, int], words: str, tmp_path: Path
) -> None:
    tiny_model("llama", dtype=torch.float32, **{"num_hidden_layers": 3, **change}).save_pretrained(tmp_path / "other")
    callback = AlignmentAuditCallback(config=quick(strict=False), reference=tmp_path / "other")
    trained = build(tmp_path / "out", "precompute", [callback])
    callback.attach(trained.trainer)
    with pytest.raises(ReferenceUnavailableError, match=words):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


def test_a_reference_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick(strict=False), reference=tmp_path / "nowhere")
    trained = build(tmp_path / "out", "precompute", [callback])
    with pytest.raises(ReferenceUnavailableError, match=r"cannot load a causal language model from .*nowhere"):
        begin(trained, callback)


# -- adapters whose base is not the starting point ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pissa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PiSSA moves the principal part of each weight into the adapter: adapters off is no longer the base model."""
    output = tmp_path_factory.mktemp("pissa") / "out"
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="pissa")
    callback = AlignmentAuditCallback(config=quick(alerts={"action": "save"}))
    trainer = lora_trainer(output, lora, callback)
    callback.attach(trainer)
    trainer.train()
    return output


def test_pissa_is_reported_before_training(pissa: Path) -> None:
    stored = AuditRun.load(pissa)
    first = stored.records[0]
    assert first.step == 0
    assert first.reference_check.source == "the policy with its adapters off"
    assert first.reference_check.verdict == "failed"
    assert not first.reference_check.same_weights
    assert "PiSSA" in first.reference_check.reason
    assert abs(first.margins.shift.mean) > 1e-3
    (alert,) = mismatches(stored)
    assert (alert.level, alert.step) == ("error", 0)
    assert "init_lora_weights" in alert.suggestion
    assert steps(pissa) == [0, 1, 2], "the wished-for checkpoint of step 1 is audited as any other"


def test_a_wish_to_save_before_the_first_step_is_kept(pissa: Path) -> None:
    """The Trainer clears ``should_save`` before step 1, and nothing was due with ``save_strategy="no"``."""
    assert (pissa / "checkpoint-1" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")  # PEFT says what is tested here
def test_trained_biases_change_the_reference_under_us(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", bias="all")
    callback = AlignmentAuditCallback(config=quick(schedule={"every_n_steps": 1}))
    trainer = lora_trainer(tmp_path / "out", lora, callback, max_steps=1)
    callback.attach(trainer)
    trainer.train()
    stored = AuditRun.load(tmp_path / "out")
    first, last = stored.records
    assert first.reference_check.verdict == "passed", "at the start adapters off is the base"
    assert last.provenance.reference_hash != first.provenance.reference_hash
    (alert,) = [alert for alert in stored.alerts if alert.rule == "reference_changed"]
    assert (alert.level, alert.step) == ("error", 1)
    assert "bias" in alert.suggestion
    assert first.provenance.reference_hash in alert.message


# -- a reference that is synchronized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("due", ["every step", "at saves"])
def test_an_audit_on_a_synchronization_step_runs_after_it(due: str, tmp_path: Path) -> None:
    """TRL mixes policy into reference every 2 steps, in a callback that runs after ours."""
    mixed: dict[int, str] = {}
    trainer: list[Any] = []
    spies = [
        At(
            "on_step_begin",
            step,
            lambda state, **_: mixed.update({state.global_step: fingerprint(trainer[0].ref_model)}),
        )
        for step in (1, 2, 3)
    ]
    callback = AlignmentAuditCallback(config=quick(schedule={"every_n_steps": 1 if due == "every step" else None}))
    trained = build(tmp_path / "out", "sync", [callback, *spies], max_steps=4)
    trainer.append(trained.trainer)
    callback.attach(trained.trainer)
    trained.trainer.train()
    mixed[4] = fingerprint(trained.trainer.ref_model)
    assert mixed[1] != mixed[2] == mixed[3] != mixed[4], "the trainer did mix at steps 2 and 4"

    stored = AuditRun.load(tmp_path / "out")
    records = {record.step: record for record in stored.records}
    assert list(records) == ([0, 1, 2, 3, 4] if due == "every step" else [0, 2, 4])
    for step, record in records.items():
        assert record.reference_check.last_sync_step == {0: None, 1: None, 2: 2, 3: 2, 4: 4}[step]
        if step:
            assert record.provenance.reference_hash == mixed[step]
    assert not [alert for alert in stored.alerts if alert.rule == "reference_changed"]
    # The audit of step 2 saw the mixed reference: 0.6 of the policy, so nothing cached of the old one was used.
    assert records[2].margins.reference.mean != records[0].margins.reference.mean


@pytest.mark.filterwarnings("ignore:.*found no held-out pairs")
def test_a_synchronized_reference_needs_attach(tmp_path: Path) -> None:
    callback = AlignmentAuditCallback(config=quick(strict=False))
    trained = build(tmp_path / "out", "sync", [callback])
    with pytest.raises(ConfigurationError, match=r"sync_ref_model=True.*callback\.attach\(trainer\)"):
        trained.trainer.train()
    assert trained.trainer.state.global_step == 0


def test_resuming_a_synchronized_run_says_that_the_reference_fell_back(tmp_path: Path) -> None:
    """TRL does not save the mixed reference: a resumed run trains against the first one again, silently."""
    run(tmp_path / "out", mode="sync", max_steps=2)
    run(tmp_path / "out", mode="sync", max_steps=3, resume=True)
    stored = AuditRun.load(tmp_path / "out")
    start, mixed, after = stored.records
    assert [start.step, mixed.step, after.step] == [0, 2, 3]
    assert after.provenance.reference_hash == start.provenance.reference_hash != mixed.provenance.reference_hash
    (alert,) = [alert for alert in stored.alerts if alert.rule == "reference_changed"]
    assert (alert.level, alert.step) == ("error", 3)


def test_every_mode_reads_a_finite_reference(tmp_path: Path) -> None:
    """The adapter copy the trainer keeps beside a pretrained adapter is the reference, not the bare base."""
    callback = AlignmentAuditCallback(config=quick())
    trained = build(tmp_path / "out", "pretrained adapter", [callback])
    stored = begin(trained, callback)
    (record,) = stored.records
    assert record.reference_check.source == "the policy's 'ref' adapter"
    assert record.reference_check.same_weights
    assert math.isfinite(record.margins.reference.mean)
    with trained.model.disable_adapter():
        bare = AlignmentAuditCallback(config=quick(), reference=str(tmp_path / "base"))
    trained.trainer.add_callback(bare)
    bare.attach(trained.trainer)
    trained.trainer.args.output_dir = str(tmp_path / "bare")
    (other,) = begin(trained, bare).records
    assert other.reference_check.verdict == "failed"
    assert other.margins.reference.mean != record.margins.reference.mean
