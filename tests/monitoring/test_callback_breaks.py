"""What the callback does when an audit, a writer or the weights break, and what it refuses to begin with."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import align_audit.monitoring.monitor
from align_audit import AlignmentAuditCallback, AuditConfig, AuditRun
from align_audit.auditing.session.open_models import OpenModels
from align_audit.errors import ConfigurationError
from align_audit.writers.tensorboard import TensorBoard
from tests.helpers.audits import QUICK_GENERATIONS
from tests.helpers.callback_runs import (
    CREATED,
    At,
    poison,
    quick,
    run,
    steps,
)
from tests.helpers.dpo import build

pytestmark = pytest.mark.device


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
