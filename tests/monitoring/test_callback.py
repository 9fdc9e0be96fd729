"""When the callback audits, and where it writes: read from real, tiny trainings."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import align_audit.monitoring.monitor
from align_audit import AlignmentAuditCallback, AuditRun
from align_audit.models.weights.fingerprint import fingerprint
from tests.helpers.callback_runs import (
    At,
    event_files,
    events,
    out_of_memory,
    quick,
    run,
    steps,
    stop,
)
from tests.helpers.dpo import build

pytestmark = pytest.mark.device


# -- without attach: the trainer's folder, saves and the last step -----------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``callbacks=[callback]``, ``report_to=["tensorboard"]``, no attach; a checkpoint at step 2 of 3."""
    output = tmp_path_factory.mktemp("plain") / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        everything = quick(tensorboard="auto", tensorboard_scalars="all")
        trained = run(output, everything, attach=False, report_to=["tensorboard"])
    return SimpleNamespace(trained=trained, output=output, warned=[str(item.message) for item in caught])


def test_curves_stand_beside_the_trainers(plain: Any) -> None:
    files = event_files(plain.output)
    assert len(files) == 2
    assert len({file.parent for file in files}) == 1, "both event files lie in one run folder"
    assert not (plain.output / "align_audit" / "tensorboard").exists()

    run_folder = events(files[0].parent)
    scalars = set(run_folder.Tags()["scalars"])
    assert "train/loss" in scalars
    assert [event.step for event in run_folder.Scalars("train/loss")] == [1, 2, 3]
    for tag in ("margins/shift", "patching/effect/layer_00", "patching/block_transplant/layer_02", "cost/seconds"):
        assert [event.step for event in run_folder.Scalars(f"align_audit/{tag}")] == [0, 2, 3], tag
    images = [tag for tag in run_folder.Tags()["images"] if tag.startswith("align_audit/")]
    assert "align_audit/patching/recovery_by_layer_and_step" in images
    assert [event.step for event in run_folder.Images(images[0])] == [0, 2, 3]

    stored = [record.margins.shift.mean for record in AuditRun.load(plain.output).records]
    shown = [event.value for event in run_folder.Scalars("align_audit/margins/shift")]
    assert shown == pytest.approx(stored, rel=1e-6)
    assert stored[-1] != 0.0


def test_audits_before_training_at_checkpoints_and_on_the_last_step(plain: Any) -> None:
    records = AuditRun.load(plain.output).records
    assert [record.step for record in records] == [0, 2, 3]
    for record in records[1:]:
        saved = AutoModelForCausalLM.from_pretrained(plain.output / f"checkpoint-{record.step}", dtype=torch.float32)
        assert record.provenance.policy_hash == fingerprint(saved), "the record speaks of the checkpoint's weights"
    assert len({record.provenance.reference_hash for record in records}) == 1
    assert records[0].provenance.beta == plain.trained.trainer.beta


def test_without_attach_the_probes_are_training_pairs_and_a_warning_says_so(plain: Any) -> None:
    assert sum("from the training set" in text and "attach" in text for text in plain.warned) == 1
    provenance = AuditRun.load(plain.output).records[0].provenance
    assert provenance.probe_held_out is False
    assert provenance.probe_source == "the training set"


def test_what_is_large_lies_beside_the_log(plain: Any) -> None:
    stored = AuditRun.load(plain.output)
    arrays = stored.load_arrays(3, "arrays")
    record = stored.records[-1]
    effect = arrays["per_pair.effect"]
    assert effect.shape == (4, 1 + 3)
    assert float(effect[:, -1].mean()) == pytest.approx(record.patching.effect[-1].mean)


def test_the_trainers_own_metrics_are_not_disturbed(plain: Any, attached: Any) -> None:
    """``DPOTrainer.log`` averages and clears what is pending: whoever calls it in between loses metrics."""
    for trained in (plain.trained, attached.trained):
        logs = [log for log in trained.losses if "loss" in log]
        assert len(logs) == trained.trainer.state.max_steps
        for log in logs:
            assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= log.keys()
            assert {"logps/chosen", "logps/rejected", "grad_norm", "learning_rate"} <= log.keys()


# -- attached: the trainer's own writer, every event -------------------------------------------------------------------


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every event falls due: n = 2 and saves at 2 and 4 together, an evaluation at 3, the last step 5 with all."""
    output = tmp_path_factory.mktemp("attached") / "out"
    calls: list[int] = []
    real = align_audit.monitoring.monitor.run_audit

    def counted(models: Any, request: Any, *more: Any) -> Any:
        calls.append(request.step)
        return real(models, request, *more)

    with pytest.MonkeyPatch.context() as local:
        local.setattr(align_audit.monitoring.monitor, "run_audit", counted)
        trained = run(
            output,
            quick(tensorboard="auto", schedule={"every_n_steps": 2, "on_evaluate": True}, tensorboard_images=False),
            report_to=["tensorboard"],
            max_steps=5,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=3,
        )
    return SimpleNamespace(trained=trained, output=output, calls=calls)


def test_events_that_fall_together_make_one_record(attached: Any) -> None:
    assert attached.calls == [0, 2, 3, 4, 5], "one audit per (step, weights), and none at step 1"
    assert steps(attached.output) == [0, 2, 3, 4, 5]
    lines = (attached.output / "align_audit" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 3, 4, 5]


def test_attached_it_writes_through_the_trainers_own_writer(attached: Any) -> None:
    (file,) = event_files(attached.output)
    assert not file.name.endswith(".align_audit")
    run_folder = events(file.parent)
    assert [event.step for event in run_folder.Scalars("align_audit health/kl")] == [0, 2, 3, 4, 5]
    assert [event.step for event in run_folder.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert "eval/loss" in run_folder.Tags()["scalars"]


def test_attached_it_takes_the_trainers_eval_set_beta_and_truncation(attached: Any) -> None:
    provenance = AuditRun.load(attached.output).records[0].provenance
    trainer = attached.trained.trainer
    assert provenance.probe_held_out is True
    assert provenance.probe_source == "the trainer's eval set"
    assert provenance.beta == trainer.beta
    assert provenance.max_length == trainer.args.max_length
    assert provenance.truncation_mode == trainer.args.truncation_mode


# -- stops, the best model, beginning again ----------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
def test_a_stop_by_a_later_callback_still_audits_the_last_step(event: str, tmp_path: Path) -> None:
    """It stops after our own event. Where no event of ours follows but the end, the trainer's writer is closed by then."""
    trained = run(
        tmp_path / "out",
        quick(tensorboard="auto", tensorboard_images=False),
        after=[At(event, 1, stop)],
        max_steps=-1,
        num_train_epochs=2,
        gradient_accumulation_steps=4,  # one step an epoch
        save_strategy="no",
        report_to=["tensorboard"],
    )
    assert trained.trainer.state.global_step == 1
    assert trained.trainer.state.max_steps == 2
    records = AuditRun.load(tmp_path / "out").records
    assert [record.step for record in records] == [0, 1]
    assert records[-1].provenance.policy_hash == fingerprint(trained.model)
    files = event_files(tmp_path)
    assert len(files) == (1 if event == "on_step_end" else 2)
    (folder,) = {file.parent for file in files}
    assert [event.step for event in events(folder).Scalars("align_audit health/kl")] == [0, 1]
    assert [event.step for event in events(folder).Scalars("train/loss")] == [1]


def test_a_stop_by_an_earlier_callback_audits_once_and_tensorboard_off_writes_none(tmp_path: Path) -> None:
    trained = run(
        tmp_path / "out",
        quick(schedule={"before_training": False, "on_save": False}),
        others=[At("on_step_end", 2, stop)],
        report_to=[],
    )
    assert trained.trainer.state.global_step == 2
    assert steps(tmp_path / "out") == [2]
    assert event_files(tmp_path) == []


@pytest.mark.parametrize("strict", [False, True])
def test_a_callback_that_lives_on_holds_no_model_and_no_optimizer(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook it does, and what it holds stays on the accelerator. Also where it has ended the training itself."""
    if strict:
        monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", poison_all)
    callback = AlignmentAuditCallback(config=quick(strict=strict))
    trained = build(tmp_path / "out", "ref_model made", [callback], max_steps=1)
    callback.attach(trained.trainer)
    with contextlib.suppress(ZeroDivisionError):
        trained.trainer.train()
    trainer = trained.trainer
    held = [weakref.ref(each) for each in (trainer.model, trainer.ref_model, trainer.optimizer) if each is not None]
    trainer.accelerator.free_memory()
    del trained, trainer
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def poison_all(*_: Any) -> None:
    raise ZeroDivisionError("planted")


def test_only_what_the_schedule_names(tmp_path: Path) -> None:
    off = {"before_training": False, "on_save": False, "on_last_step": False}
    run(tmp_path / "out", quick(schedule=off), save_steps=1, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert steps(tmp_path / "out") == []


def test_epochs_end_with_one_record(tmp_path: Path) -> None:
    """Saved by epoch, the last step is the epoch's end; with no trainer log, the curves go to their own folder."""
    epochs = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    trained = run(tmp_path / "out", quick(tensorboard="auto", tensorboard_images=False), report_to=[], **epochs)
    assert trained.trainer.state.global_step == 2
    assert (tmp_path / "out" / "checkpoint-2").exists()
    assert steps(tmp_path / "out") == [0, 2]
    folder = tmp_path / "out" / "align_audit" / "tensorboard"
    assert {file.parent for file in event_files(tmp_path)} == {folder}
    assert [event.step for event in events(folder).Scalars("align_audit health/kl")] == [0, 2]


def test_an_evaluation_is_no_step_of_training(tmp_path: Path) -> None:
    """What an audit costs in training pairs goes by the trainer's steps alone."""
    slow = At("on_prediction_step", 1, lambda **_: time.sleep(0.5))
    trained = run(tmp_path / "out", others=[slow], max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no")
    assert slow.fired == 1
    record = AuditRun.load(tmp_path / "out").records[-1]
    occasion, cost = record.occasion, record.cost
    assert (record.step, occasion.training_pair_seconds is None, cost.training_pairs is None) == (2, False, False)
    so_far = cost.seconds / cost.share_of_run
    stepping = occasion.training_pair_seconds * 2 * trained.trainer.get_total_train_batch_size(trained.trainer.args)
    assert 0 < stepping <= so_far * (1 - occasion.share_spent) - 0.5
    assert cost.training_pairs == pytest.approx(cost.seconds / occasion.training_pair_seconds, rel=1e-9)


def test_loading_the_best_model_makes_no_record(tmp_path: Path) -> None:
    trained = run(
        tmp_path / "out",
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint counts as the best
    )
    records = AuditRun.load(tmp_path / "out").records
    assert [record.step for record in records] == [0, 1, 2]
    assert fingerprint(trained.model) == records[1].provenance.policy_hash, "the trainer did swap the weights"
    assert records[2].provenance.policy_hash != records[1].provenance.policy_hash


def test_a_smaller_batch_size_begins_again_without_a_duplicate(tmp_path: Path) -> None:
    memory = At("on_step_begin", 0, out_of_memory)
    run(tmp_path / "out", others=[memory], auto_find_batch_size=True, max_steps=1)
    assert memory.fired == 1, "training did begin twice"
    assert steps(tmp_path / "out") == [0, 1]
    assert not (tmp_path / "out" / "align_audit" / "previous-1").exists()


def test_beginning_again_after_some_steps_sets_them_aside(tmp_path: Path) -> None:
    memory = At("on_step_begin", 1, out_of_memory)
    with pytest.warns(UserWarning, match="previous-1"):
        run(
            tmp_path / "out",
            quick(schedule={"every_n_steps": 1}),
            others=[memory],
            auto_find_batch_size=True,
            max_steps=2,
        )
    log = tmp_path / "out" / "align_audit"
    assert [record.step for record in AuditRun.load(log / "previous-1").records] == [0, 1]
    assert steps(tmp_path / "out") == [0, 1, 2]
