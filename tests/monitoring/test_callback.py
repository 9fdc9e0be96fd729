"""When the callback audits, where it writes, and what it does when an audit breaks: read from real, tiny trainings."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback

import align_audit.monitoring.monitor
from align_audit import AlignmentAuditCallback, AuditConfig, AuditRecord, AuditRun
from align_audit.alerts import detectors
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import ConfigurationError
from align_audit.models.weights.fingerprint import fingerprint
from align_audit.writers.tensorboard import TensorBoard
from tests.helpers.audits import QUICK, QUICK_GENERATIONS
from tests.helpers.dpo import Trained, build

pytestmark = pytest.mark.device

CREATED = "ref_model made"


def quick(**changes: Any) -> AuditConfig:
    """The least that is an audit: margins and patching on four pairs."""
    return AuditConfig.from_dict({**QUICK, "strict": True, **changes})


def run(
    output: Path,
    config: AuditConfig | None = None,
    *,
    mode: str = CREATED,
    others: list[TrainerCallback] | None = None,
    after: list[TrainerCallback] | None = None,
    attach: bool = True,
    resume: bool | str = False,
    **options: Any,
) -> Trained:
    """One training with the callback on; ``others`` stand before it among the callbacks, ``after`` behind it."""
    callback = AlignmentAuditCallback(config=config if config is not None else quick())
    trained = build(output, mode, [*(others or []), callback, *(after or [])], **options)
    if attach:
        callback.attach(trained.trainer)
    with contextlib.redirect_stdout(None):
        trained.trainer.train(resume_from_checkpoint=resume or None)
    return trained


def steps(output: Path) -> list[int]:
    return [record.step for record in AuditRun.load(output).records]


def events(folder: Path) -> EventAccumulator:
    """Everything TensorBoard would show of a folder as one run."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def event_files(output: Path) -> list[Path]:
    return sorted(output.rglob("events.out.tfevents.*"))


class At(TrainerCallback):
    """Calls ``action(model=…, state=…, control=…)`` at one event of one step, once."""

    def __init__(self, event: str, step: int, action: Callable[..., None]) -> None:
        self.step, self.action, self.fired = step, action, 0
        setattr(self, event, self._maybe)

    def _maybe(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.fired:
            self.fired += 1
            self.action(model=kwargs["model"], state=state, control=control)


def stop(control: Any, **_: Any) -> None:
    control.should_training_stop = True


def poison(model: Any, **_: Any) -> None:
    """One NaN in a weight of the second layer, as an overflow would leave it."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan


def shift_weight(model: Any, **_: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0


def out_of_memory(**_: Any) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")


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


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps with a checkpoint; then a new trainer and callback resume up to step 4. Later tests go on from there."""
    output = tmp_path_factory.mktemp("resumed") / "out"
    every = quick(schedule={"every_n_steps": 1})
    run(output, every, max_steps=2, lr_scheduler_type="constant")
    first = (output / "align_audit" / "records.jsonl").read_bytes()
    run(output, every, max_steps=4, resume=True, lr_scheduler_type="constant")
    return SimpleNamespace(output=output, first=first, config=every)


def test_a_resumed_run_continues_its_log(resumed: Any) -> None:
    log = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    assert log.startswith(resumed.first), "what was logged stays"
    records = AuditRun.load(resumed.output).records
    assert [record.step for record in records] == [0, 1, 2, 3, 4]
    assert len({record.provenance.policy_hash for record in records}) == 5
    assert len({record.provenance.reference_hash for record in records}) == 1
    assert records[0].reference_check.verdict == "passed"
    assert records[3].reference_check.verdict == "not_run", "step 3 is no start"


def test_steps_trained_again_to_the_same_weights_are_not_audited_again(
    resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: the log is ahead of the last checkpoint."""
    before = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", None)  # strict: would raise
    checkpoint = str(resumed.output / "checkpoint-2")
    run(resumed.output, resumed.config, max_steps=4, resume=checkpoint, lr_scheduler_type="constant")
    assert (resumed.output / "align_audit" / "records.jsonl").read_bytes() == before


def killed(**_: Any) -> None:
    raise InterruptedError("killed")


def angles(record: AuditRecord) -> dict[str, list[float] | None]:
    """Principal angles at layer 1 to the audit before, by basis."""
    return {basis: by_layer[1].principal_angles for basis, by_layer in record.low_rank.items()}


def test_a_killed_run_goes_on_with_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    """Its log is ahead of its checkpoint: the audit of step 4 is passed by, and that of step 6 goes on from it."""
    config = quick(
        schedule={"every_n_steps": 2, "health": False}, low_rank={"layers": [1], "ranks": [1, 2], "random_draws": 0}
    )
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2}
    straight, stopped = tmp_path / "straight" / "out", tmp_path / "stopped" / "out"
    run(straight, config, **options)
    with pytest.raises(InterruptedError):
        run(stopped, config, others=[At("on_step_end", 5, killed)], **options)
    assert steps(stopped) == [0, 2, 4]
    run(stopped, config, resume=str(stopped / "checkpoint-2"), **options)
    assert steps(stopped) == steps(straight) == [0, 2, 4, 6]
    records = {output: AuditRun.load(output).records for output in (straight, stopped)}
    assert all(angle is not None for angle in angles(records[straight][-1]).values())
    assert list(angles(records[straight][-1])) == ["activation", "shift"]
    for one, other in zip(records[straight], records[stopped], strict=True):
        assert one.key == other.key
        assert angles(one) == angles(other)


def test_an_audit_is_not_judged_by_later_steps(resumed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from step 2 on another course, step 3 is compared with 0 to 2, not with the old 3 and 4."""
    seen: dict[int, list[int]] = {}
    real = detectors.course_of

    def watched(record: Any, earlier: Any) -> Any:
        course = real(record, earlier)
        seen.setdefault(record.step, [each.step for each in course])
        return course

    monkeypatch.setattr(detectors, "course_of", watched)
    checkpoint = str(resumed.output / "checkpoint-2")
    run(resumed.output, resumed.config, max_steps=3, resume=checkpoint, lr_scheduler_type="constant", beta=1.0)
    assert seen == {3: [0, 1, 2]}
    assert steps(resumed.output) == [0, 1, 2, 3, 3, 4], "other weights at step 3 are another record"


def test_starting_from_scratch_sets_the_earlier_log_aside(resumed: Any) -> None:
    earlier = (resumed.output / "align_audit" / "records.jsonl").read_bytes()
    with pytest.warns(UserWarning, match=r"starts again from step 0.*previous-1"):
        run(resumed.output, resumed.config, max_steps=1, save_strategy="no")
    log = resumed.output / "align_audit"
    assert (log / "previous-1" / "records.jsonl").read_bytes() == earlier
    assert (log / "previous-1" / "step-4" / "arrays.safetensors").exists()
    assert steps(resumed.output) == [0, 1]
    assert not (log / "step-4").exists()


def test_an_audit_of_the_same_start_is_kept_and_of_another_is_set_aside(tmp_path: Path) -> None:
    """A run that ended before its second audit, and began again."""
    first = {"schedule": {"on_save": False, "on_last_step": False}}
    log = tmp_path / "out" / "align_audit"
    run(tmp_path / "out", quick(**first), max_steps=1, save_strategy="no")
    earlier = (log / "records.jsonl").read_bytes()
    run(tmp_path / "out", quick(**first), max_steps=1, save_strategy="no")
    assert (log / "records.jsonl").read_bytes() == earlier
    assert not (log / "previous-1").exists()
    with pytest.warns(UserWarning, match="previous-1"):
        run(tmp_path / "out", quick(**first, max_pairs=3), max_steps=1, save_strategy="no")
    assert (log / "previous-1" / "records.jsonl").read_bytes() == earlier
    (record,) = AuditRun.load(tmp_path / "out").records
    assert record.provenance.pairs == 3
    moved = [At("on_train_begin", 0, shift_weight)]
    with pytest.warns(UserWarning, match="previous-2"):  # the same, from other weights
        run(tmp_path / "out", quick(**first, max_pairs=3), others=moved, max_steps=1, save_strategy="no")
    assert len(AuditRun.load(tmp_path / "out").records) == 1


# -- audits that break, weights that break -----------------------------------------------------------------------------


def breaking(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real = align_audit.monitoring.monitor.run_audit

    def fails(models: Any, request: Any, *more: Any) -> Any:
        if request.step == at:
            raise ZeroDivisionError("planted")
        return real(models, request, *more)

    monkeypatch.setattr(align_audit.monitoring.monitor, "run_audit", fails)


def test_an_audit_that_breaks_is_recorded_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaking(monkeypatch, at=2)
    with caplog.at_level(logging.ERROR, logger="align_audit.monitoring.monitor"):
        # n = 1 and the save at step 2 ask for the same audit: it fails once.
        trained = run(tmp_path / "out", quick(strict=False, schedule={"every_n_steps": 1}))
    assert trained.trainer.state.global_step == 3
    stored = AuditRun.load(tmp_path / "out")
    assert [record.step for record in stored.records] == [0, 1, 3]
    (failure,) = stored.failures
    assert failure.step == 2
    assert failure.error.startswith("Traceback (most recent call last)")
    assert "ZeroDivisionError: planted" in failure.error
    assert "in fails" in failure.error, "the traceback leads to the place"
    (shown,) = [entry.getMessage() for entry in caplog.records]
    assert "step 2" in shown
    assert "training goes on" in shown


def test_strict_raises_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, at=1)
    with pytest.raises(ZeroDivisionError, match="planted"):
        run(tmp_path / "out", quick(strict=True, schedule={"every_n_steps": 1}))
    assert steps(tmp_path / "out") == [0]


def test_a_writer_that_breaks_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(TensorBoard, "record", fails)
    run(tmp_path / "out", quick(tensorboard="auto"), max_steps=1, save_strategy="no")
    stored = AuditRun.load(tmp_path / "out")
    assert [record.step for record in stored.records] == [0, 1]
    assert not stored.failures
    assert "could not write step 1 to TensorBoard" in caplog.text


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A NaN gets into a weight at step 1; all measures on; ``action="save"`` with no checkpoint due before step 3."""
    output = tmp_path_factory.mktemp("poisoned") / "out"
    config = AuditConfig.from_dict(
        {
            "max_pairs": 4,
            "statistics": {"bootstrap_resamples": 100},
            "schedule": {"every_n_steps": 1},
            "alerts": {"action": "save"},
            "generations": QUICK_GENERATIONS,
            "tensorboard": "off",
            "progress": False,
            "strict": True,
        }
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = run(output, config, others=[At("on_step_end", 1, poison)], max_steps=2, save_strategy="no")
    numeric = [str(item.message) for item in caught if issubclass(item.category, RuntimeWarning)]
    return SimpleNamespace(trained=trained, output=output, numeric=numeric)


def test_nan_weights_are_recorded_and_reported(poisoned: Any) -> None:
    assert poisoned.trained.trainer.state.global_step == 2, "training goes on"
    stored = AuditRun.load(poisoned.output)
    assert not stored.failures
    assert [record.step for record in stored.records] == [0, 1, 2]
    before, after = stored.records[:2]
    assert math.isfinite(before.margins.policy.mean)
    assert math.isnan(after.margins.policy.mean)
    assert "finite" in (after.margins.policy.reason or "")
    assert math.isfinite(after.margins.reference.mean), "the reference is whole"
    assert math.isnan(after.patching.effect[1].mean)
    assert after.patching.effect[1].reason
    assert after.patching.peak_layer is None
    assert after.controls.noise.verdict == "not_run"
    assert poisoned.numeric == []


def test_nan_weights_raise_the_non_finite_alert(poisoned: Any) -> None:
    stored = AuditRun.load(poisoned.output)
    assert not stored.records[0].alerts
    (alert,) = [alert for alert in stored.records[1].alerts if alert.rule == "non_finite"]
    assert alert.level == "error"
    assert alert.step == 1
    assert "policy" in alert.message
    logged = (poisoned.output / "align_audit" / "alerts.jsonl").read_text()
    assert '"non_finite"' in logged


def test_action_save_makes_a_checkpoint_where_none_was_due(poisoned: Any) -> None:
    assert (poisoned.output / "checkpoint-1" / "model.safetensors").exists()


def test_action_stop_ends_training_at_the_error(tmp_path: Path) -> None:
    config = quick(schedule={"every_n_steps": 1}, alerts={"action": "stop"})
    trained = run(tmp_path / "out", config, others=[At("on_step_end", 1, poison)], max_steps=3, save_strategy="no")
    assert trained.trainer.state.global_step == 1
    assert steps(tmp_path / "out") == [0, 1]


def test_a_healthy_run_is_not_stopped_or_saved(tmp_path: Path) -> None:
    config = quick(schedule={"every_n_steps": 1}, alerts={"action": "stop"})
    trained = run(tmp_path / "out", config, max_steps=2, save_strategy="no")
    assert trained.trainer.state.global_step == 2
    assert not AuditRun.load(tmp_path / "out").alerts
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# -- setting up --------------------------------------------------------------------------------------------------------


def test_attach_to_a_trainer_that_lacks_the_callback_is_refused(tmp_path: Path) -> None:
    trained = build(tmp_path / "out", CREATED, [])
    with pytest.raises(ConfigurationError, match=r"not among the trainer's callbacks.*callbacks=\[callback\]"):
        AlignmentAuditCallback(config=quick()).attach(trained.trainer)


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected config to be an AuditConfig, found dict.*from_dict"):
        AlignmentAuditCallback(config={"max_pairs": 3})  # type: ignore[arg-type]


def test_what_was_found_is_acted_on_although_closing_the_models_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = OpenModels.__exit__

    def broken(self: OpenModels, *exception: Any) -> None:
        close(self, *exception)
        if self.hashes[0] != self.hashes[1]:
            raise RuntimeError("the reference could not be let go of")

    monkeypatch.setattr(OpenModels, "__exit__", broken)
    config = quick(strict=False, schedule={"every_n_steps": 1}, alerts={"action": "stop"})
    trained = run(tmp_path / "out", config, others=[At("on_step_end", 1, poison)], max_steps=3, save_strategy="no")
    found = AuditRun.load(tmp_path / "out")
    assert [record.step for record in found.records] == [0, 1]
    assert "could not be let go of" in found.failures[0].error
    assert trained.trainer.state.global_step == 1
